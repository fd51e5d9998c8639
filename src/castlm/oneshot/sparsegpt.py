"""SparseGPT's weight update for n:m patterns, all rows at once and group by group, by one Cholesky factorization.

The published code inverts the Hessian, factorizes it twice, and goes through the columns one by one in Python.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from castlm.core.errors import InputError

_MOST_COMPARED = 16
"""Weights of a group whose pairs are compared; longer groups are sorted."""


def sparsegpt(
    weight: Tensor, hessian: Tensor, n: int = 2, m: int = 4, damping: float = 0.01, block_size: int = 128
) -> tuple[Tensor, float]:
    """Prunes a layer and makes the weights that stay take over for those that go.

    Frantar & Alistarh 2023, arXiv 2301.00774, Alg. 1, with the damping and the dead columns of their published code.

    Columns go from left to right. At the first column of each group every row keeps the n largest of its updated
    weights by w_j^2 / U_jj^2, and each zeroed weight pushes w_j / U_jj * U_j,j+1: off the columns to its right, where
    U is the upper Cholesky factor of the inverse of H. Columns with H_jj = 0 are zeroed, the rest of H is damped by
    `damping` times the mean of its diagonal.

    U is never formed. With H = R R^T, R upper triangular, U is the inverse of R, so that a weight with all columns
    before its group gone has become  w_g + D R_:g R_gg^-1,  where D (rows, columns) is what those columns lost: one
    Cholesky instead of two and an inverse. `block_size` says how many columns take in what lies before them by one
    matmul; for n:m patterns the result does not depend on it.

    Args:
        weight: (rows, columns), fp32.
        hessian: (columns, columns), fp32, symmetric; it is overwritten.

    Returns:
        The new weight (rows, columns), and the damping: as asked for, or raised tenfold (to 0.01 from 0) until H could
        be factorized.

    Raises:
        InputError: H cannot be factorized with a damping of 1 either.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight = weight.masked_fill(dead, 0)
    factor, damping = upper_factor(hessian, damping)
    new = _prune_groups(weight.T.contiguous(), factor, n, m, max(m, block_size - block_size % m))
    return new.T, damping


def upper_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """R upper triangular with R R^T = H + damping * mean(diag H) * I, and the damping."""
    # Cholesky goes from the first column to the last, and R from the last to the first: hence the flips
    lower, damping = lower_factor(hessian.flip(0, 1), damping)
    return lower.flip(0, 1), damping


def lower_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor L of H + damping * mean(diag H) * I, and the damping, raised tenfold until there is one.

    Args:
        hessian: (columns, columns), fp32, symmetric; its diagonal is overwritten.

    Raises:
        InputError: H cannot be factorized with a damping of 1 either.
    """
    diagonal = hessian.diagonal()
    undamped, mean = diagonal.clone(), diagonal.mean()
    while True:
        diagonal.copy_(undamped + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return lower, damping
        if damping >= 1:
            raise InputError(
                "the Hessian is not positive definite, with a damping of 1 either: calibrate on other text"
            )
        damping = min(1.0, 10 * damping) or 0.01


def _prune_groups(weight: Tensor, factor: Tensor, n: int, m: int, block_size: int) -> Tensor:
    """`sparsegpt` on a transposed weight (columns, rows), in place: a column of the paper lies contiguous here."""
    columns, rows = weight.shape
    blocks = factor.view(columns // m, m, columns // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # R_gg: (., m, m)
    identity = torch.eye(m, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True)  # U_gg
    pull = (inverse.mT @ factor.T.reshape(-1, m, columns)).view(columns, columns)  # row j: (R_:g R_gg^-1)_j
    scale = factor.diagonal().unsqueeze(1)  # 1 / U_jj
    lowest = _LowestOfGroup(n, m, rows, weight) if m <= _MOST_COMPARED else partial(_lowest_sorted, n=n)

    lost = weight.clone()  # turns into D as the columns are done
    groups = list(zip(weight.split(m), lost.split(m), pull.split(m), scale.split(m), inverse))
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        weight[start:stop].addmm_(pull[start:stop, :start], lost[:start])
        for first in range(start, stop, m):
            group, lost_here, pull_here, scale_here, inverse_here = groups[first // m]
            if first > start:
                group.addmm_(pull_here[:, start:first], lost[start:first])
            pruned = lowest((group * scale_here).abs_())
            _prune_group(group, pruned, pruned * scale_here, inverse_here)
            lost_here -= group
    return weight


def _prune_group(group: Tensor, pruned: Tensor, scale: Tensor, inverse: Tensor) -> None:
    """One group (m, rows) in place: zeroed weights push their error onto those after them; `scale` is 0 where kept."""
    for k in range(group.shape[0] - 1):
        error = scale[k].mul_(group[k])
        group[k + 1 :].addr_(inverse[k, k + 1 :], error, alpha=-1)
    group.masked_fill_(pruned, 0)


def _lowest_sorted(score: Tensor, n: int) -> Tensor:
    """As `_LowestOfGroup`, for a long group, whose pairs would take too much memory."""
    order = score.argsort(dim=0, descending=True, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(0, order[:n], False)


class _LowestOfGroup:
    """The m - n lowest of each column of a score (m, rows), ties as in `rank_mask`: of two equal ones the later goes.

    `rank_mask` is made for whole weights; for one small group at a time, as here, the calls are what costs. So all
    pairs are compared at once, and a matmul with a table of 1 and -1 adds the comparisons up to ranks.
    """

    def __init__(self, n: int, m: int, rows: int, like: Tensor) -> None:
        self.n = n
        self.earlier, self.later = torch.triu_indices(m, m, 1, device=like.device)
        pairs = torch.arange(len(self.earlier), device=like.device)
        self.table = like.new_zeros(m, len(pairs))
        self.table[self.earlier, pairs] = 1
        self.table[self.later, pairs] = -1
        self.num_earlier = torch.arange(m, device=like.device, dtype=like.dtype).unsqueeze(1)
        self.later_wins = like.new_empty(len(pairs), rows)

    def __call__(self, score: Tensor) -> Tensor:
        later, earlier = score.index_select(0, self.later), score.index_select(0, self.earlier)
        torch.gt(later, earlier, out=self.later_wins)
        return torch.addmm(self.num_earlier, self.table, self.later_wins) >= self.n
