"""n:m masks and the checks on them: pure functions on tensors, groups along the last axis.

A mask keeps exactly n of every m consecutive weights, also where magnitudes tie: a rank is counted by comparisons, and
of two equal weights the earlier one wins, on every device and in every dtype. A sort or a topk gives no such promise.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """2:4 in six comparisons: kept is what wins at least two of its three, a majority, in three bit operations."""

    def majority(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (x & y) | (z & (x | y))

    b_a, c_a, d_a, c_b, d_b, d_c = b > a, c > a, d > a, c > b, d > b, d > c
    return [~majority(b_a, c_a, d_a), majority(b_a, ~c_b, ~d_b), majority(c_a, c_b, ~d_c), majority(d_a, d_b, d_c)]


def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask of the `n` largest `|weight|` of every `m` consecutive weights (CAST, arXiv 2509.25996, Eq. 6).

    Args:
        weight: (..., width), any dtype with an order; `width` divides by `m`.

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
    magnitude = weight.detach().abs()
    if weight.is_floating_point() and weight.numel() and magnitude.amax().isnan():
        raise InputError(f"the weight of shape {tuple(weight.shape)} has NaN: no mask of it means anything")
    return rank_mask(magnitude, n, m)


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
