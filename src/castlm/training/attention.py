"""Attention on a CPU in blocks of queries, each with those keys alone that one of its queries may see.

torch's kernel multiplies each query with 512 keys at a time, later ones and those of other documents too. In blocks,
sequences of 512 tokens with five documents take 0.4 of its time, and with one document 0.7.

    key        0 ... 109 | 110 .. 204 | 205 ... 364 | ...       mask of a packed sequence, by documents
    queries    0 ..  63:   keys   0 ..  63
    queries   64 .. 127:   keys   0 .. 127                      two documents
    queries  128 .. 191:   keys 110 .. 191
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_QUERIES = 64  # of a block; 32 and 128 take a tenth longer for sequences of 512 (Zen 3)
_SHORT = 128  # tokens of a sequence that torch's kernel takes whole


class BlockedAttention(TorchFunctionMode):
    """Inside this context, `scaled_dot_product_attention` on a CPU omits keys that its mask forbids to a whole block.

    The results are the same up to the order of sums. Masks of floats, dropout and other devices are left to torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._causal: Tensor | None = None
        self._blocks: dict[int, tuple[Tensor, list[list[tuple[slice, slice]]]]] = {}
        """By the id of a mask: the mask, so that no other has its id, and the queries and keys of each row's blocks."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        mask, num_tokens = attn_mask, query.shape[-2]
        in_blocks = query.device.type == "cpu" and query.dim() == 4 and num_tokens > _SHORT and not dropout_p
        if in_blocks and is_causal:
            mask = self._causal_mask(num_tokens)
        if not in_blocks or not _is_whole(mask, query, key):
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        assert mask is not None
        rows = []
        for row, blocks in enumerate(self._blocks_of(mask)):
            of = slice(row, row + 1) if len(mask) > 1 else slice(None)  # one mask can serve all rows
            found = []
            for queries, keys in blocks:
                inputs = query[of, :, queries], key[of, :, keys], value[of, :, keys]
                found.append(scaled_dot_product_attention(*inputs, mask[of, :, queries, keys], **options))
            rows.append(torch.cat(found, dim=-2))
        return torch.cat(rows)

    def _causal_mask(self, num_tokens: int) -> Tensor:
        if self._causal is None or len(self._causal[0, 0]) != num_tokens:
            self._causal = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril_()
        return self._causal

    def _blocks_of(self, mask: Tensor) -> list[list[tuple[slice, slice]]]:
        """The blocks of each row of a mask (rows, heads, queries, keys)."""
        if id(mask) not in self._blocks:
            rows = []
            for allowed in mask.any(dim=1):  # (512, 512)
                blocks = []
                for start in range(0, len(allowed), _QUERIES):
                    queries = slice(start, start + _QUERIES)
                    seen = allowed[queries].any(dim=0).nonzero().flatten().tolist()
                    blocks.append((queries, slice(seen[0], seen[-1] + 1) if seen else slice(None)))
                rows.append(blocks)
            self._blocks[id(mask)] = mask, rows
        return self._blocks[id(mask)][1]


def _is_whole(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask says of each query and key whether they meet: bool, (1 or batch, 1 or heads, queries, keys)."""
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4:
        return False
    return len(mask) in (1, len(query)) and mask.shape[-2:] == (query.shape[-2], key.shape[-2])
