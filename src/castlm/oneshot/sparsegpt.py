"""SparseGPT's weight update for n:m patterns, all rows at once and group by group, by one Cholesky factorization.

The published code inverts the Hessian, factorizes it twice, and goes through the columns one by one in Python.
On a CPU the columns are swept by `sweep.cpp`, called through ctypes; `kernels()` is None where it was not compiled.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from castlm.core.cholesky import upper_factor
from castlm.core.native import in_reach, library_of, load_library, pointer
from castlm.hardware import captured
from castlm.oneshot.ranks import by_rows
from castlm.world import ALONE, World

_MAX_COMPARED = 16
"""Weights of a group whose pairs are compared; longer groups are sorted."""


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    n: int = 2,
    m: int = 4,
    damping: float = 0.01,
    block_size: int = 128,
    world: World = ALONE,
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
        world: the ranks that divide the rows.

    Returns:
        The new weight (rows, columns), and the damping, see `lower_factor`.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that are 0 in the whole text
    diagonal[dead] = 1
    weight = weight.masked_fill(dead, 0)
    factor, damping = upper_factor(hessian, damping)
    return sparsegpt_by_factor(weight, factor, n, m, block_size, world), damping


def sparsegpt_by_factor(
    weight: Tensor, factor: Tensor, n: int, m: int, block_size: int = 128, world: World = ALONE
) -> Tensor:
    """`sparsegpt` of a weight (rows, columns) whose dead columns are 0, by the `upper_factor` of the Hessian.

    On an accelerator the launches take most of the time, so that all rows are swept at once.
    """
    solve = _Sweep(factor, n, m, max(m, block_size - block_size % m))
    return by_rows(world, solve, weight) if weight.device.type == "cpu" else solve(weight)


class _Sweep:
    """`sparsegpt` of some rows, by the factor of the Hessian."""

    def __init__(self, factor: Tensor, n: int, m: int, block_size: int) -> None:
        self.n, self.m, self.block_size = n, m, block_size
        columns = len(factor)
        # U is the inverse of R, and both are upper triangular: block g of U's diagonal is the inverse of R_gg alone,
        # and U_jj = 1 / R_jj. The diagonal blocks R_gg: (576, 576) -> (144, 4, 144, 4) -> (144, 4, 4)
        blocks = factor.view(columns // m, m, columns // m, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        identity = torch.eye(m, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True)  # U_gg, (144, 4, 4)
        self.inverse = inverse.contiguous()
        # w_g + D R_:g R_gg^-1 adds to column j of group g the losses D, each times its entry of column j of R_:g U_gg.
        # Row j of `pull` is that column, so that one product, pull[j] @ D^T, adds all of them:
        # (144, 4, 4) @ (144, 4, 576) -> (576, 576)
        self.pull = (self.inverse.mT @ factor.T.reshape(-1, m, columns)).view(columns, columns)
        self.scale = factor.diagonal().contiguous()  # 1 / U_jj

    def __call__(self, rows: Tensor) -> Tensor:
        weight = rows.T.contiguous()  # (columns, rows), so that a column of the paper is contiguous
        sweep_ = self._sweep_for(weight)
        lost = weight.clone()  # becomes D, old minus new, group by group
        for start in range(0, len(weight), self.block_size):
            stop = min(start + self.block_size, len(weight))
            # All columns before this block act on it in one matmul: (128, start) @ (start, 1536).
            weight[start:stop].addmm_(self.pull[start:stop, :start], lost[:start])
            sweep_(weight, lost, self.pull, self.scale, self.inverse, range(start, stop), self.n, self.m)
        return weight.T

    def _sweep_for(self, weight: Tensor) -> Callable[..., None]:
        if kernel_runs_on(weight, self.block_size):
            return sweep_by_kernel_
        if weight.device.type == "cuda" and len(weight) > self.block_size:
            return _CapturedSweep(self.block_size, weight, self.n, self.m)
        return sweep_by_torch_


class _CapturedSweep:
    """`sweep_by_torch_` on a GPU, which gets the kernels of a whole block of columns by one launch, as a CUDA graph.

    One by one, the 15 kernels of each group would take more time to launch than to run. No GPU has run it yet.
    """

    def __init__(self, block_size: int, like: Tensor, n: int, m: int) -> None:
        self.block_size = block_size
        rows = like.shape[1]
        shapes = (
            (block_size, rows),
            (block_size, rows),
            (block_size, block_size),
            (block_size,),
            (block_size // m, m, m),
        )
        weight, lost, pull, scale, inverse = self.buffers = [like.new_zeros(shape) for shape in shapes]
        lowest = _LowestOfGroup(n, m, rows, like)

        def sweep_block() -> None:
            sweep_by_torch_(weight, lost, pull, scale, inverse, range(block_size), n, m, lowest)

        self.sweep_block = captured(sweep_block, like.device)

    def __call__(
        self, weight: Tensor, lost: Tensor, pull: Tensor, scale: Tensor, inverse: Tensor, columns: range, n: int, m: int
    ) -> None:
        if len(columns) < self.block_size:  # the last columns
            sweep_by_torch_(weight, lost, pull, scale, inverse, columns, n, m)
            return
        here = slice(columns.start, columns.stop)
        groups = slice(columns.start // m, columns.stop // m)
        of_block = weight[here], lost[here], pull[here, here], scale[here], inverse[groups]
        for buffer, part in zip(self.buffers, of_block):
            buffer.copy_(part)
        self.sweep_block()
        weight[here], lost[here] = self.buffers[:2]


def sweep_by_torch_(
    weight: Tensor,
    lost: Tensor,
    pull: Tensor,
    scale: Tensor,
    inverse: Tensor,
    columns: range,
    n: int,
    m: int,
    lowest: _LowestOfGroup | None = None,
) -> None:
    """`sweep_by_kernel_` by torch's operators, for other dtypes and devices.

    The weights w of a group pass errors e = P (w - N e) / U_kk on, where P is diagonal with 1 for each zeroed weight,
    and N is the transposed part of U_gg above its diagonal. e begins at 0; each turn gets one more zeroed weight right,
    in order, so that m - n turns are exact, whatever the mask of a row.
    """
    lowest = lowest or _LowestOfGroup(n, m, weight.shape[1], weight)
    passed_on = inverse.triu(1).mT  # N of each group, (144, 4, 4)
    for first in columns[::m]:
        here = slice(first, first + m)
        group = weight[here]  # (4, 1536)
        if first > columns.start:
            # Those inside the block, group by group: (4, first - start) @ (first - start, 1536).
            group.addmm_(pull[here, columns.start : first], lost[columns.start : first])
        scale_here, onward = scale[here].unsqueeze(1), passed_on[first // m]
        pruned = lowest((group * scale_here).abs_())  # |w_j| / U_jj, whose square Alg. 1 compares; (4, 1536)
        scale_lost = pruned * scale_here  # 0 where kept
        error = scale_lost * group
        for _ in range(m - n - 1):
            error = torch.addmm(group, onward, error, alpha=-1).mul_(scale_lost)
        group.addmm_(onward, error, alpha=-1).masked_fill_(pruned, 0)
        lost[here] -= group  # D of these columns is final: old minus new


class _LowestOfGroup:
    """Masks the m - n lowest of each column of a score (m, rows); of equal scores the later, as in `rank_mask`.

    `rank_mask` is made for whole weights. On one small group, the calls of its operators would take most of the time,
    so this compares all pairs at once, and a matmul with a table of 1 and -1 adds the comparisons up to ranks. The
    pairs of a long group would take too much memory: it is sorted.
    """

    def __init__(self, n: int, m: int, rows: int, like: Tensor) -> None:
        self.n, self.is_sorted = n, m > _MAX_COMPARED
        if self.is_sorted:
            return
        earlier, later = torch.triu_indices(m, m, 1, device=like.device)
        self.both = torch.cat([later, earlier])
        pairs = torch.arange(len(earlier), device=like.device)
        self.table = like.new_zeros(m, len(pairs))
        # Ranks begin as 0, 1, 2, 3. A later weight that wins moves the earlier one back (+1) and itself forward (-1).
        self.table[earlier, pairs] = 1
        self.table[later, pairs] = -1
        self.num_earlier = torch.arange(m, device=like.device, dtype=like.dtype).unsqueeze(1)
        self.later_wins = like.new_empty(len(pairs), rows)

    def __call__(self, score: Tensor) -> Tensor:
        if self.is_sorted:
            order = score.argsort(dim=0, descending=True, stable=True)
            return torch.ones_like(score, dtype=torch.bool).scatter_(0, order[: self.n], False)
        torch.gt(*score.index_select(0, self.both).view(2, *self.later_wins.shape), out=self.later_wins)
        return torch.addmm(self.num_earlier, self.table, self.later_wins) >= self.n


MAX_COLUMNS = 256
"""The most columns of one `sweep_by_kernel_`, and the largest m of its patterns."""

_VERSION = 1  # of sweep.cpp


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "lost", "pull", "scale", "inverse")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    ]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built. Raises `InputError` if its version is not this module's."""
    path = library_of(__package__)
    return load_kernels(path) if path else None


def load_kernels(path: str) -> ctypes.CDLL:
    """The library at `path`, with its signature. Raises `InputError` if its version is not this module's."""
    library = load_library(path, "castlm_sweep_version", _VERSION)
    number = ctypes.c_int
    library.castlm_sweep.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64, ctypes.c_int64, number, number, number]
    library.castlm_sweep.restype = None
    return library


def kernel_runs_on(weight: Tensor, columns: int) -> bool:
    """Whether the kernel exists and sweeps this weight, so many columns at a time."""
    return in_reach(weight) and columns <= MAX_COLUMNS and kernels() is not None


def sweep_by_kernel_(
    weight: Tensor, lost: Tensor, pull: Tensor, scale: Tensor, inverse: Tensor, columns: range, n: int, m: int
) -> None:
    """Prunes some columns of a weight in the loop of `sparsegpt.py`, group by group, in place.

    Args:
        weight: (columns, rows), on which the columns before these have acted.
        lost: (columns, rows), old minus new weights; for these columns and later ones, the old weights.
        pull: (columns, columns).
        scale: (columns,), the diagonal of the factor.
        inverse: (columns / m, m, m).
        columns: the columns, in whole groups of m, at most `MAX_COLUMNS`.
    """
    library = kernels()
    assert library is not None
    assert 1 <= n < m <= MAX_COLUMNS
    num_columns, num_rows = weight.shape
    assert 0 <= columns.start <= columns.stop <= num_columns
    assert columns.start % m == columns.stop % m == num_columns % m == 0
    assert columns.stop - columns.start <= MAX_COLUMNS
    sweep = _Call(rows=num_rows, columns=num_columns)
    parts = {"weight": weight, "lost": lost, "pull": pull, "scale": scale, "inverse": inverse}
    sizes = (weight.numel(), weight.numel(), num_columns**2, num_columns, num_columns * m)
    for (name, tensor), size in zip(parts.items(), sizes):
        setattr(sweep, name, pointer(name, tensor, torch.float32, size))
    library.castlm_sweep(sweep, columns.start, columns.stop, n, m, torch.get_num_threads())
