"""Scope: which layers become sparse in each family, what is left dense and why, and the prune itself."""

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse, nm_mask
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import prune_, sparse_linears, sparse_param_groups
from castlm.models.architecture import linearize_conv1d_
from tests.tiny import FAMILIES, tiny_model

LAYERS = {"opt": 6, "gpt2": 4}  # linears in a block; the others have q, k, v, o and three of the MLP


@pytest.mark.parametrize("family", FAMILIES)
def test_scope_is_every_linear_of_the_blocks(family):
    model = tiny_model(family)
    linearize_conv1d_(model)
    sparse, dense = sparse_linears(model)
    assert len(sparse) == 2 * LAYERS.get(family, 7)
    assert not any("embed" in name or "lm_head" in name or name.endswith("wte") for name in sparse)
    assert any(reason == "embedding" for reason in dense.values())
    groups = sparse_param_groups(model)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(layer.weight) for layer in sparse.values()}


def test_widths_that_do_not_divide_and_filters_are_named():
    model = tiny_model("llama", intermediate_size=90)
    sparse, dense = sparse_linears(model)
    assert dense["model.layers.1.mlp.down_proj"] == "its width 90 does not divide by m = 4"
    assert len(sparse) == 12
    _, dense = sparse_linears(model, filter_fn=lambda module, name: name.endswith("up_proj"))
    assert dense["model.layers.0.self_attn.q_proj.weight"] == "excluded by the filter"


def test_fused_experts_are_named():
    model = tiny_model("mixtral", num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=2)
    _, dense = sparse_linears(model)
    assert any("experts of shape" in reason for reason in dense.values())


def test_nothing_to_make_sparse_raises():
    with pytest.raises(InputError, match="no linear layer"):
        sparse_linears(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    with pytest.raises(InputError, match="4:2"):
        sparse_linears(tiny_model("llama"), "4:2")


def test_prune_by_magnitude_and_by_the_optimizers_masks():
    model = tiny_model("llama")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    prune_(model, "1:4")
    after = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(after, torch.where(nm_mask(before, 1, 4), before, 0.0))

    model = tiny_model("llama")
    add_weight_scaling(model)
    optimizer = AdamS(sparse_param_groups(model), total_steps=10)
    for param in optimizer.sparse_params():
        optimizer.set_mask(param, torch.tensor([False, False, True, True]).repeat(param.numel() // 4).view_as(param))
    prune_(model, masks=optimizer.masks())
    weight = model.model.layers[1].self_attn.q_proj.weight
    assert is_nm_sparse(weight)
    assert (weight.view(-1, 4)[:, :2] == 0).all()
    with pytest.raises(InputError, match="no mask for"):
        prune_(model, masks={})
