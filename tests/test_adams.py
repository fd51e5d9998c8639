"""AdamS against the paper's equations, against torch's Adam, and against what would break it without a word."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import castlm
from castlm.core import native, update
from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.moments import code_values, from_codes, to_codes_
from castlm.core.nm import NM, nm_mask, unpack_mask
from castlm.core.sparsify import prune_
from tests.fused import needs_kernels, threads, through_torch_compile
from tests.reference import ReferenceAdamS
from tests.refusals import refusal
from tests.slow import slow

HYPER = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "lam": 0.3, "total_steps": 50}


def sparse_group(*params, n=2, m=4):
    return [{"params": list(params), "sparse": True, "pattern": f"{n}:{m}"}]


def dense_group(*params):
    return [{"params": list(params), "sparse": False}]


def step(*optimizers, seed=0, times=1):
    """Steps each optimizer `times` times, all with the same random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        for params in zip(*([p for group in each.param_groups for p in group["params"]] for each in optimizers)):
            grad = torch.randn(params[0].shape, generator=generator)
            for param in params:
                param.grad = grad.to(param.dtype, copy=True)
        for optimizer in optimizers:
            optimizer.step()


RULES = [*((decay, "mix") for decay in DECAYS), ("horizon", "gradient"), ("none", "gradient")]
WAYS = [False, pytest.param(None, marks=needs_kernels)]  # fused: torch operators, and the default on a CPU
FUSED = [pytest.param("native", marks=needs_kernels), slow("compiled")]


EQUAL = [(2, 4, 36), (1, 4, 12), (4, 8, 24), (2, 3, 9)]
"""n, m and a width, which is whole bytes of a mask or not."""


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize(
    ("decay", "second_moment", "n", "m", "width"),
    [*((*rule, *EQUAL[0]) for rule in RULES), *(("horizon", "mix", *pattern) for pattern in EQUAL[1:])],
)
def test_fifty_steps_equal_the_equations(decay, second_moment, n, m, width, fused):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, width))
    rest = {"mask_interval": 7, "decay": decay, "decay_end": 0.6, "second_moment": second_moment}
    reference = ReferenceAdamS(weight.tolist(), n, m, **HYPER, **rest)
    optimizer = AdamS(sparse_group(weight, n=n, m=m), **HYPER, **rest, fused=fused)
    for t in range(50):
        grad = torch.randn(6, width)
        reference.step(grad.tolist())
        weight.grad = grad
        optimizer.step()
        assert optimizer.mask(weight).tolist() == reference.mask, t
        expected = torch.tensor(reference.w)
        assert (weight - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item()), t
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor(reference.mu), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], torch.tensor(reference.v), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fused", WAYS)
def test_weight_decay_is_that_of_adamw_on_dense_groups_alone(fused):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(()))]
    sparse = [nn.Parameter(torch.randn(4, 8))]
    theirs, plain = copy.deepcopy(ours), copy.deepcopy(sparse)
    options = {"lr": 1e-2, "total_steps": 30, "fused": fused}
    optimizer = AdamS([*sparse_group(*sparse), *dense_group(*ours)], **options, weight_decay=0.3)
    without = AdamS(sparse_group(*plain), **options)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.3)
    for seed in range(30):
        step(optimizer, seed=seed)
        for param, other in zip([*sparse, *ours], [*plain, *theirs]):
            other.grad = param.grad
        without.step()
        adamw.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(*sparse, *plain)


@pytest.mark.parametrize("lam", [0.0, 10.0])
def test_horizon_reaches_exact_zero_at_decay_end_and_stays(lam):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = AdamS(sparse_group(weight), lr=1e-4, lam=lam, total_steps=40, decay_end=0.5)
    for t in range(40):
        step(optimizer, seed=t)
        masked = weight.detach()[~optimizer.mask(weight)]
        assert (t >= 19) == bool((masked == 0).all())
    assert torch.equal(optimizer.mask(weight), nm_mask(weight))


@pytest.mark.parametrize("way", FUSED)
def test_fused_path_equals_the_plain_one(way, monkeypatch):
    """Widths in whole bytes and not, one and many of a size, large dense tensors and small; masks agree to the bit."""
    torch.manual_seed(0)
    monkeypatch.setattr(update, "_CALL", 2)
    shapes = [(6, 16), (4, 8), (3, 12), *[(8, 24)] * 3, (5,), (260, 260), (2, 3)]
    plain = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    fused = copy.deepcopy(plain)
    optimizers = [
        AdamS([*sparse_group(*p[:6]), {"params": p[6:]}], lr=1e-2, total_steps=20, mask_interval=3, fused=False)
        for p in (plain, fused)
    ]
    if way == "native":
        optimizers[1]._fused = True
    else:
        through_torch_compile(optimizers[1], monkeypatch)
    for seed in range(20):
        step(*optimizers, seed=seed)
        assert optimizers[0].flips() == optimizers[1].flips()
        for a, b in zip(plain[:6], fused):
            assert torch.equal(optimizers[0].mask(a), optimizers[1].mask(b))
    for a, b in zip(plain, fused):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    fused[2].data[0, 0] = fused[0].data[5, 15] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        optimizers[1].refresh_masks(optimizers[1].param_groups[0])


@needs_kernels
def test_kernels_give_the_same_bits_on_any_number_of_threads():
    """Weights longer than what a thread takes at a time, with rows of whole bytes and without."""
    torch.manual_seed(0)
    start = [torch.randn(400, 1000), torch.randn(30_000, 12), torch.randn(3, 100_002), torch.randn(300_001)]
    ended = []
    for num_threads in (1, 4):
        params = [nn.Parameter(weight.clone()) for weight in start]
        groups = [*sparse_group(*params[:2]), *sparse_group(params[2], n=1, m=3), {"params": params[3:]}]
        optimizer = AdamS(groups, lr=0.1, total_steps=3, mask_interval=1, fused=True)
        with threads(num_threads):
            step(optimizer, times=3)
        ended.append([*params, *optimizer.masks().values(), torch.tensor(optimizer.flips())])
        for param, (n, m) in zip(params, ((2, 4), (2, 4), (1, 3))):
            assert torch.equal(optimizer.mask(param).view(-1, m).sum(1).unique(), torch.tensor([n]))
    assert all(torch.equal(one, four) for one, four in zip(*ended))


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "float64"), (torch.float32, "were not compiled")])
def test_fused_without_kernels_for_a_parameter_is_refused(dtype, reason, monkeypatch):
    if dtype == torch.float32 or native.kernels() is None:
        monkeypatch.setattr(native, "kernels", lambda: None)
        reason = "were not compiled"
    with pytest.raises(InputError, match=reason):
        AdamS(dense_group(nn.Parameter(torch.randn(4, dtype=dtype))), total_steps=1, fused=True)


def test_a_mask_is_a_bit_a_weight_and_one_that_was_set_stays_without_an_interval():
    weight = nn.Parameter(torch.randn(6, 20))
    optimizer = AdamS(sparse_group(weight), total_steps=10, mask_interval=0)
    assert optimizer.state[weight]["mask"].shape == (6, 3)
    assert optimizer.state[weight]["mask"].dtype == torch.uint8
    other = ~nm_mask(weight)  # of 2:4, its complement is 2:4 too
    optimizer.set_mask(weight, other)
    step(optimizer, times=10)
    assert torch.equal(optimizer.mask(weight), other)
    assert torch.equal(optimizer.masks()[weight], other)
    assert torch.equal(weight != 0, other)


def test_torch_distributed_state_dict_takes_no_hidden_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(8, 4, bias=False)
    optimizer = AdamS(sparse_group(model.weight), total_steps=20)
    state = get_optimizer_state_dict(model, optimizer)
    assert int(state["state"]["weight"]["step"]) == 0
    assert torch.equal(unpack_mask(state["state"]["weight"]["mask"], 8), nm_mask(model.weight))


def test_flips_count_all_groups_and_a_nan_in_any_steps_none():
    params = [nn.Parameter(torch.randn(4, 8)) for _ in range(2)]
    optimizer = AdamS([{"params": [p], "sparse": True} for p in params], lr=0.0, total_steps=10, mask_interval=1)
    for param in params:
        param.grad = torch.ones_like(param)
    expected = 0
    for param in params:
        before = optimizer.mask(param)
        param.data = param.data.roll(1, dims=1)
        expected += int((before != NM(2, 4).mask(param.data)).sum())
    optimizer.step()
    assert optimizer.flips() == expected > 0
    params[1].data[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 1]


# ---- what cannot be stepped is refused before anything changes, or converted exactly


EVERY_WAY = [False, pytest.param(True, marks=needs_kernels), None]


def make(fused=None, shape=(4, 8), **options):
    torch.manual_seed(0)
    sparse, dense = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(5))
    groups = [{"params": [sparse], "sparse": True}, {"params": [dense]}]
    return AdamS(groups, **{"lr": 1e-2, "total_steps": 20, "mask_interval": 2, **options}, fused=fused), sparse, dense


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict()), [
        p.detach().clone() for g in optimizer.param_groups for p in g["params"]
    ]


def assert_same_state(one, other):
    for a, b in zip(one[0]["state"].values(), other[0]["state"].values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


# ---- gradients


def other_strides(grad):
    return grad.t().contiguous().t() if grad.dim() == 2 else grad.repeat_interleave(2)[::2]


@pytest.mark.parametrize("fused", EVERY_WAY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, None])
@pytest.mark.parametrize("second_moment", ["gradient", "mix"])
def test_a_gradient_of_another_dtype_or_other_strides_is_read_by_its_values(fused, dtype, second_moment):
    one, other = (make(fused, (8, 8), second_moment=second_moment) for _ in range(2))
    for _ in range(5):
        for p, q in zip(one[1:], other[1:]):
            p.grad = torch.randn_like(p).to(dtype or torch.float32).float()
            q.grad_dtype = dtype or torch.float32
            q.grad = other_strides(p.grad) if dtype is None else p.grad.to(dtype)
        one[0].step()
        other[0].step()
    assert_same_state(state_of(one[0]), state_of(other[0]))


@pytest.mark.parametrize("fused", EVERY_WAY)
@pytest.mark.parametrize("change", [None, torch.Tensor.bfloat16, lambda data: data[:2].clone(), other_strides])
def test_what_changed_after_the_optimizer_was_built_is_refused_before_any_weight_changes(fused, change):
    optimizer, sparse, dense = make(fused)
    step(optimizer)
    changed, other = (dense, sparse) if change is None else (sparse, dense)
    before = other.detach().clone(), copy.deepcopy(optimizer.state[other])
    if change is None:
        changed.grad = torch.ones_like(changed).to_sparse()
    else:
        changed.grad, changed.data = None, change(changed.data)
        changed.grad = torch.ones_like(changed)
    with refusal("a parameter is"):
        optimizer.step()
    assert torch.equal(other, before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[other].items())


# ---- parameters


@pytest.mark.parametrize(
    ("weight", "message", "is_sparse"),
    [
        (torch.randn(4, 8).half(), "float16", False),
        (torch.randn(4, 8, dtype=torch.complex64), "complex64", False),
        (torch.randn(8, 4).t(), r"strides \(1, 4\)", False),
        (torch.randn(1, 8).expand(4, 8), r"strides \(0, 1\)", True),
        (torch.randn(4, 8).to_sparse(), "sparse_coo", True),
        (torch.randn(64), "FSDP2", True),
        (torch.randn(2, 2, 4, 8), r"not \(out, in\)", True),
        (torch.randn(4, 8).bfloat16(), "bfloat16", True),
        (torch.randn(4, 6), "6 does not divide", True),
        (torch.full((4, 8), float("nan")), "NaN", True),
    ],
)
def test_a_parameter_that_cannot_be_stepped_or_be_sparse_is_refused(weight, message, is_sparse):
    with pytest.raises(InputError, match=message):
        AdamS([{"params": [nn.Parameter(weight)], "sparse": is_sparse}], total_steps=1)


def test_a_sparse_weight_needs_a_gradient():
    with pytest.raises(InputError, match="no gradient"):
        AdamS(sparse_group(nn.Parameter(torch.randn(4, 8))), total_steps=10).step()


@pytest.mark.parametrize("fused", EVERY_WAY)
@pytest.mark.parametrize("numel", [8, 200_000])  # many small parameters are updated as one
@pytest.mark.parametrize("on_host", [False, True])
def test_moments_of_bf16_weights_are_those_of_fp32_weights(fused, numel, on_host):
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        dense = [nn.Parameter(torch.zeros(numel, dtype=dtype)) for _ in range(2)]
        sparse = nn.Parameter(torch.ones(1, 4))
        groups = [*sparse_group(sparse), {"params": dense, "sparse": False}]
        optimizer = AdamS(
            groups,
            lr=1e-3,
            total_steps=1500,
            fused=fused if dtype is torch.float32 else fused and None,
            moments_on_host=on_host,
        )
        for _ in range(30):
            for param in (sparse, *dense):
                param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.wait_for_moments()
        made[dtype] = [optimizer.state[param]["exp_avg_sq"] for param in dense]
    for wide, narrow in zip(*made.values()):
        assert narrow.dtype == torch.float32
        assert torch.allclose(wide, narrow)


# ---- options

BAD = {
    "lr": [-1.0, math.nan, math.inf, 10**400, None, torch.tensor(math.nan), torch.ones(2)],
    "betas": [(0.9,), (0.9, 1.0), (math.nan, 0.9), 0.9],
    "eps": [-1e-8],
    "weight_decay": [-1],
    "lam": [-1.0, math.inf],
    "total_steps": [0, -1, math.inf, "9"],
    "mask_interval": [-1, math.inf, 1.5],
    "decay": ["l2", None, []],
    "decay_end": [0, 1.1, math.nan],
    "second_moment": ["adam"],
    "moments": ["fp16"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_option_out_of_range_is_refused_by_name_for_all_groups_and_for_one(name, value):
    def group(**options):
        return [{"params": [nn.Parameter(torch.randn(4, 8))], "sparse": True, **options}]

    for groups, options in ((group(), {name: value}), (group(**{name: value}), {})):
        with refusal(f"AdamS: {name} = "):
            AdamS(groups, **{"total_steps": 10, **options})
    optimizer = AdamS(group(), total_steps=10)
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises(InputError, match=name):
        optimizer.load_state_dict(saved)
    assert not any(group[name] is value for group in optimizer.param_groups)


@pytest.mark.parametrize("sparse", ["no", 1, None, torch.tensor(True)])
def test_sparse_is_true_or_false(sparse):
    with pytest.raises(InputError, match=r"sparse = .* True or False"):
        AdamS([{"params": [nn.Parameter(torch.randn(4, 8))], "sparse": sparse}], total_steps=10)


def test_a_sparse_group_that_joins_late_plans_its_decay_over_the_steps_that_are_left():
    optimizer, *_ = make(total_steps=20, decay_end=1.0)
    step(optimizer, times=5)
    late = nn.Parameter(torch.randn(4, 8))
    before = state_of(optimizer)
    for group in ({"sparse": True}, {"sparse": True, "total_steps": 15, "pattern": "3:5"}, {"lr": math.nan}):
        with pytest.raises(InputError, match=r"after 5 steps|divide|lr"):
            optimizer.add_param_group({"params": [late], **group})
        assert_same_state(before, state_of(optimizer))
        assert late not in optimizer.state
    optimizer.add_param_group({"params": [late], "sparse": True, "total_steps": 15})
    step(optimizer, times=15)
    for param in optimizer.sparse_params():
        assert param.count_nonzero() == param.numel() / 2


@pytest.mark.parametrize("decay", ["proportional", "additive"])
def test_a_second_moment_without_lam_is_refused_where_the_decay_adds_it(decay):
    with pytest.raises(InputError, match=f"second_moment = 'gradient' .*{decay}"):
        AdamS(sparse_group(nn.Parameter(torch.randn(4, 8))), total_steps=9, decay=decay, second_moment="gradient")


def test_sparsity_has_to_be_asked_for_or_declined():
    model = nn.Linear(8, 4)
    for params in (model.parameters(), model.named_parameters(), [{"params": [model.bias]}]):
        with pytest.raises(InputError, match="sparse_param_groups"):
            AdamS(params, total_steps=10)
    assert not list(AdamS([{"params": model.parameters(), "sparse": False}], total_steps=10).sparse_params())


# ---- which way it runs


@needs_kernels
def test_by_default_it_runs_the_kernels_where_they_can(monkeypatch):
    calls = []
    update = native.update_
    monkeypatch.setattr(native, "update_", lambda batch, *rest: (calls.extend(batch.weights), update(batch, *rest)))
    single, double = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8, dtype=torch.float64))
    optimizer = AdamS([{"params": [single, double], "sparse": True}], total_steps=10)
    step(optimizer)
    assert [w.data_ptr() for w in calls] == [single.data_ptr()]
    assert int(optimizer.state[double]["step"]) == 1


def test_without_kernels_the_default_runs_torch(monkeypatch):
    expected, other = make(fused=False)[0], make()[0]
    monkeypatch.setattr(native, "kernels", lambda: None)
    step(expected, other, times=3)
    assert_same_state(state_of(expected), state_of(other))


# ---- copies


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_state_dict(pair):
    optimizer, params = pair
    copied = [nn.Parameter(param.detach().clone()) for param in params]
    of_group = [{**group, "params": [param]} for group, param in zip(optimizer.param_groups, copied)]
    other = AdamS(of_group, total_steps=20, fused=optimizer._fused)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, copied


@pytest.mark.parametrize("fused", EVERY_WAY)
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_state_dict])
def test_a_copy_continues_bit_for_bit_and_apart(through, moments, fused):
    shape = (64, 128)
    optimizer, sparse, dense = make(fused, shape, moments=moments, lr=0.5, mask_interval=1, decay_end=1.0)
    step(optimizer, times=3)
    optimizer.set_mask(sparse, ~nm_mask(sparse))
    copied, params = through((optimizer, [sparse, dense]))
    assert copied._fused == fused
    assert copied.flips() == (0 if through is through_state_dict else optimizer.flips())
    assert optimizer.flips() > 0
    assert [p for group in copied.param_groups for p in group["params"]] == params
    assert torch.equal(copied.mask(params[0]), optimizer.mask(sparse))
    before = state_of(optimizer)
    step(copied, seed=9)
    assert_same_state(before, state_of(optimizer))
    step(optimizer, seed=9)
    assert_same_state(state_of(optimizer), state_of(copied))


# ---- masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 8, dtype=torch.bool), "not 2:4"),
        (torch.zeros(4, 4, dtype=torch.bool), "does not fit"),
        (torch.zeros(4, 8), "does not fit"),
        (torch.zeros(8, 4, dtype=torch.bool), "does not fit"),
    ],
)
def test_a_mask_that_is_not_of_the_pattern_is_refused(mask, message):
    optimizer, sparse, _ = make()
    before = optimizer.mask(sparse)
    with pytest.raises(InputError, match=message):
        optimizer.set_mask(sparse, mask)
    assert torch.equal(optimizer.mask(sparse), before)
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    weights = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(InputError, match=message):
        prune_(model, masks={model[0].weight: nm_mask(model[0].weight), model[1].weight: mask})
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, weights))


# ---- saved state


def misfits(saved):
    """Changes of a saved state that no steps make: (the entry of the first parameter, its value), None for none."""
    state = saved["state"][0]
    scaled = "_scale" if "exp_avg_scale" in state else ""
    for key, bad in (("exp_avg", math.nan), ("exp_avg_sq", -1e-9), ("exp_avg_sq", math.inf)):
        value = state[key + scaled].clone()
        value[1, 0] = bad
        yield key + scaled, value
    moment, mask = state["exp_avg"], state["mask"]
    yield from (("exp_avg", moment[:32]), ("exp_avg", moment.double()), ("exp_avg", None), ("more", torch.ones(1)))
    yield from (("mask", mask.bool()), ("mask", mask[:, :8]), ("mask", torch.full_like(mask, 255)), ("mask", None))
    yield from (("step", torch.tensor(math.nan)), ("step", -1))


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_saved_state_that_does_not_fit_is_refused_and_nothing_changes(moments):
    optimizer, _, _ = make(None, (64, 128), moments=moments)
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer, seed=1)
    before = state_of(optimizer)
    broken = [{**saved, "state": {**saved["state"], 0: saved["state"][0] | dict([pair])}} for pair in misfits(saved)]
    broken.append({**saved, "state": {1: saved["state"][1]}})
    for change in ({"params": None}, {"pattern": "1:4"}, {"total_steps": 21}, {"decay": "additive"}, {"sparse": None}):
        broken.append({**saved, "param_groups": [saved["param_groups"][0] | change, *saved["param_groups"][1:]]})
    for state in broken:
        with refusal(r"saved|a mask of|sparse"):
            optimizer.load_state_dict(state)
        assert_same_state(before, state_of(optimizer))


# ---- moments in 8 bits: the codes are those of bitsandbytes, the steps stay close to fp32, and a resume is exact


SHAPES = [(64, 128), (128, 64), (32, 192), (64, 20), (64,)]  # the last two are kept in fp32


def optimizer_of(params, moments, *, fused=False):
    groups = [{"params": params[:2], "sparse": True}, {"params": params[2:]}]
    return AdamS(groups, lr=1e-2, total_steps=20, mask_interval=5, moments=moments, fused=fused)


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(code_values(signed), functional.create_dynamic_map(signed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_to_its_value(signed):
    every = torch.arange(256, dtype=torch.uint8)[None]
    values = from_codes(every, torch.ones(1), signed)
    assert (values.diff() > 0).all()
    codes, scale = torch.zeros_like(every), torch.zeros(1)
    to_codes_(values, codes, scale, signed)
    assert torch.equal(codes, every)


def test_steps_stay_close_to_those_with_fp32_moments():
    exact, coarse = parameters(), parameters()
    start = parameters()
    one, other = optimizer_of(exact, "fp32"), optimizer_of(coarse, "8bit")
    step(one, other, times=20)
    for a, b, first in zip(exact, coarse, start):
        assert (a - b).norm() <= 0.05 * (a - first).norm()
        torch.testing.assert_close(one.momentum(a), other.momentum(b), rtol=0.05, atol=0.05)
    assert torch.equal(other.mask(coarse[0]), coarse[0] != 0)


@pytest.mark.parametrize("way", FUSED)
def test_fused_steps_with_8_bits_equal_the_plain_ones(way, monkeypatch):
    """`compiled` is the path of a GPU: there the masks are words."""
    plain, fused = parameters(), parameters()
    one, other = optimizer_of(plain, "8bit"), optimizer_of(fused, "8bit", fused=way == "native")
    if way == "compiled":
        through_torch_compile(other, monkeypatch)
    step(one, other, times=20)
    for a, b in zip(plain, fused):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for name in ("exp_avg", "exp_avg_sq"):
            if one.state[a][name].dtype == torch.uint8:  # a tie may go either way
                far = (one.state[a][name].int() - other.state[b][name].int()).abs()
                assert far.max() <= 1
                assert far.float().mean() < 1e-2
            else:
                torch.testing.assert_close(one.state[a][name], other.state[b][name], rtol=1e-2, atol=1e-7)


def test_a_mask_is_only_for_a_sparse_parameter():
    """The weight of a layer with weight scaling is a product, which no optimizer knows."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
    layer = model["layers"][0]
    castlm.add_weight_scaling(model)
    optimizer = AdamS(castlm.sparse_param_groups(model), total_steps=10)
    mask = nm_mask(layer.weight.flip(1))
    for param in (layer.weight, layer.bias):
        with pytest.raises(InputError, match="weight_parameter"):
            optimizer.set_mask(param, mask)
    optimizer.set_mask(castlm.weight_parameter(layer), mask)
    assert torch.equal(optimizer.mask(castlm.weight_parameter(layer)), mask)
