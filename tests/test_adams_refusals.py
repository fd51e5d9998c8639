"""AdamS refuses a parameter that it cannot step before anything changes, or converts it exactly."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from castlm.core import native
from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.nm import NM, nm_mask, pack_mask
from castlm.core.sparsify import prune_, sparse_param_groups
from tests.fused import needs_kernels
from tests.tiny import tiny_model

WAYS = [False, pytest.param(True, marks=needs_kernels), None]


def make(fused=None, shape=(4, 8), **options):
    torch.manual_seed(0)
    sparse, dense = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(5))
    groups = [{"params": [sparse], "sparse": True}, {"params": [dense]}]
    return AdamS(groups, **{"lr": 1e-2, "total_steps": 20, "mask_interval": 2, **options}, fused=fused), sparse, dense


def give_grads(*params, seed=0):
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn_like(param)


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


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("second_moment", ["gradient", "mix"])
def test_a_gradient_of_another_dtype_is_converted_to_that_of_the_parameter(fused, dtype, second_moment):
    one, other = make(fused, second_moment=second_moment), make(fused, second_moment=second_moment)
    for seed in range(5):
        give_grads(*one[1:], seed=seed)
        for p, q in zip(one[1:], other[1:]):
            p.grad = p.grad.to(dtype).float()
            q.grad_dtype = dtype
            q.grad = p.grad.to(dtype)
        one[0].step()
        other[0].step()
    assert_same_state(state_of(one[0]), state_of(other[0]))


@pytest.mark.parametrize("fused", WAYS)
def test_a_gradient_of_other_strides_is_read_by_its_values(fused):
    one, other = make(fused, (8, 8)), make(fused, (8, 8))
    for seed in range(3):
        give_grads(*one[1:], seed=seed)
        other[1].grad = one[1].grad.t().contiguous().t()
        other[2].grad = one[2].grad.repeat_interleave(2)[::2]
        one[0].step()
        other[0].step()
    assert_same_state(state_of(one[0]), state_of(other[0]))


def another_grad(param, grad):
    """Sets a gradient that torch's own check would refuse, as custom autograd code and hooks can leave it behind."""
    param.grad = None
    data, param.data = param.data, grad.detach().clone()
    param.grad = grad
    param.data = data


def sparse_grad(param):
    return torch.ones_like(param).to_sparse()


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize(
    ("of", "change"),
    [
        (1, lambda p: another_grad(p, torch.ones(2, 8))),
        (1, lambda p: another_grad(p, torch.ones(40))),
        (2, lambda p: another_grad(p, torch.ones(40))),
        (2, lambda p: setattr(p, "grad", sparse_grad(p))),
        (1, lambda p: setattr(p, "data", p.data.t().contiguous().t())),
        (1, lambda p: (setattr(p, "grad", None), setattr(p, "data", p.data.bfloat16()), give_grads(p))),
        (1, lambda p: (setattr(p, "grad", None), setattr(p, "data", p.data.double()), give_grads(p))),
        (1, lambda p: (setattr(p, "grad", None), setattr(p, "data", p.data[:2].clone()), give_grads(p))),
    ],
)
def test_what_changed_after_the_optimizer_was_built_is_refused_before_any_weight_changes(fused, of, change):
    given = make(fused)
    optimizer, other = given[0], given[3 - of]
    give_grads(*given[1:])
    optimizer.step()
    before = other.detach().clone(), copy.deepcopy(optimizer.state[other])
    give_grads(*given[1:])
    change(given[of])
    with pytest.raises(InputError, match="a parameter is") as raised:
        optimizer.step()
    assert "\n" not in str(raised.value)
    assert torch.equal(other, before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[other].items())


# ---- parameters


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(4, 8).half(), "float16"),
        (torch.randn(4, 8, dtype=torch.complex64), "complex64"),
        (torch.randn(8, 4).t(), r"strides \(1, 4\)"),
        (torch.randn(1, 8).expand(4, 8), r"strides \(0, 1\)"),
        (torch.randn(4, 8).to_sparse(), "sparse_coo"),
    ],
)
def test_a_parameter_that_cannot_be_stepped_is_refused(weight, message, is_sparse):
    with pytest.raises(InputError, match=message):
        AdamS([{"params": [nn.Parameter(weight)], "sparse": is_sparse}], total_steps=1)


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_empty_and_zero_dimensional_parameters_are_stepped_over(fused, moments):
    sparse = [nn.Parameter(torch.randn(shape)) for shape in ((0, 8), (4, 0), (4, 8))]
    dense = [nn.Parameter(torch.randn(shape)) for shape in ((0,), (), (3, 0, 2), (5,))]
    groups = [{"params": sparse, "sparse": True}, {"params": dense}]
    optimizer = AdamS(groups, total_steps=10, mask_interval=1, moments=moments, fused=fused)
    for seed in range(3):
        give_grads(*sparse, *dense, seed=seed)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (*sparse, *dense)] == [3] * 7
    assert optimizer.mask(sparse[2]).sum() == 16
    restored = copy.deepcopy(optimizer)
    restored.load_state_dict(optimizer.state_dict())


# ---- options

BAD = {
    "lr": [-1.0, math.nan, math.inf],
    "betas": [(0.9,), (0.9, 1.0), (math.nan, 0.9)],
    "eps": [-1e-8],
    "weight_decay": [-1],
    "lam": [-1.0, math.inf],
    "total_steps": [0, -1],
    "mask_interval": [-1],
    "decay": ["l2", None],
    "decay_end": [0, 1.1, math.nan],
    "second_moment": ["adam"],
    "moments": ["fp16"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_option_out_of_range_is_refused_by_name_for_all_groups_and_for_one(name, value):
    def group(**options):
        return [{"params": [nn.Parameter(torch.randn(4, 8))], "sparse": True, **options}]

    for groups, options in ((group(), {name: value}), (group(**{name: value}), {})):
        with pytest.raises(InputError, match=f"AdamS: {name} = ") as raised:
            AdamS(groups, **{"total_steps": 10, **options})
        assert "\n" not in str(raised.value)


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
    monkeypatch.setattr(native, "update_", lambda weights, *rest: (calls.extend(weights), update(weights, *rest)))
    single, double = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8, dtype=torch.float64))
    optimizer = AdamS([{"params": [single, double], "sparse": True}], total_steps=10)
    give_grads(single, double)
    optimizer.step()
    assert [w.data_ptr() for w in calls] == [single.data_ptr()]
    assert int(optimizer.state[double]["step"]) == 1


def test_without_kernels_the_default_runs_torch(monkeypatch):
    expected, other = make(fused=False), make()
    monkeypatch.setattr(native, "kernels", lambda: None)
    for seed in range(3):
        for given in (expected, other):
            give_grads(*given[1:], seed=seed)
            given[0].step()
    assert_same_state(state_of(expected[0]), state_of(other[0]))


@needs_kernels
def test_fused_is_refused_for_tensors_whose_memory_is_elsewhere():
    class Elsewhere(torch.Tensor):
        """As a quantized tensor."""

    weight = nn.Parameter(torch.randn(4, 8).as_subclass(Elsewhere))
    with pytest.raises(InputError, match="Elsewhere"):
        AdamS([{"params": [weight], "sparse": False}], total_steps=1, fused=True)


# ---- copies


def through_pickle(pair):
    buffer = io.BytesIO()
    pickle.dump(pair, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle])
def test_a_copy_goes_on_bit_for_bit_and_apart(through, moments, fused):
    shape = (64, 128)
    optimizer, sparse, dense = make(fused, shape, moments=moments, lr=0.5, mask_interval=1, decay_end=1.0)
    for seed in range(3):
        give_grads(sparse, dense, seed=seed)
        optimizer.step()
    optimizer.set_mask(sparse, ~nm_mask(sparse))
    copied, params = through((optimizer, [sparse, dense]))
    assert copied._fused == fused
    assert copied.flips() == optimizer.flips() > 0
    assert [p for group in copied.param_groups for p in group["params"]] == params
    assert torch.equal(copied.mask(params[0]), optimizer.mask(sparse))
    before = state_of(optimizer)
    give_grads(*params, seed=9)
    copied.step()
    assert_same_state(before, state_of(optimizer))
    give_grads(sparse, dense, seed=9)
    optimizer.step()
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


def test_a_nan_leaves_every_layer_as_it_was():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="NaN"):
        prune_(model)
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before.values(), model.state_dict().values())
    )


# ---- saved state


def corrupted(saved, key, value):
    saved["state"][0][key] = value
    return saved


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize(
    "break_",
    [
        lambda s: corrupted(s, "exp_avg", s["state"][0]["exp_avg"][:32]),
        lambda s: corrupted(s, "exp_avg", s["state"][0]["exp_avg"].double()),
        lambda s: corrupted(s, "exp_avg_sq", s["state"][0]["exp_avg_sq"].t()[:, :5]),
        lambda s: corrupted(s, "mask", s["state"][0]["mask"].bool()),
        lambda s: corrupted(s, "mask", s["state"][0]["mask"][:, :8]),
        lambda s: corrupted(s, "mask", torch.full_like(s["state"][0]["mask"], 255)),
        lambda s: corrupted(s, "more", torch.ones(1)),
        lambda s: s["state"][0].pop("mask") is None or s,
        lambda s: s["state"].pop(0) is None or s,
        lambda s: s["param_groups"].pop() is None or s,
        lambda s: s["param_groups"][0]["params"].append(7) or s,
        lambda s: s["param_groups"][0].update(pattern="1:4") or s,
        lambda s: s["param_groups"][0].pop("sparse") is None or s,
    ],
)
def test_a_saved_state_that_does_not_fit_is_refused_and_nothing_changes(break_, moments):
    optimizer, sparse, dense = make(None, (64, 128), moments=moments)
    give_grads(sparse, dense)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    give_grads(sparse, dense, seed=1)
    optimizer.step()
    before = state_of(optimizer)
    with pytest.raises(InputError) as raised:
        optimizer.load_state_dict(break_(saved))
    assert "\n" not in str(raised.value)
    assert_same_state(before, state_of(optimizer))


def test_state_of_half_parameters_resumes_bit_for_bit():
    weight = nn.Parameter(torch.randn(64, 128, dtype=torch.bfloat16))
    optimizer = AdamS([{"params": [weight], "sparse": False}], lr=1e-2, total_steps=10, moments="8bit")
    give_grads(weight)
    optimizer.step()
    other = AdamS([{"params": [weight], "sparse": False}], lr=1e-2, total_steps=10, moments="8bit")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(state_of(optimizer), state_of(other))


def test_a_state_dict_needs_no_class_to_be_read():
    optimizer, sparse, dense = make()
    give_grads(sparse, dense)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    make()[0].load_state_dict(torch.load(buffer, weights_only=True))


# ---- the entries of C++


def update_arguments():
    weight, grad = torch.randn(4, 8), torch.randn(4, 8)
    moments = {"exp_avg": [torch.zeros(4, 8)], "exp_avg_sq": [torch.zeros(4, 8)]}
    return {
        "weights": [weight],
        "grads": [grad],
        "moments": moments,
        "masks": [pack_mask(nm_mask(weight))],
        "hyper": [0.0, 1.0, 0.1, 0.1, 0.0, 1.0, 1.0],
        "second_moment": "mix",
    }


WRONG = {
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:-1].clone(),
    "another dtype": lambda t: t.to(torch.int16),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "on another device": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
    "a subclass": lambda t: t.as_subclass(type("Sub", (torch.Tensor,), {})),
}


@needs_kernels
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("which", ["weights", "grads", "masks", "exp_avg", "exp_avg_sq"])
def test_the_update_kernel_gets_no_tensor_that_it_would_misread(which, wrong):
    arguments = update_arguments()
    native.update_(**arguments)
    holder = arguments["moments"] if which.startswith("exp") else arguments
    holder[which] = [WRONG[wrong](holder[which][0])]
    with pytest.raises(InputError, match="kernels take"):
        native.update_(**arguments)


@needs_kernels
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("which", [0, 1])
def test_the_refresh_kernel_gets_no_tensor_that_it_would_misread(which, wrong):
    weight = torch.randn(4, 8)
    arguments = [weight, pack_mask(nm_mask(weight))]
    arguments[which] = WRONG[wrong](arguments[which])
    with pytest.raises(InputError):
        native.refresh_(*([argument] for argument in arguments), 2, 4)


def test_groups_of_a_model_name_their_pattern():
    groups = sparse_param_groups(tiny_model("llama"), "1:4")
    optimizer = AdamS(groups, total_steps=10)
    assert optimizer.param_groups[0]["pattern"] == NM(1, 4)
    assert optimizer.state_dict()["param_groups"][0]["pattern"] == "1:4"
