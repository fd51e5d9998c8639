"""Tells from names and shapes which weights of a transformer block may become sparse. The only place that decides it.

Such a weight is the matrix (out, in) of a linear layer, or the 3-D parameter with that matrix of all experts.

Importing this module does not import torch: `castlm verify` reads a checkpoint in less time than that import takes.
`castlm.core.sparsify.is_sparse_linear` is the same rule for a module that exists.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

_LAST_PART_NOT_LINEAR = re.compile(
    r"norm(?:_?\d+)?$"  # input_layernorm, q_norm, norm1
    r"|^ln(?:_\w+|\d*)$"  # ln_1, ln_f
    r"|(?:^|_)embed(?:ding)?s?(?:_(?:tokens|positions?|in|out)\w*)?$"  # embed_tokens, rel_pos_embed
    r"|^(?:wte|wpe|relative_attention_bias|lm_head)$"
)
_ROUTER = re.compile(r"^(?:gate|router|\w*_router|router_\w+|shared_experts?_gate)$")
_TOWER = re.compile(
    r"^(?:vision|visual|image|video|audio|speech|multi_modal|mm|embed_vision|embed_audio)(?:_|$)"
    r"|^(?:\w+_)?(?:projector|connector|merger|resampler|aligner|qformer|perceiver|vision|visual|abstractor)$"
)
_OF_GRANITE = r"(?<=\.block_sparse_moe)\.(?:input|output)_linear"
_STACKED = re.compile(  # the second line: as Aria and Granite MoE store them
    r"\.experts(?:\.\w+)*\.(?:gate_up_proj|gate_proj|up_proj|down_proj|w[123])$"
    rf"|\.experts\.fc[12]$|{_OF_GRANITE}$"
)
_BIAS_OF_EXPERTS = re.compile(r"\.experts\.\w+_bias$")
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


def why_dense(module: str) -> str | None:
    """Why a linear layer of this name stays dense; None inside a transformer block, if it is no router.

    Examples:
        >>> why_dense("lm_head"), why_dense("model.layers.3.mlp.up_proj")
        ('outside the transformer blocks', None)
    """
    if is_tower(module):
        return "outside the language model"
    if not in_block(module):
        return "outside the transformer blocks"
    return "a router of experts" if is_router(module) else None


def is_stacked_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor holds one projection of all experts of a block: (experts, out, in) or (experts, in, out).

    Such as `model.layers.3.mlp.experts.gate_up_proj`.
    """
    name = name.removesuffix(".weight")
    return len(shape) == 3 and bool(_STACKED.search(name)) and in_block(name) and not is_tower(name)


def owners_of_experts(names: Iterable[str]) -> set[str]:
    """The modules of a checkpoint that hold experts. A layer with a router's name outside them is not a router."""
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


def is_block_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor holds weights that may become sparse: of a linear layer, or of all experts of a block."""
    return is_block_linear(name, shape) or is_stacked_experts(name, shape)


def why_stored_dense(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Why tensors of two or more dimensions in a checkpoint stay dense, by name; leaves out those that may be sparse.

    Args:
        shapes: of all tensors of the checkpoint. A layer with a router's name routes only where experts are beside it.
    """
    owners = owners_of_experts(shapes)
    reasons = {name: _why_stored_dense(name, shape, owners) for name, shape in shapes.items() if len(shape) >= 2}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _why_stored_dense(name: str, shape: Sequence[int], owners: Collection[str]) -> str | None:
    if is_tower(name):
        return "outside the language model"
    if not in_block(name):
        return "outside the transformer blocks"
    if len(shape) == 2 and name.endswith(".weight") and not is_block_linear(name, shape):
        parts = name.removesuffix(".weight").split(".")
        if not is_router(".".join(parts)):
            return "a norm or an embedding"
        # `mlp.gate` is the router where `mlp` has experts, as in Mixtral; in a model without any it is a layer.
        routes = any(".".join(parts[:length]) in owners for length in range(len(parts)))
        return "a router of experts" if routes else None
    if len(shape) == 2 and _BIAS_OF_EXPERTS.search(name):
        return "a bias of experts"
    if len(shape) == 3 and shape[1] == 1 and name.endswith(".weight"):
        return "a depthwise convolution"
    return None
