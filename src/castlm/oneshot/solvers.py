"""One-shot solvers of a layer: magnitude, Wanda and SparseGPT, written from their papers. One row of `SOLVERS` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from castlm.core.nm import NM, Pattern
from castlm.oneshot.sparsegpt import sparsegpt

MIN_DAMPING = 1e-3
"""Smallest damping, as a share of the mean diagonal, where a Hessian is inverted outside SparseGPT."""

REFIT_ROWS = 1024
"""Rows that are refitted at a time, so that the working set of an iteration stays in the processor's cache."""

_GRAM_COLUMNS = 256  # of X^T X at a time


class Settings(NamedTuple):
    """The pattern and the numbers that the solvers read."""

    pattern: Pattern
    damping: float
    block_size: int


class Pruned(NamedTuple):
    """The result of a solver: the new weight, the number of columns whose input is always 0, SparseGPT's damping."""

    weight: Tensor
    num_dead: int = 0
    damping: float | None = None


class Solver(NamedTuple):
    """A row of `SOLVERS`."""

    prune: Callable[[Tensor, Tensor, Settings], Pruned]
    """`prune(weight, statistic, settings)` prunes an fp32 weight (rows, columns); it may overwrite the statistic."""
    add: Callable[[Tensor, Tensor, int], None] | None = None
    """`add(statistic, x, num_sequences)` adds x (tokens, columns) fp32; None for a method without statistic."""
    axes: int = 0
    """The number of axes of the statistic: 1 for (columns,), 2 for (columns, columns)."""

    def zeros(self, x: Tensor) -> Tensor:
        """An empty statistic for inputs like `x` (..., columns), on its device."""
        return torch.zeros((x.shape[-1],) * self.axes, device=x.device)


def _magnitude(weight: Tensor, statistic: Tensor, to: Settings) -> Pruned:
    return Pruned(weight.masked_fill(~to.pattern.mask(weight), 0))


def _add_squared_norms(squared_norms: Tensor, x: Tensor, num_sequences: int) -> None:
    """Adds the squared norm of each column, as a mean over sequences."""
    squared_norms.add_(x.square().sum(0), alpha=1 / num_sequences)


def _wanda(weight: Tensor, squared_norms: Tensor, to: Settings) -> Pruned:
    """Keeps the largest |W_ij| * |X_j| (Sun et al. 2023, arXiv 2306.11695, Eq. 1); kept weights do not change."""
    mask = to.pattern.mask(weight * squared_norms.sqrt())  # (1536, 576) * (576,)
    return Pruned(weight.masked_fill(~mask, 0), int((squared_norms == 0).sum()))


def _add_hessian(hessian: Tensor, x: Tensor, num_sequences: int) -> None:
    """Adds 2/num_sequences X^T X to the upper triangle of H, by blocks of rows: half of the work of a full product."""
    for start in range(0, x.shape[1], _GRAM_COLUMNS):
        rows = slice(start, start + _GRAM_COLUMNS)  # (256, tokens) @ (tokens, 1536 - start)
        hessian[rows, start:].addmm_(x[:, rows].T, x[:, start:], alpha=2 / num_sequences)


def whole_hessian(hessian: Tensor) -> Tensor:
    """Mirrors the upper triangle of a Hessian (columns, columns) into the lower one, in place."""
    hessian.triu_()
    hessian += hessian.triu(1).T
    return hessian


def _sparsegpt(weight: Tensor, hessian: Tensor, to: Settings) -> Pruned:
    num_dead = int((hessian.diagonal() == 0).sum())
    whole_hessian(hessian)
    assert isinstance(to.pattern, NM)
    new, damping = sparsegpt(weight, hessian, to.pattern.n, to.pattern.m, to.damping, to.block_size)
    return Pruned(new, num_dead, damping)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A copy that can be inverted: its diagonal gets a 1 for dead inputs, then `damping` times its mean."""
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return result


def refit(weight: Tensor, target: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    """Moves the non-zeros of `weight` (rows, columns) towards the minimum of |X weight^T - X target^T|^2.

    SparseGPT compensates a pruned weight only with weights to its right; this uses all kept weights of a row. It runs
    conjugate gradients on many rows at once, preconditioned by the diagonal of `hessian` = X^T X, damped. A row that
    does not improve stays as it is, for example with a singular `hessian`. Takes 1,024 rows at a time, which bounds the
    memory to seven times theirs.
    """
    chunks = zip(weight.split(REFIT_ROWS), target.split(REFIT_ROWS))
    return torch.cat([_refit_rows(rows, rows_target, hessian, iterations) for rows, rows_target in chunks])


def _refit_rows(weight: Tensor, target: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    # Each row w solves M H M w = M H target with its own M = diag(mask); the rows share only the product with H.
    mask, inverse, start = (weight != 0).to(weight.dtype), 1 / hessian.diagonal(), weight
    weight = weight.clone()
    residual = ((target - weight) @ hessian).mul_(mask)  # minus half the gradient, (1024, 576)
    direction = residual * inverse
    energy = torch.linalg.vecdot(residual, direction).unsqueeze(1)  # r^T P r of each row, (1024, 1)
    for _ in range(iterations):
        step = (direction @ hessian).mul_(mask)
        length = energy / torch.linalg.vecdot(direction, step).unsqueeze(1).clamp_(min=1e-30)
        weight.addcmul_(length, direction)
        residual.addcmul_(length, step, value=-1)
        preconditioned = torch.mul(residual, inverse, out=step)
        new = torch.linalg.vecdot(residual, preconditioned).unsqueeze(1)
        torch.addcmul(preconditioned, new / energy.clamp_(min=1e-30), direction, out=direction)
        energy = new
    return better_rows(weight, start, target, hessian)


def better_rows(new: Tensor, old: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """The row of `new` or of `old` with the smaller |X weight^T - X target^T|^2, for each row."""
    better = row_energies(target - new, hessian) < row_energies(target - old, hessian)  # False for NaN
    return torch.where(better.unsqueeze(1), new, old)


def row_energies(weight: Tensor, gram: Tensor) -> Tensor:
    """|X w|^2 (rows,) of each row w of `weight` (rows, columns), where `gram` is X^T X."""
    return ((weight @ gram) * weight).sum(1)


SOLVERS: dict[str, Solver] = {
    "magnitude": Solver(_magnitude),
    "wanda": Solver(_wanda, _add_squared_norms, axes=1),
    "sparsegpt": Solver(_sparsegpt, _add_hessian, axes=2),
}
