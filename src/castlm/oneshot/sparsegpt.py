"""SparseGPT's weight update for n:m patterns, all rows at once and group by group, by one Cholesky factorization.

The published code inverts the Hessian, factorizes it twice, and goes through the columns one by one in Python.
"""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.core.cholesky import upper_factor
from castlm.oneshot import sweep
from castlm.oneshot.ranks import ALONE, ByRows

_MOST_COMPARED = 16
"""Weights of a group whose pairs are compared; longer groups are sorted."""


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    n: int = 2,
    m: int = 4,
    damping: float = 0.01,
    block_size: int = 128,
    by_rows: ByRows = ALONE,
) -> tuple[Tensor, float]:
    """Prunes a layer and updates its kept weights so that they compensate for the pruned ones.

    Frantar & Alistarh 2023, arXiv 2301.00774, Alg. 1, with the damping and the dead columns of their published code.

    Columns are processed from left to right. At the first column of each group, every row keeps the n largest of its
    updated weights by w_j^2 / U_jj^2. Each zeroed weight subtracts w_j / U_jj * U_j,j+1: from the columns to its right,
    where U is the upper Cholesky factor of the inverse of H. Columns with H_jj = 0 are zeroed.

    U is never formed. With H = R R^T, R upper triangular, U is the inverse of R. After all columns before group g are
    processed, its weights are  w_g + D R_:g R_gg^-1,  where D (rows, columns) holds old minus new weights of those
    columns. `block_size` is the number of columns that are updated for all columns before them by one matmul; for n:m
    patterns the result does not depend on it.

    Args:
        weight: (rows, columns), fp32.
        hessian: (columns, columns), fp32, symmetric; it is overwritten.
        damping: the share of the mean of H's diagonal that is added to the diagonal.
        by_rows: divides the rows.

    Returns:
        The new weight (rows, columns), and the damping, see `lower_factor`.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that are 0 in the whole text
    diagonal[dead] = 1
    weight = weight.masked_fill(dead, 0)
    factor, damping = upper_factor(hessian, damping)
    return sparsegpt_by_factor(weight, factor, n, m, block_size, by_rows), damping


def sparsegpt_by_factor(
    weight: Tensor, factor: Tensor, n: int, m: int, block_size: int = 128, by_rows: ByRows = ALONE
) -> Tensor:
    """`sparsegpt` of a weight (rows, columns) whose dead columns are 0, by the `upper_factor` of the Hessian.

    On an accelerator the launches of small groups take most of the time, so that all rows are swept at once.
    """
    solve = _Sweep(factor, n, m, max(m, block_size - block_size % m))
    return by_rows(solve, weight) if weight.device.type == "cpu" else solve(weight)


def sparsegpt_holds(rows: int, columns: int) -> int:
    """Elements that `sparsegpt` holds at its peak, beside its arguments."""
    # the weight without dead columns, transposed, and what is lost; the factor, and the shares of losses (`pull`)
    return 3 * rows * columns + 2 * columns**2


class _Sweep:
    """`sparsegpt` of some rows, by the factor of the Hessian."""

    def __init__(self, factor: Tensor, n: int, m: int, block_size: int) -> None:
        self.n, self.m, self.block_size = n, m, block_size
        columns = len(factor)
        # The diagonal blocks R_gg: (576, 576) -> (144, 4, 144, 4) -> (144, 4, 4)
        blocks = factor.view(columns // m, m, columns // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        identity = torch.eye(m, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True)  # U_gg, (144, 4, 4)
        self.inverse = inverse.contiguous()
        # Row j is column j of R_:g R_gg^-1: the share of each earlier column's loss that column j inherits, (576, 576).
        self.pull = (self.inverse.mT @ factor.T.reshape(-1, m, columns)).view(columns, columns)
        self.scale = factor.diagonal().contiguous()  # 1 / U_jj

    def __call__(self, rows: Tensor) -> Tensor:
        weight = rows.T.contiguous()  # (columns, rows), so that a column of the paper is contiguous
        sweep_ = sweep.sweep_ if sweep.runs_on(weight, self.block_size) else sweep_by_torch_
        lost = weight.clone()  # becomes D, old minus new, group by group
        for start in range(0, len(weight), self.block_size):
            stop = min(start + self.block_size, len(weight))
            # All columns before this block act on it in one matmul: (128, start) @ (start, 1536).
            weight[start:stop].addmm_(self.pull[start:stop, :start], lost[:start])
            sweep_(weight, lost, self.pull, self.scale, self.inverse, range(start, stop), self.n, self.m)
        return weight.T


def sweep_by_torch_(
    weight: Tensor, lost: Tensor, pull: Tensor, scale: Tensor, inverse: Tensor, columns: range, n: int, m: int
) -> None:
    """`sweep.sweep_` by torch's operators, for other dtypes and devices."""
    lowest = _LowestOfGroup(n, m, weight.shape[1], weight)
    for first in columns[::m]:
        here = slice(first, first + m)
        group = weight[here]  # (4, 1536)
        if first > columns.start:
            # Those inside the block, group by group: (4, first - start) @ (first - start, 1536).
            group.addmm_(pull[here, columns.start : first], lost[columns.start : first])
        scale_here, inverse_here = scale[here].unsqueeze(1), inverse[first // m]
        pruned = lowest((group * scale_here).abs_())  # |w_j| / U_jj, whose square Alg. 1 compares; (4, 1536)
        scale_lost = pruned * scale_here  # 0 where kept
        for k in range(m - 1):  # a zeroed weight passes its error to the later ones of its group
            error = scale_lost[k].mul_(group[k])  # w_k / U_kk, (1536,)
            group[k + 1 :].addr_(inverse_here[k, k + 1 :], error, alpha=-1)
        group.masked_fill_(pruned, 0)
        lost[here] -= group  # D of these columns is final: old minus new


class _LowestOfGroup:
    """Masks the m - n lowest of each column of a score (m, rows); of equal scores the later, as in `rank_mask`.

    `rank_mask` is made for whole weights. On one small group, the calls of its operators would take most of the time,
    so this compares all pairs at once, and a matmul with a table of 1 and -1 adds the comparisons up to ranks. The
    pairs of a long group would take too much memory: it is sorted.
    """

    def __init__(self, n: int, m: int, rows: int, like: Tensor) -> None:
        self.n, self.is_sorted = n, m > _MOST_COMPARED
        if self.is_sorted:
            return
        self.earlier, self.later = torch.triu_indices(m, m, 1, device=like.device)
        pairs = torch.arange(len(self.earlier), device=like.device)
        self.table = like.new_zeros(m, len(pairs))
        # Ranks begin as 0, 1, 2, 3. A later weight that wins moves the earlier one back (+1) and itself forward (-1).
        self.table[self.earlier, pairs] = 1
        self.table[self.later, pairs] = -1
        self.num_earlier = torch.arange(m, device=like.device, dtype=like.dtype).unsqueeze(1)
        self.later_wins = like.new_empty(len(pairs), rows)

    def __call__(self, score: Tensor) -> Tensor:
        if self.is_sorted:
            order = score.argsort(dim=0, descending=True, stable=True)
            return torch.ones_like(score, dtype=torch.bool).scatter_(0, order[: self.n], False)
        later, earlier = score.index_select(0, self.later), score.index_select(0, self.earlier)
        torch.gt(later, earlier, out=self.later_wins)
        return torch.addmm(self.num_earlier, self.table, self.later_wins) >= self.n
