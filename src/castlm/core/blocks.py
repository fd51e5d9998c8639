"""Tells from the name of a layer whether it may become sparse. The only place that decides it.

How a model multiplies by a weight, names do not tell: `castlm.models.products` does.

`castlm.core.sparsify.is_sparse_linear` is the same rule for a module that exists.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_LAST_PART_NOT_LINEAR = re.compile(
    r"norm(?:_?\d+)?$"  # input_layernorm, q_norm, norm1
    r"|^ln(?:_\w+|\d*)$"  # ln_1, ln_f
    r"|(?:^|_)embed(?:ding)?s?(?:_(?:tokens|positions?|in|out)\w*)?$"  # embed_tokens, rel_pos_embed
    r"|^(?:wte|wpe|relative_attention_bias|lm_head)$"
)
_ROUTER = re.compile(r"^(?:gate|router|\w*_router|router_\w+|shared_experts?_gate)$")
_TOWER = re.compile(
    r"^(?:vit|vision|visual|image|video|audio|speech|multi_modal|mm|embed_vision|embed_audio)(?:_|$)"
    r"|^(?:\w+_)?(?:projector|connector|merger|resampler|aligner|qformer|perceiver|vision|visual|abstractor)$"
)
_OF_GRANITE = r"(?<=\.block_sparse_moe)\.(?:input|output)_linear"
_EXPERTS = re.compile(rf"(?:\.(?:shared_)?experts?|{_OF_GRANITE})(?=\.|$)")


def block_name(name: str) -> str | None:
    """The transformer block that a module or tensor is in: the part of its name up to the first number.

    Experts inside a block have numbers too; the first number is the block's.

    Examples:
        >>> block_name("model.layers.3.mlp.experts.7.up_proj.weight")
        'model.layers.3'
        >>> block_name("model.embed_tokens.weight") is None
        True
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part == "parametrizations":
            return None
        if part.isascii() and part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def in_block(name: str) -> bool:
    """Whether a module or tensor is in a numbered transformer block, such as `transformer.h.0.attn.c_proj`."""
    return block_name(name) is not None


def is_tower(name: str) -> bool:
    """Whether a module or tensor is outside the language model: in the vision tower of a VLM, or its projector.

    They stay dense, because text says nothing about their weights. The names before the block's number decide.

    Examples:
        >>> is_tower("model.vision_tower.encoder.layers.0.mlp.fc1"), is_tower("model.language_model.layers.0.mlp.fc1")
        (True, False)
    """
    before = (block_name(name) or name).split(".")
    return any(map(_TOWER.match, before))


def is_router(module: str) -> bool:
    """Whether a module chooses experts for a token, or weighs the shared one. Routers are small, and stay dense.

    They are `gate`, `router` or `shared_expert_gate` in transformers, or a part of such a module. Gates of attention
    have the same name and are linear layers like any other, unless its heads are experts (JetMoE).

    Examples:
        >>> is_router("model.layers.3.mlp.gate"), is_router("model.layers.3.mlp.gate_proj")
        (True, False)
    """
    parts = module.split(".")
    of_attention = any("attn" in part or "attention" in part for part in parts)
    return any(map(_ROUTER.match, parts)) and ("experts" in parts or not of_attention)


def why_dense(module: str, owners: Collection[str] | None = None) -> str | None:
    """Why a linear layer of this name stays dense; None inside a transformer block, if it is no router.

    Args:
        owners: `owners_of_experts` of the model: a layer named `gate` outside them is a layer like any other.

    Examples:
        >>> why_dense("lm_head"), why_dense("model.layers.3.mlp.up_proj")
        ('outside the transformer blocks', None)
    """
    if is_tower(module):
        return "outside the language model"
    if not in_block(module):
        return "outside the transformer blocks"
    parts = module.split(".")
    routes = owners is None or any(".".join(parts[:length]) in owners for length in range(len(parts)))
    routes = routes or any("router" in part for part in parts)  # JetMoE's experts are no module of their own
    return "a router of experts" if routes and is_router(module) else None


def owners_of_experts(names: Iterable[str]) -> set[str]:
    """The modules of a checkpoint that hold experts. A layer named `gate` outside them is not a router."""
    return {name[: part.start()] for name in names for part in _EXPERTS.finditer(name)}


def is_block_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is the weight (out, in) of a linear layer inside a transformer block.

    It is False for routers of experts, vision towers and projectors, which stay dense.

    Examples:
        >>> is_block_linear("model.layers.3.mlp.up_proj.weight", (1536, 576))
        True
        >>> is_block_linear("model.layers.3.self_attn.q_norm.weight", (16, 64))
        False
    """
    module, _, kind = name.rpartition(".")
    is_matrix = len(shape) == 2 and kind == "weight" and not _LAST_PART_NOT_LINEAR.search(module.rpartition(".")[2])
    return is_matrix and why_dense(module) is None
