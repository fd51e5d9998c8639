"""Scope: which layers become sparse in each family, what is left dense and why, and the prune itself."""

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.blocks import block_name, in_block, is_block_linear
from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse, nm_mask
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import prune_, sparse_linears, sparse_param_groups, transformer_blocks
from castlm.models.architecture import linearize_conv1d_
from tests.tiny import FAMILIES, tiny_model

LAYERS = {"opt": 6, "phi": 6, "gpt2": 4, "gpt_neox": 4}
"""Linear layers in a block; the other families have q, k, v, o and three of the MLP."""


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "gpt_neox", "phi", "olmo2"])
def test_scope_is_every_linear_of_the_blocks_and_told_by_names_alone(family):
    model = tiny_model(family)
    linearize_conv1d_(model)
    sparse, dense = sparse_linears(model)
    assert len(sparse) == 2 * LAYERS.get(family, 7)
    assert any(reason == "embedding" for reason in dense.values())
    groups = sparse_param_groups(model)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(layer.weight) for layer in sparse.values()}
    by_name = {name for name, p in model.named_parameters() if is_block_linear(name, p.shape)}
    assert by_name == {f"{name}.weight" for name in sparse}
    blocks = transformer_blocks(model)
    assert len(blocks) == 2
    assert {block_name(name) for name in by_name} == set(blocks)


def test_widths_that_do_not_divide_and_filters_are_named():
    model = tiny_model("llama", intermediate_size=90)
    sparse, dense = sparse_linears(model)
    assert dense["model.layers.1.mlp.down_proj"] == "its width 90 does not divide by m = 4"
    assert len(sparse) == 12
    _, dense = sparse_linears(model, filter_fn=lambda module, name: name.endswith("up_proj"))
    assert dense["model.layers.0.self_attn.q_proj.weight"] == "excluded by the filter"


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
        prune_(model, masks={}, filter_fn=lambda module, name: "proj" in name)


def test_masks_of_ones_own_prune_their_weights_alone():
    """In any module, without a filter."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.ModuleDict({"head": nn.Linear(8, 8)}))
    model.odd = nn.Linear(8, 8)  # outside a numbered block
    weight, mask = model.odd.weight, torch.tensor([True, False, False, True]).repeat(8, 2)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if p is not weight}
    assert prune_(model, "2:4", masks={weight: mask}) == ["odd"]
    assert torch.equal(weight != 0, mask)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())
    with pytest.raises(InputError, match="1 of 2 masks are of tensors"):
        prune_(model, masks={weight: mask, torch.ones(8, 8): mask})
    with pytest.raises(InputError, match="16 places"):
        prune_(model, masks={weight: torch.tensor([True, True, True, False]).repeat(8, 2)})
    plain = nn.Module()
    plain.odd = nn.Linear(8, 8)
    with pytest.raises(InputError, match="filter_fn=lambda module, name: True"):
        prune_(plain)
    assert prune_(plain, filter_fn=lambda module, name: True) == ["odd"]


# ---- which names are linear layers of a block


@pytest.mark.parametrize("name", ["normal_proj", "embedder", "norm_proj", "lnear", "wteam", "embed_proj"])
def test_a_name_that_merely_contains_norm_or_embed_is_a_linear_layer(name):
    assert is_block_linear(f"model.layers.0.{name}.weight", (8, 8))


@pytest.mark.parametrize(
    "name",
    [
        *("input_layernorm", "q_norm", "norm1", "norm_2", "ln_1", "ln_f", "final_layer_norm"),
        *("embed_tokens", "rel_pos_embed", "position_embeddings", "relative_attention_bias", "wte"),
    ],
)
def test_norms_and_embeddings_of_two_dimensions_are_not(name):
    assert not is_block_linear(f"model.layers.0.{name}.weight", (8, 8))


def test_blocks_are_told_by_the_first_number():
    assert block_name("model.layers.12.mlp.experts.3.w1") == "model.layers.12"
    assert block_name("h.0.attn") == "h.0"
    assert block_name("0.weight") == "0"
    assert not in_block("lm_head.parametrizations.weight.0.scale")
    assert not in_block("model.layers.²")
    assert not in_block("")
