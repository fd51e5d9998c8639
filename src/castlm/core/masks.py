"""Making, packing and comparing masks: functions on plain tensors whose arguments the caller has checked.

An n:m mask keeps exactly n of every m consecutive weights, even where magnitudes tie. Ranks are counted by comparisons
and the earlier of two equal weights wins, so the mask is the same on every device and in every dtype. `topk` and
unstable sorts do not guarantee this.
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

_MOST_COMPARED = 32  # weights of a group; comparisons grow with its square, and sorting longer groups is faster


def rank_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keeps the `n` highest scores of each `m` in `score` (..., width). NaN is not looked for.

    The rank of a weight is the number of weights in its group that beat it. A later element beats an earlier one only
    if its score is strictly larger, so ranks are a permutation and exactly `n` of them are below `n`. Up to m = 32 the
    function consists of comparisons and byte sums, which `torch.compile` turns into one pass over `score`.
    """
    groups = score.reshape(*score.shape[:-1], score.shape[-1] // m, m)  # (4096, 11008) -> (4096, 2752, 4)
    if m > _MOST_COMPARED:
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)
    scores = groups.unbind(-1)  # m views of (..., groups)
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
    """2:4 by pairs. If the smaller weight of a pair beats the larger of the other pair, the whole pair is kept.
    Otherwise each pair keeps its larger weight."""
    b_wins, d_wins = b > a, d > c
    first = torch.minimum(a, b) >= torch.maximum(c, d)  # the earlier pair also wins a tie
    second = torch.minimum(c, d) > torch.maximum(a, b)
    return [
        first | ~(second | b_wins),
        first | (~second & b_wins),
        second | ~(first | d_wins),
        second | (~first & d_wins),
    ]


def largest_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask of the `n` largest `|weight|` of each `m`: bool, the shape of `weight` (..., width).

    fp32 tensors on a CPU take the C++ kernel where it is built. The result is the same.

    Raises:
        InputError: `weight` is complex or contains NaN.
    """
    if weight.is_complex():
        raise InputError(f"a weight is {weight.dtype}: masks by magnitude are made of real weights")
    if weight.numel() and m <= native.MOST_GROUPED and native.runs_on(weight):
        packed = weight.new_zeros((*weight.shape[:-1], -(-weight.shape[-1] // 8)), dtype=torch.uint8)
        _, has_nan = native.refresh_([weight.contiguous()], [packed], n, m)
        mask = unpack_mask(packed, weight.shape[-1])
    else:
        magnitude = weight.abs()
        has_nan = bool(magnitude.sum().isnan())  # magnitudes are not negative, so their sum makes no NaN of its own
        mask = rank_mask(magnitude, n, m)
    if has_nan:
        raise InputError(f"the weight of shape {tuple(weight.shape)} contains NaN: it cannot be ranked by magnitude")
    return mask


# Eight bytes of 0 and 1 as one little-endian int64: byte k of the eight becomes bit k ("Bit Twiddling Hacks").
_GATHER = 0x0102040810204080


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a bool mask (..., width) into bits, (..., ceil(width / 8)) uint8.

    Bit k of byte j is column 8 j + k, and the bits past `width` are 0. This is the layout of
    `numpy.packbits(mask, axis=-1, bitorder="little")`.

    Examples:
        >>> pack_mask(torch.tensor([True, False, False, True]))
        tensor([9], dtype=torch.uint8)
    """
    if mask.shape[-1] == 0:
        return mask.to(torch.uint8)
    whole = F.pad(mask.to(torch.uint8, memory_format=torch.contiguous_format), (0, -mask.shape[-1] % 8))
    return ((whole.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """The bool mask (..., width) whose `pack_mask` is `packed` (..., ceil(width / 8)).

    Examples:
        >>> unpack_mask(torch.tensor([9], dtype=torch.uint8), 4)
        tensor([ True, False, False,  True])
    """
    eights = _EIGHT_BOOLS.to(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    return eights.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :width].contiguous()


@functools.cache
def bits_of_a_word(device: torch.device) -> Tensor:
    """(32,) int32, where element k has only bit k set."""
    return torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int32, device=device)


def unpack_words(words: Tensor, bits: Tensor) -> Tensor:
    """The bool mask (num_words, 32) of packed bits viewed as (num_words,) int32. `bits` is `bits_of_a_word`.

    In a compiled loop this mask stays in registers, while `unpack_mask` would write it to memory and read it again.
    """
    return (words.unsqueeze(1) & bits) != 0


_BYTES = torch.arange(256, dtype=torch.int32, device="cpu")
_EIGHT_BOOLS = unpack_words(_BYTES, bits_of_a_word(_BYTES.device)[:8]).view(torch.int64).view(-1)


def _num_bits(byte: Tensor) -> Tensor:
    """The number of bits set in each element, 0 to 255, of an int32 tensor."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


def replace_(packed: Tensor, new: Tensor) -> Tensor:
    """Overwrites a packed mask and returns how many entries changed, 0-dimensional."""
    flips = _num_bits((new ^ packed).to(torch.int32)).sum()
    packed.copy_(new)
    return flips


def refresh_mask_(weight: Tensor, packed: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Recomputes the packed mask of `weight` (out, in), in place in `packed` (out, ceil(in / 8)).

    Returns:
        The number of entries that changed, and whether `weight` contains NaN; both 0-dimensional.
    """
    magnitude = weight.abs()
    flips = replace_(packed, pack_mask(rank_mask(magnitude, n, m)))
    return flips, magnitude.sum().isnan()


def refresh_masks_(
    weights: Sequence[Tensor], packed: Sequence[Tensor], n: int, m: int, compile: bool = False
) -> tuple[Tensor | int, bool]:
    """`refresh_mask_` of several contiguous weights.

    fp32 weights on a CPU take the C++ kernel where it is built; others go through `torch.compile` if `compile` is set.

    Returns:
        The total number of entries that changed, and whether a weight contains NaN.
    """
    if m <= native.MOST_GROUPED and all(map(native.runs_on, weights)):
        return native.refresh_(weights, packed, n, m)
    refresh = compiled(refresh_mask_) if compile else refresh_mask_
    results = [refresh(weight.detach(), mask.detach(), n, m) for weight, mask in zip(weights, packed)]
    flips, has_nan = (torch.stack(column) for column in zip(*results))
    return flips.sum(), bool(has_nan.any())


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `torch.compile`, with one compilation for all shapes."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def flip_rate(old_mask: Tensor, new_mask: Tensor) -> float:
    """The share of mask entries that changed, 0 to 1 (CAST, arXiv 2509.25996, App. C). 0 for empty masks.

    Raises:
        InputError: masks of different shapes.

    Examples:
        >>> flip_rate(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        0.5
    """
    if old_mask.shape != new_mask.shape:
        raise InputError(f"masks of shapes {tuple(old_mask.shape)} and {tuple(new_mask.shape)} cannot be compared")
    return float((old_mask != new_mask).count_nonzero() / max(1, old_mask.numel()))


def sparse_weight_ratio(weight: Tensor, mask: Tensor) -> float:
    """`|weight * mask|_1 / |weight|_1`, 0 to 1: 1 when all masked weights are zero (CAST, arXiv 2509.25996, App. C).

    An all-zero weight gives 1.

    Args:
        weight: any shape and real dtype; summed in float64.
        mask: bool, of the same shape, True = kept.

    Raises:
        InputError: a mask of another shape.

    Examples:
        >>> sparse_weight_ratio(torch.tensor([3.0, 1.0]), torch.tensor([True, False]))
        0.75
    """
    if weight.shape != mask.shape:
        raise InputError(f"a mask of shape {tuple(mask.shape)} is not for a weight of shape {tuple(weight.shape)}")
    magnitude = weight.detach().abs()
    total = magnitude.sum(dtype=torch.float64)
    kept = (magnitude * mask).sum(dtype=torch.float64)
    return float(kept / total) if total > 0 else 1.0
