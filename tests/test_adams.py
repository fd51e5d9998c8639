"""AdamS against the paper's equations, against torch's Adam, and against what would break it without a word."""

import copy

import pytest
import torch
from torch import nn

from castlm.core import native, update
from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM, nm_mask, unpack_mask
from tests.fused import needs_kernels, through_torch_compile
from tests.reference import ReferenceAdamS
from tests.slow import slow

HYPER = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "lam": 0.3, "total_steps": 50}


def sparse_group(*params, n=2, m=4):
    return [{"params": list(params), "sparse": True, "pattern": f"{n}:{m}"}]


def dense_group(*params):
    return [{"params": list(params), "sparse": False}]


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()


RULES = [*((decay, "mix") for decay in DECAYS), ("horizon", "gradient"), ("none", "gradient")]
WAYS = [False, pytest.param(None, marks=needs_kernels)]  # fused: torch operators, and the default on a CPU


@pytest.mark.parametrize(("decay", "second_moment"), RULES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_fifty_steps_equal_the_equations(decay, second_moment, n, m):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 16))
    rest = {"mask_interval": 7, "decay": decay, "decay_end": 0.6, "second_moment": second_moment}
    reference = ReferenceAdamS(weight.tolist(), n, m, **HYPER, **rest)
    optimizer = AdamS(sparse_group(weight, n=n, m=m), **HYPER, **rest, fused=False)
    for t in range(50):
        grad = torch.randn(6, 16)
        reference.step(grad.tolist())
        run(optimizer, weight, [grad])
        assert optimizer.mask(weight).tolist() == reference.mask, t
        expected = torch.tensor(reference.w)
        assert (weight - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item()), t
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor(reference.mu), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], torch.tensor(reference.v), rtol=1e-5, atol=1e-8)


def test_fp64_steps_equal_the_equations_tightly():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 16, dtype=torch.float64))
    rest = {"mask_interval": 10, "decay": "proportional", "decay_end": 0.5, "second_moment": "mix"}
    reference = ReferenceAdamS(weight.tolist(), 2, 4, **HYPER, **rest)
    optimizer = AdamS(sparse_group(weight), **HYPER, **rest)
    for _ in range(50):
        grad = torch.randn(6, 16, dtype=torch.float64)
        reference.step(grad.tolist())
        run(optimizer, weight, [grad])
    torch.testing.assert_close(weight.data, torch.tensor(reference.w, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_dense_group_is_torch_adam():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    theirs = copy.deepcopy(ours)
    optimizer = AdamS(dense_group(*ours), lr=1e-2, betas=(0.9, 0.99), total_steps=30)
    adam = torch.optim.Adam(theirs, lr=1e-2, betas=(0.9, 0.99))
    for _ in range(30):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        adam.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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
    for _ in range(30):
        for a, b in zip([*ours, *sparse], [*theirs, *plain]):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for each in (optimizer, without, adamw):
            each.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(*sparse, *plain)


def test_alpha_zero_is_adam_with_v_from_mu():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 8))
    start, b1, b2 = weight.detach().clone(), 0.9, 0.95
    optimizer = AdamS(sparse_group(weight), lr=1e-2, betas=(b1, b2), total_steps=10, decay="none", second_moment="mix")
    grads = [torch.randn(4, 8) for _ in range(10)]
    run(optimizer, weight, grads)
    w, mu, v = start, torch.zeros(4, 8), torch.zeros(4, 8)
    for t, g in enumerate(grads):
        mu = torch.lerp(g, mu, b1)
        v = torch.lerp(mu.square(), v, b2)
        w = w - 1e-2 * (mu / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(weight.data, w, rtol=1e-5, atol=1e-6)


def test_kept_weights_of_the_gradient_rule_are_torch_adam():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 8))
    theirs = copy.deepcopy(weight)
    optimizer = AdamS(sparse_group(weight), lr=1e-3, total_steps=10, mask_interval=100)
    adam = torch.optim.Adam([theirs], lr=1e-3)
    for grad in torch.randn(10, 4, 8):
        run(optimizer, weight, [grad])
        run(adam, theirs, [grad])
    kept = optimizer.mask(weight)
    torch.testing.assert_close(weight[kept], theirs[kept], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weight[~kept], theirs[~kept], atol=1e-2)


@pytest.mark.parametrize("lam", [0.0, 10.0])
def test_horizon_reaches_exact_zero_at_decay_end_and_stays(lam):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 16))
    optimizer = AdamS(sparse_group(weight), lr=1e-4, lam=lam, total_steps=40, decay_end=0.5)
    for t in range(40):
        run(optimizer, weight, [torch.randn(8, 16)])
        masked = weight.detach()[~optimizer.mask(weight)]
        assert (t >= 19) == bool((masked == 0).all())
    assert torch.equal(optimizer.mask(weight), nm_mask(weight))


@pytest.mark.parametrize("way", [pytest.param("native", marks=needs_kernels), slow("compiled")])
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
    for _ in range(20):
        for a, b in zip(plain, fused):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert optimizers[0].flips() == optimizers[1].flips()
        for a, b in zip(plain[:6], fused):
            assert torch.equal(optimizers[0].mask(a), optimizers[1].mask(b))
    for a, b in zip(plain, fused):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    fused[2].data[0, 0] = fused[0].data[5, 15] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        optimizers[1].refresh_masks(optimizers[1].param_groups[0])


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("decay", "second_moment"), RULES)
@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 40), (1, 4, 12), (4, 8, 48), (2, 3, 9)])
def test_kernels_equal_the_equations(decay, second_moment, n, m, width, num_threads):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, width))
    rest = {"mask_interval": 7, "decay": decay, "decay_end": 0.6, "second_moment": second_moment}
    reference = ReferenceAdamS(weight.tolist(), n, m, **HYPER, **rest)
    optimizer = AdamS(sparse_group(weight, n=n, m=m), **HYPER, **rest, fused=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    for t in range(20):
        grad = torch.randn(6, width)
        reference.step(grad.tolist())
        run(optimizer, weight, [grad])
        assert optimizer.mask(weight).tolist() == reference.mask, t
        expected = torch.tensor(reference.w)
        assert (weight - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item()), t
    torch.set_num_threads(threads_before)


@needs_kernels
def test_kernels_give_the_same_bits_on_any_number_of_threads():
    """Weights longer than what a thread takes at a time, with rows of whole bytes and without."""
    torch.manual_seed(0)
    start = [torch.randn(400, 1000), torch.randn(30_000, 12), torch.randn(3, 100_002), torch.randn(300_001)]
    grads = [torch.randn_like(weight) for weight in start]
    ended = []
    threads_before = torch.get_num_threads()
    for num_threads in (1, 4):
        torch.set_num_threads(num_threads)
        params = [nn.Parameter(weight.clone()) for weight in start]
        groups = [*sparse_group(*params[:2]), *sparse_group(params[2], n=1, m=3), {"params": params[3:]}]
        optimizer = AdamS(groups, lr=0.1, total_steps=3, mask_interval=1, fused=True)
        for _ in range(3):
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        ended.append([*params, *optimizer.masks().values(), torch.tensor(optimizer.flips())])
        for param, (n, m) in zip(params, ((2, 4), (2, 4), (1, 3))):
            assert torch.equal(optimizer.mask(param).view(-1, m).sum(1).unique(), torch.tensor([n]))
    torch.set_num_threads(threads_before)
    assert all(torch.equal(one, four) for one, four in zip(*ended))


@needs_kernels
def test_fused_takes_fp32_on_a_cpu_alone():
    with pytest.raises(InputError, match="float64"):
        AdamS(dense_group(nn.Parameter(torch.randn(4, dtype=torch.float64))), total_steps=1, fused=True)


def test_fused_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    with pytest.raises(InputError, match="were not compiled"):
        AdamS(dense_group(nn.Parameter(torch.randn(4))), total_steps=1, fused=True)


def test_a_mask_is_a_bit_a_weight_and_can_be_set():
    weight = nn.Parameter(torch.randn(6, 20))
    optimizer = AdamS(sparse_group(weight), total_steps=10, mask_interval=100)
    assert optimizer.state[weight]["mask"].shape == (6, 3)
    assert optimizer.state[weight]["mask"].dtype == torch.uint8
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    other = ~nm_mask(weight)  # of 2:4, its complement is 2:4 too
    optimizer.set_mask(weight, other)
    assert torch.equal(optimizer.mask(weight), other)
    assert torch.equal(optimizer.masks()[weight], other)


def test_a_mask_that_was_set_stays_without_an_interval():
    weight = nn.Parameter(torch.randn(4, 8))
    optimizer = AdamS(sparse_group(weight), total_steps=10, mask_interval=0)
    mask = ~nm_mask(weight)
    optimizer.set_mask(weight, mask)
    for _ in range(10):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert torch.equal(optimizer.mask(weight), mask)
    assert torch.equal(weight != 0, mask)


def test_state_dict_resumes_bitwise_with_an_old_mask():
    torch.manual_seed(0)
    grads = [torch.randn(4, 8) for _ in range(20)]
    weight = nn.Parameter(torch.randn(4, 8))
    other = nn.Parameter(weight.detach().clone())
    straight = AdamS(sparse_group(weight), lr=0.3, total_steps=20, decay_end=0.5)
    run(straight, weight, grads[:7])
    assert not torch.equal(straight.mask(weight), nm_mask(weight))  # the saved mask is not the mask of the weights
    saved, saved_weight = copy.deepcopy(straight.state_dict()), weight.detach().clone()
    run(straight, weight, grads[7:])
    resumed = AdamS(sparse_group(other), lr=0.3, total_steps=20, decay_end=0.5)
    other.data.copy_(saved_weight)
    resumed.load_state_dict(saved)
    assert resumed.state[other]["mask"].dtype == torch.uint8
    assert torch.equal(resumed.state[other]["mask"], saved["state"][0]["mask"])
    run(resumed, other, grads[7:])
    assert torch.equal(weight, other)


@pytest.mark.parametrize("change", [{"total_steps": 21}, {"decay": "additive"}, {"n": 1}, {"mask_interval": 5}])
def test_changed_run_is_refused_on_load(change):
    weight = nn.Parameter(torch.randn(4, 8))
    saved = AdamS(sparse_group(weight), total_steps=20).state_dict()
    pattern = {"n": change.pop("n", 2)}
    changed = AdamS(sparse_group(weight, **pattern), **{"total_steps": 20, **change})
    with pytest.raises(InputError, match="another run"):
        changed.load_state_dict(saved)


def test_torch_distributed_state_dict_takes_no_hidden_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(8, 4, bias=False)
    optimizer = AdamS(sparse_group(model.weight), total_steps=20)
    state = get_optimizer_state_dict(model, optimizer)
    assert int(state["state"]["weight"]["step"]) == 0
    assert torch.equal(unpack_mask(state["state"]["weight"]["mask"], 8), nm_mask(model.weight))


def test_schedulers_and_clipping():
    model = nn.Linear(8, 4)
    optimizer = AdamS([*sparse_group(model.weight), {"params": [model.bias]}], lr=0.1, total_steps=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        model(torch.randn(3, 8)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


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


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(64), "FSDP2"),
        (torch.randn(2, 2, 4, 8), "not \\(out, in\\)"),
        (torch.randn(4, 8).bfloat16(), "bfloat16"),
        (torch.randn(4, 8).half(), "float16"),
        (torch.randn(4, 6), "6 does not divide"),
        (torch.full((4, 8), float("nan")), "NaN"),
    ],
)
def test_what_would_break_it_raises(weight, message):
    with pytest.raises(InputError, match=message):
        AdamS(sparse_group(nn.Parameter(weight)), total_steps=10)


def test_missing_gradient_and_nan_weight_raise():
    weight = nn.Parameter(torch.randn(4, 8))
    optimizer = AdamS(sparse_group(weight), total_steps=10)
    with pytest.raises(InputError, match="no gradient"):
        optimizer.step()
    weight.data[0, 0] = float("nan")
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(InputError, match="NaN"):
        optimizer.step()
