"""Weight scaling: identity at the start, the layout of its groups, and an exact fold back to plain linears."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from castlm.core.errors import InputError
from castlm.core.scaling import UnfoldedWarning, add_weight_scaling, fold_weight_scaling
from castlm.core.sparsify import weight_parameter
from tests.slow import slow_but
from tests.tiny import FAMILIES, tiny_model

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("family", slow_but(("llama", "gpt2"), FAMILIES))
def test_folded_model_gives_the_unfolded_logits(family):
    from castlm.models.architecture import linearize_conv1d_

    model = tiny_model(family)
    linearize_conv1d_(model)
    plain = model(IDS).logits
    names = set(model.state_dict())
    add_weight_scaling(model)
    assert torch.equal(model(IDS).logits, plain)
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"):
            parameter.data.uniform_(0.5, 1.5)
    unfolded = model(IDS).logits
    assert not torch.allclose(unfolded, plain, atol=1e-3)
    fold_weight_scaling(model)
    torch.testing.assert_close(model(IDS).logits, unfolded, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_a_factor_scales_its_row_and_block_of_columns():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 3)])})
    original = model["layers"][0].weight.detach().clone()
    add_weight_scaling(model, groups=2)
    weight_parameter(model["layers"][0])
    model.get_parameter("layers.0.parametrizations.weight.0.scale").data = torch.tensor([[2.0, 3], [1, 1], [1, 5]])
    weight = model["layers"][0].weight
    expected = original.clone()
    expected[0, :4] *= 2
    expected[0, 4:] *= 3
    expected[2, 4:] *= 5
    assert torch.equal(weight, expected)


def saved_by(compute) -> tuple[torch.Tensor, int]:
    """The output of `compute`, and the bytes that autograd keeps for its backward pass."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    return output, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["fp32", "bf16", "autocast", "gathered in bf16"])
def test_the_product_is_not_kept_and_output_and_gradients_are_those_of_autograd_in_bits(case, bias):
    """ "gathered in bf16" is what FSDP makes of the weight under autocast; the scales stay fp32."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(96, 160, bias=bias)])})
    add_weight_scaling(model)
    layer = model["layers"][0]
    generator = torch.Generator().manual_seed(0)
    layer.parametrizations.weight[0].scale.data.uniform_(0.5, 1.5, generator=generator)
    if case == "bf16":
        model.bfloat16()
    elif case == "gathered in bf16":
        weight = weight_parameter(layer)
        weight.data = weight.data.bfloat16()
    x = torch.randn(2, 24, 96, generator=generator)[:, ::2]  # not contiguous
    x = (x.bfloat16() if case == "bf16" else x).requires_grad_()
    gradient = torch.randn(2, 12, 160, generator=generator)
    results = []
    for forward in (lambda: nn.functional.linear(x, layer.weight, layer.bias), lambda: layer(x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=case in ("autocast", "gathered in bf16")):
            output, kept = saved_by(forward)
        output.backward(gradient.to(output.dtype))
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        model.zero_grad()
        x.grad = None
        parameters = sum(parameter.nbytes for parameter in layer.parameters())
        results[-1].append(torch.tensor(kept <= parameters + x.untyped_storage().nbytes()))
    *plain, plain_is_lean = results[0]
    *ours, ours_is_lean = results[1]
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
    assert (bool(ours_is_lean), bool(plain_is_lean)) == (True, False)


def test_a_state_dict_before_the_fold_warns_and_one_after_it_does_not(tmp_path, recwarn):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    assert not [w for w in recwarn if w.category is UnfoldedWarning]
    add_weight_scaling(model)
    copied = copy.deepcopy(model)
    for scaled in (model, copied, nn.ModuleDict({"student": copied})):
        with pytest.warns(UnfoldedWarning, match=r"fold_weight_scaling"):
            scaled.state_dict()
    with pytest.warns(UnfoldedWarning):
        model.save_pretrained(tmp_path / "unfolded")
    fold_weight_scaling(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfoldedWarning)
        model.save_pretrained(tmp_path / "folded")
    assert set(load_file(tmp_path / "folded" / "model.safetensors")) == set(
        load_file(tmp_path / "plain" / "model.safetensors")
    )


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="does not divide into 3"):
        add_weight_scaling(model, groups=3)
    add_weight_scaling(model)
    with pytest.raises(InputError, match="scaled already"):
        add_weight_scaling(model)
