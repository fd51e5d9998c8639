"""n:m masks and the checks on them: pure functions on tensors, groups along the last axis.

A mask keeps exactly n of every m consecutive weights, also where magnitudes tie: a rank is counted by comparisons, and
of two equal weights the earlier one wins, on every device and in every dtype. A sort or a topk gives no such promise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from castlm.core import native
from castlm.core.errors import InputError
from castlm.core.pattern import check_pattern, check_width


def rank_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keeps the `n` highest-ranked of each `m` by `score`, without looking for NaN.

    The rank of a weight is the number of weights in its group that beat it; element j beats an earlier element i only
    when its score is strictly larger, so that ranks are a permutation and exactly `n` of them are below `n`. Only
    comparisons and byte sums: no branch, no sort, and `torch.compile` turns it into one pass over `score`.
    """
    scores = score.reshape(*score.shape[:-1], score.shape[-1] // m, m).unbind(-1)  # m views of (..., groups)
    if (n, m) == (2, 4):
        return torch.stack(_two_of_four(*scores), dim=-1).flatten(-2)
    rank = [torch.zeros_like(scores[0], dtype=torch.uint8) for _ in range(m)]
    for j in range(1, m):
        for i in range(j):
            later_wins = scores[j] > scores[i]
            rank[i] += later_wins
            rank[j] += ~later_wins
    return torch.stack([r < n for r in rank], dim=-1).flatten(-2)


def _two_of_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """2:4 by pairs: a pair is kept whole when its smaller weight beats the larger of the other; else each keeps its
    larger."""
    b_wins, d_wins = b > a, d > c
    first = torch.minimum(a, b) >= torch.maximum(c, d)  # the earlier pair also wins a tie
    second = torch.minimum(c, d) > torch.maximum(a, b)
    return [
        first | ~(second | b_wins),
        first | (~second & b_wins),
        second | ~(first | d_wins),
        second | (~first & d_wins),
    ]


def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask of the `n` largest `|weight|` of every `m` consecutive weights (CAST, arXiv 2509.25996, Eq. 6).

    Args:
        weight: (..., width), any dtype with an order; `width` divides by `m`. In fp32 on a CPU the C++ kernel makes the
            mask, where it is built: the same, in one pass over memory.

    Returns:
        bool, the shape of `weight`, True where a weight is kept: exactly `n` in every group. Ties keep the earlier.

    Raises:
        InputError: a pattern that is not 1 <= n < m, a width that does not divide by `m`, or NaN in `weight`.

    Example:
        >>> nm_mask(torch.tensor([1.0, -3.0, 2.0, 2.0]))
        tensor([False,  True,  True, False])
    """
    check_pattern(n, m)
    if weight.dim() == 0:
        raise InputError("a 0-dimensional tensor has no groups: pass a weight of shape (..., width)")
    check_width(weight.shape[-1], m)
    weight = weight.detach()
    if weight.numel() and native.runs_on(weight):
        packed = weight.new_zeros((*weight.shape[:-1], -(-weight.shape[-1] // 8)), dtype=torch.uint8)
        _, has_nan = native.refresh_([weight.contiguous()], [packed], n, m)
        mask = unpack_mask(packed, weight.shape[-1])
    else:
        magnitude = weight.abs()
        has_nan = bool(magnitude.sum().isnan())  # no NaN of its own: magnitudes have one sign
        mask = rank_mask(magnitude, n, m)
    if has_nan:
        raise InputError(f"the weight of shape {tuple(weight.shape)} has NaN: no mask of it means anything")
    return mask


# Eight bytes of 0 and 1 as one int64, as in "Bit Twiddling Hacks": byte k of eight becomes bit k of one.
# Little-endian.
_GATHER = 0x0102040810204080


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask (..., width) as bits, (..., ceil(width / 8)) uint8: bit k of byte j is column 8 j + k, the bits past
    `width` are 0. What `numpy.packbits(mask, axis=-1, bitorder="little")` gives."""
    whole = F.pad(mask.to(torch.uint8, memory_format=torch.contiguous_format), (0, -mask.shape[-1] % 8))
    return ((whole.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """The bool mask (..., width) of the bits (..., ceil(width / 8)) that `pack_mask` made of it."""
    eights = _EIGHT_BOOLS.to(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    return eights.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :width].contiguous()


@functools.cache
def bits_of_a_word(device: torch.device) -> Tensor:
    """(32,) int32, bit k alone in element k."""
    return torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int32, device=device)


def unpack_words(words: Tensor, bits: Tensor) -> Tensor:
    """The bool mask (num_words, 32) of packed bits that are taken as (num_words,) int32; `bits` of `bits_of_a_word`.

    In a compiled loop the mask is never in memory; bytes would be written there and read again.
    """
    return (words.unsqueeze(1) & bits) != 0


_BYTES = torch.arange(256, dtype=torch.int32, device="cpu")
_EIGHT_BOOLS = unpack_words(_BYTES, bits_of_a_word(_BYTES.device)[:8]).view(torch.int64).view(-1)


def _num_bits(byte: Tensor) -> Tensor:
    """Bits set in each element, 0 to 255, of an int32 tensor."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


def refresh_mask_(weight: Tensor, packed: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Takes the packed mask of `weight` (out, in) anew, in place in `packed` (out, ceil(in / 8)).

    Returns:
        The number of entries that changed, and whether `weight` has NaN; both 0-dimensional.
    """
    magnitude = weight.abs()
    new = pack_mask(rank_mask(magnitude, n, m))
    flips = _num_bits((new ^ packed).to(torch.int32)).sum()
    packed.copy_(new)
    return flips, magnitude.sum().isnan()


def refresh_masks_(
    weights: Sequence[Tensor], packed: Sequence[Tensor], n: int, m: int, compile: bool = False
) -> tuple[Tensor | int, bool]:
    """`refresh_mask_` of several contiguous weights: in fp32 on a CPU by the C++ kernel where it is built, elsewhere
    through `torch.compile` if so wanted. Returns the entries that changed in all, and whether a weight has NaN."""
    if all(map(native.runs_on, weights)):
        return native.refresh_(weights, packed, n, m)
    refresh = compiled(refresh_mask_) if compile else refresh_mask_
    results = [refresh(weight.detach(), mask.detach(), n, m) for weight, mask in zip(weights, packed)]
    flips, has_nan = (torch.stack(column) for column in zip(*results))
    return flips.sum(), bool(has_nan.any())


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `torch.compile`, once for all shapes."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def count_nm_violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """Groups of `weight` (..., width) that hold more than `n` non-zeros; NaN counts as a non-zero.

    Raises:
        InputError: a bad pattern, or a width that does not divide by `m`.
    """
    check_pattern(n, m)
    check_width(weight.shape[-1], m)
    return int((weight.reshape(*weight.shape[:-1], weight.shape[-1] // m, m).count_nonzero(dim=-1) > n).sum())


def is_nm_sparse(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether every group of `weight` (..., width) holds at most `n` non-zeros."""
    return count_nm_violations(weight, n, m) == 0


def flip_rate(old_mask: Tensor, new_mask: Tensor) -> float:
    """Share of mask entries that changed, 0 to 1 (CAST, App. C)."""
    if old_mask.shape != new_mask.shape:
        raise InputError(f"masks of shapes {tuple(old_mask.shape)} and {tuple(new_mask.shape)} cannot be compared")
    return float((old_mask != new_mask).count_nonzero() / old_mask.numel())


def sparse_weight_ratio(weight: Tensor, mask: Tensor) -> float:
    """`|weight * mask|_1 / |weight|_1`: 1 when nothing is left to prune (CAST, App. C). 1 for an all-zero weight."""
    magnitude = weight.detach().abs()
    total = magnitude.sum(dtype=torch.float64)
    kept = (magnitude * mask).sum(dtype=torch.float64)
    return float(kept / total) if total > 0 else 1.0
