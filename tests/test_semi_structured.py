"""`to_semi_structured_` against a stub on CPU, and on CUDA where there is one."""

import copy

import pytest
import torch
from torch import nn

from castlm.core.errors import InputError
from castlm.core.sparsify import prune_, sparse_linears
from castlm.packed.semi_structured import Cusparselt, to_semi_structured_
from tests.stub_backend import StubBackend, StubLinear
from tests.tiny import tiny_model

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels need a CUDA device, none is here")


@pytest.fixture
def pruned():
    model = tiny_model("llama")
    prune_(model)
    return model


def by_name(table):
    return lambda name, shape, tokens: table[name]


def test_faster_sparse_layers_replace_the_dense_ones_and_the_output_stays(pruned):
    ids = torch.arange(12).unsqueeze(0)
    expected = pruned(ids).logits
    choices = to_semi_structured_(pruned, 8, backend=StubBackend(by_name({"dense": 3, "2:4": 1})))
    layers, _ = sparse_linears(pruned)
    assert [choice.name for choice in choices] == list(layers)
    assert {choice.variant for choice in choices} == {"2:4"}
    assert all(isinstance(layer, StubLinear) for layer in layers.values())
    assert torch.equal(pruned(ids).logits, expected)
    assert type(pruned.lm_head) is nn.Linear


def test_each_shape_is_decided_by_itself_and_raced_once_at_the_stated_tokens(pruned):
    def seconds(name, shape, tokens):
        wide = shape == (64, 32)
        return {"dense": 2.0, "2:4": 1.0 if wide else 1.98}[name]  # 1 % is not worth it

    backend = StubBackend(seconds)
    choices = to_semi_structured_(pruned, 8, backend=backend)
    assert {choice.shape: choice.variant for choice in choices} == {
        (32, 32): "dense",
        (16, 32): "dense",
        (64, 32): "2:4",
        (32, 64): "dense",
    }
    assert sorted(backend.races) == sorted([((32, 32), 8), ((16, 32), 8), ((64, 32), 8), ((32, 64), 8)])


def test_a_layer_that_is_not_2_4_or_cannot_be_converted_stays_dense_with_its_reason(pruned):
    with torch.no_grad():
        pruned.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    backend = StubBackend(by_name({"dense": 3, "2:4": 1}), refuse={(32, 64): "too narrow"})
    choices = {choice.name: choice for choice in to_semi_structured_(pruned, 8, backend=backend)}
    assert choices["model.layers.0.mlp.up_proj"].reason == "its weight is not 2:4"
    assert choices["model.layers.0.mlp.down_proj"].reason == "too narrow"
    assert choices["model.layers.0.mlp.down_proj"].seconds == {}
    assert choices["model.layers.0.mlp.gate_proj"].variant == "2:4"


@pytest.mark.parametrize("failing", ["run", "search"])
def test_a_library_that_fails_is_named_and_the_layers_stay_dense(failing, pruned):
    backend = StubBackend(by_name({"dense": 2.0, "2:4": 1.0}), failing=failing)
    choices = to_semi_structured_(pruned, tokens=16, backend=backend)
    assert {choice.variant for choice in choices} == {"dense"}
    assert {choice.reason for choice in choices} == {"2:4 failed: CUSPARSE_STATUS_NOT_SUPPORTED"}
    assert not any(isinstance(layer, StubLinear) for layer in pruned.modules())


def test_a_sparse_layer_that_computes_something_else_is_refused(pruned):
    before = copy.deepcopy(pruned.state_dict())
    backend = StubBackend(by_name({"dense": 3, "2:4": 1}), wrong=True)
    choices = to_semi_structured_(pruned, 8, backend=backend)
    assert all(choice.variant == "dense" and "computes something else" in choice.reason for choice in choices)
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


def test_bad_input_is_named(pruned):
    with pytest.raises(InputError, match=r"the model is on cpu: .* model.cuda"):
        to_semi_structured_(pruned, 8)


def test_cusparselt_names_the_shapes_and_dtypes_that_it_does_not_take():
    assert "convert the model to bf16" in Cusparselt.why_not(nn.Linear(64, 64))
    assert "30 x 64 does not divide" in Cusparselt.why_not(nn.Linear(64, 30, dtype=torch.bfloat16))
    assert Cusparselt.why_not(nn.Linear(64, 64, dtype=torch.bfloat16)) is None


@NEEDS_CUDA
def test_on_cuda_no_layer_is_slower_and_the_output_agrees():
    model = nn.ModuleDict({"0": nn.Linear(4096, 11008, bias=False, dtype=torch.bfloat16)}).cuda()
    prune_(model)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    expected = model["0"](x)
    (choice,) = to_semi_structured_(model, 4096)
    assert not choice.reason
    assert choice.seconds[choice.variant] <= choice.seconds["dense"]
    assert (model["0"](x) - expected).float().norm() <= 0.02 * expected.float().norm()
