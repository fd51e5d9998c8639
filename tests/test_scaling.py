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
