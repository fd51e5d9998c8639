"""One rule for what is a linear layer inside a transformer block: by name, by module, and the same for both."""

from pathlib import Path

import pytest
from torch import nn

import castlm
from castlm.core.blocks import block_name, in_block, is_block_linear, stack_name
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import is_sparse_linear, transformer_blocks
from castlm.models.architecture import linearize_conv1d_
from tests.tiny import FAMILIES, tiny_model

ROOT = Path(castlm.__file__).parent


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "gpt_neox", "phi", "olmo2"])
def test_names_and_modules_agree(family):
    model = tiny_model(family)
    linearize_conv1d_(model)
    by_module = {f"{fqn}.weight" for fqn, module in model.named_modules() if is_sparse_linear(module, fqn)}
    by_name = {name for name, p in model.named_parameters() if is_block_linear(name, p.shape)}
    assert by_name == by_module
    blocks = transformer_blocks(model)
    assert len(blocks) == 2
    assert {block_name(name) for name in by_name} == set(blocks)


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
    assert stack_name("h.0.attn") == "h"
    assert block_name("0.weight") == "0"
    assert not in_block("lm_head.parametrizations.weight.0.scale")
    assert not in_block("model.layers.²")
    assert not in_block("")


def test_weight_scaling_changes_no_block():
    model = tiny_model("llama")
    before = list(transformer_blocks(model))
    add_weight_scaling(model)
    assert list(transformer_blocks(model)) == before == ["model.layers.0", "model.layers.1"]


def test_nested_lists_are_inside_their_block():
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    assert list(transformer_blocks(nn.ModuleDict({"layers": nn.ModuleList([experts])}))) == ["layers.0"]


def test_no_other_module_tells_blocks_by_numbers_in_names():
    for path in ROOT.rglob("*.py"):
        text = path.read_text("utf-8")
        if path.parent.name != "core":
            assert "part.isdigit()" not in text, path
            assert r"\.\d+\." not in text, path
