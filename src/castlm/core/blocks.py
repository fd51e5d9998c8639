"""What a linear layer inside a transformer block is, told from names and shapes. The only place that decides it.

Importing this module does not import torch: `castlm verify` reads a checkpoint in less time than that import takes.
`castlm.core.sparsify.is_sparse_linear` is the same rule for a module that exists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAST_PART_NOT_LINEAR = re.compile(
    r"norm(?:_?\d+)?$"  # input_layernorm, q_norm, norm1
    r"|^ln(?:_\w+|\d*)$"  # ln_1, ln_f
    r"|(?:^|_)embed(?:ding)?s?(?:_(?:tokens|positions?|in|out)\w*)?$"  # embed_tokens, rel_pos_embed
    r"|^(?:wte|wpe|relative_attention_bias|lm_head)$"
)


def block_name(name: str) -> str | None:
    """The transformer block that a module or tensor is in: the part of its name up to the first number.

    Experts inside a block have numbers too; the first number is that of the block.

    Example:
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


def stack_name(name: str) -> str | None:
    """The list of blocks that a module or tensor is in.

    Example:
        >>> stack_name("model.layers.3.mlp.up_proj")
        'model.layers'
    """
    block = block_name(name)
    return None if block is None else block.rpartition(".")[0]


def in_block(name: str) -> bool:
    """Whether a module or tensor is in a numbered transformer block.

    Example:
        >>> in_block("transformer.h.0.attn.c_proj"), in_block("lm_head")
        (True, False)
    """
    return block_name(name) is not None


def is_block_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is the weight of a linear layer inside a transformer block.

    Args:
        name: the name of the tensor in the checkpoint.
        shape: its shape; only matrices qualify.

    Example:
        >>> is_block_linear("model.layers.3.mlp.up_proj.weight", (1536, 576))
        True
        >>> is_block_linear("model.layers.3.self_attn.q_norm.weight", (16, 64))
        False
    """
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return len(shape) == 2 and kind == "weight" and in_block(module) and not _LAST_PART_NOT_LINEAR.search(last)
