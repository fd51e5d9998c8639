"""One-shot solvers of a layer, written from their papers: magnitude, Wanda, SparseGPT and refinements of SparseGPT.

A solver is a row of `SOLVERS`: it prunes a weight, given a statistic of the input. SparseGPT decides from left to right
and never revisits a decision. ADMM finds better masks (`improve_masks`), and conjugate gradients better values for a
mask (`refit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from castlm.core.nm import NM, Pattern
from castlm.oneshot.options import NO_REFINEMENTS, Refinements
from castlm.oneshot.sparsegpt import sparsegpt, sparsegpt_holds

MIN_DAMPING = 1e-3
"""Smallest damping, as a share of the mean diagonal, where a Hessian is inverted outside SparseGPT."""

REFIT_ROWS = 1024
"""Rows that are refitted at a time, so that the working set of an iteration stays in the processor's cache."""

ADMM_ROWS = 1024
"""Rows whose masks are improved at a time, which bounds the memory to six times theirs."""

FIRST_PENALTY, LAST_PENALTY = 0.1, 1.0
"""Penalty on the squared distance between dense and n:m weights, for a Hessian whose diagonal is scaled to 1; it grows
geometrically. On layers of SmolLM2-135M, first penalties of 0.05 to 0.3 and last ones of 1 to 3 differ by less than 1 %
in error."""

ERROR_TOKENS = 256
"""Calibration tokens on which the reconstruction error of a layer is measured."""

_GRAM_COLUMNS = 128  # of X^T X at a time; 256 take a tenth longer for 1,024 tokens of 576 or 1,536 columns (Zen 3)


class Settings(NamedTuple):
    """The settings of a start that solvers and refinements read."""

    pattern: Pattern
    refinements: Refinements = NO_REFINEMENTS


class Pruned(NamedTuple):
    """The result of a solver: the new weight, and SparseGPT's damping."""

    weight: Tensor
    damping: float | None = None


class Solver(NamedTuple):
    """A row of `SOLVERS`."""

    prune: Callable[[Tensor, Tensor, Settings], Pruned]
    """`prune(weight, statistic, settings)` prunes an fp32 weight (rows, columns); it may overwrite the statistic."""
    add: Callable[[Tensor, Tensor, int], None] | None = None
    """`add(statistic, x, num_sequences)` adds x (tokens, columns) fp32; None for a method without statistic."""
    axes: int = 0
    """The number of axes of the statistic: 1 for (columns,), 2 for (columns, columns)."""
    holds: Callable[[int, int], int] = lambda rows, columns: 2 * rows * columns
    """`holds(rows, columns)`: the elements that `prune` holds at its peak, beside its arguments. `castlm plan memory`
    reads it; by default, magnitudes and the new weight."""

    def zeros(self, x: Tensor) -> Tensor:
        """An empty statistic for inputs like `x` (..., columns), on its device."""
        return torch.zeros((x.shape[-1],) * self.axes, device=x.device)


def _magnitude(weight: Tensor, statistic: Tensor, settings: Settings) -> Pruned:
    return Pruned(weight.masked_fill(~settings.pattern.mask(weight), 0))


def _add_squared_norms(squared_norms: Tensor, x: Tensor, num_sequences: int) -> None:
    squared_norms.add_(x.square().sum(0), alpha=1 / num_sequences)  # a mean over sequences, (576,)


def _wanda(weight: Tensor, squared_norms: Tensor, settings: Settings) -> Pruned:
    """Keeps the largest |W_ij| * |X_j| (Sun et al. 2023, arXiv 2306.11695, Eq. 1); kept weights do not change."""
    mask = settings.pattern.mask(weight * squared_norms.sqrt())  # (1536, 576) * (576,)
    return Pruned(weight.masked_fill(~mask, 0))


def _wanda_holds(rows: int, columns: int) -> int:
    return 3 * rows * columns  # scores, their magnitudes, and the new weight


def _add_hessian(hessian: Tensor, x: Tensor, num_sequences: int) -> None:
    """Adds 2/num_sequences X^T X to the upper triangle of H, by blocks of rows: half of the work of a full product."""
    for start in range(0, x.shape[1], _GRAM_COLUMNS):
        rows = slice(start, start + _GRAM_COLUMNS)  # (128, tokens) @ (tokens, 1536 - start)
        hessian[rows, start:].addmm_(x[:, rows].T, x[:, start:], alpha=2 / num_sequences)


def whole_hessian(hessian: Tensor) -> Tensor:
    """Mirrors the upper triangle of a Hessian (columns, columns) into the lower one, in place."""
    hessian.triu_()
    hessian += hessian.triu(1).T
    return hessian


def _sparsegpt(weight: Tensor, hessian: Tensor, settings: Settings) -> Pruned:
    assert isinstance(settings.pattern, NM)
    pattern, damping = settings.pattern, settings.refinements.damping
    return Pruned(*sparsegpt(weight, whole_hessian(hessian), pattern.n, pattern.m, damping))


SOLVERS: dict[str, Solver] = {
    "magnitude": Solver(_magnitude),
    "wanda": Solver(_wanda, _add_squared_norms, axes=1, holds=_wanda_holds),
    "sparsegpt": Solver(_sparsegpt, _add_hessian, axes=2, holds=sparsegpt_holds),
}


class Accumulator(Protocol):
    """Sums a statistic over the inputs of a layer: a `Solver`, or another object with its `add` and `zeros`."""

    @property
    def add(self) -> Callable[[Any, Tensor, int], None] | None: ...

    def zeros(self, x: Tensor) -> Any: ...


class LayerInput:
    """One input of a block's layers, which one or more layers read, with its statistic over all passes.

    Attributes:
        names: the names of the layers.
        sample: the first 256 tokens (tokens, in) fp32, on which errors are measured.
        num_few: see `castlm.oneshot.routed.RoutedInputs`.
    """

    num_few = 0

    def __init__(self, x: Tensor, accumulator: Accumulator | None) -> None:
        self.names: list[str] = []
        self.current: Tensor | None = None  # in this pass; held, so that no new tensor can have its identity
        self.sample = x.reshape(-1, x.shape[-1])[:ERROR_TOKENS].to(torch.float32, copy=True)
        self.statistic: Any = None if accumulator is None else accumulator.zeros(x)

    def add(self, x: Tensor, accumulator: Accumulator | None, num_sequences: int) -> None:
        """Adds x (..., in) to the statistic, in fp32 even if the block runs under autocast."""
        if accumulator is not None and accumulator.add is not None:
            with torch.autocast(x.device.type, enabled=False):
                accumulator.add(self.statistic, x.reshape(-1, x.shape[-1]).float(), num_sequences)

    def entries(self) -> list[LayerInput]:
        """The inputs that have a statistic of their own."""
        return [self]


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
    conjugate gradients on 1,024 rows at a time, which bounds the memory to seven times theirs, preconditioned by the
    diagonal of `hessian` = X^T X, damped. A row that does not improve stays as it is.
    """
    chunks = zip(weight.split(REFIT_ROWS), target.split(REFIT_ROWS))
    return torch.cat([_refit_rows(rows, rows_target, hessian, iterations) for rows, rows_target in chunks])


def refit_holds(rows: int, columns: int) -> int:
    """Elements that `refit` holds at its peak, with its arguments."""
    # start, target and result; of the rows at work, mask, loss, residual, direction, step and new weight; H, damped
    return 3 * rows * columns + 7 * min(rows, REFIT_ROWS) * columns + 2 * columns**2


def _refit_rows(weight: Tensor, target: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    # Each row w solves M H M w = M H target with its own M = diag(mask); the rows share only the product with H.
    mask = (weight != 0).to(weight.dtype)  # (1024, 576)
    inverse = 1 / hessian.diagonal()  # the preconditioner P, (576,)
    start, weight = weight, weight.clone()
    first = ((target - start) @ hessian).mul_(mask)  # minus half the gradient, (1024, 576)
    residual = first.clone()
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
    # The error is quadratic in w, so it has fallen by the step times the sum of the gradients at both of its ends.
    fall = torch.linalg.vecdot(weight - start, first.add_(residual))
    return torch.where(fall.unsqueeze(1) > 0, weight, start)  # NaN is not above 0


def improve_masks(weight: Tensor, target: Tensor, hessian: Tensor, pattern: Pattern, iterations: int) -> Tensor:
    """Weights with new masks that lower |X weight^T - X target^T|^2; a row that does not improve stays as it is.

    Least squares over n:m weights is split in two steps that alternate: least squares over dense weights, which an
    eigendecomposition solves exactly, and the nearest n:m weights, which the mask solves exactly. A growing penalty
    draws the two solutions together (ADMM, as in ALPS, Meng et al. 2024, arXiv 2406.07831).

    Args:
        weight: fp32, (rows, columns), of `pattern`: the start of the iterations.
        target: (rows, columns), the dense weights.
        hessian: X^T X, (columns, columns), damped, so that its diagonal is positive.
        iterations: each multiplies the weight twice by a (columns, columns) matrix.

    Returns:
        (rows, columns), of `pattern`. The kept weights are near their optimum; a refit reaches it.
    """
    # In units in which each input has energy 1, one penalty fits all columns: H' = S^-1 H S^-1, W' = W S.
    scale = hessian.diagonal().sqrt()  # (576,)
    values, vectors = torch.linalg.eigh((hessian / scale).div_(scale.unsqueeze(1)))
    penalties = torch.logspace(0, 1, iterations, base=LAST_PENALTY / FIRST_PENALTY).mul_(FIRST_PENALTY).tolist()
    found = []
    for sparse_rows, dense_rows in zip(weight.split(ADMM_ROWS), target.split(ADMM_ROWS)):
        new = _alternate(sparse_rows * scale, dense_rows * scale, values, vectors, pattern, penalties) / scale
        found.append(_better_rows(new, sparse_rows, dense_rows, hessian))
    return torch.cat(found)


def improve_masks_holds(rows: int, columns: int) -> int:
    """Elements that `improve_masks` holds at its peak, with its arguments."""
    size, square = rows * columns, columns**2
    find = 3 * size + 5 * square  # start, target and dense weight; H, damped and scaled, in the eigendecomposition
    alternate = 7 * size + 4 * min(rows, ADMM_ROWS) * columns + 3 * square  # new rows and their dual; H and its vectors
    return max(find, alternate)


def _alternate(
    sparse: Tensor, target: Tensor, values: Tensor, vectors: Tensor, pattern: Pattern, penalties: list[float]
) -> Tensor:
    """The iterations of ADMM. With H = V diag(values) V^T and penalty p:

    .. code-block:: text

        dense  = (target H + p (sparse - dual)) (H + p I)^-1     least squares with the penalty, exact in the basis V
        sparse = nearest n:m weights to dense + dual
        dual   = dual + dense - sparse                           scaled by p / next p, as the penalty grows
    """
    pull = (target @ vectors).mul_(values)  # target H V, (1024, 576)
    dual = torch.zeros_like(sparse)
    for penalty, next_penalty in zip(penalties, [*penalties[1:], penalties[-1]]):
        dense = sparse.sub_(dual).matmul(vectors).mul_(penalty).add_(pull).div_(values + penalty) @ vectors.T
        dense += dual
        sparse = dense * pattern.mask(dense)  # a quarter of the time of masked_fill
        dual = dense.sub_(sparse).mul_(penalty / next_penalty)  # `dense` holds dense + dual here
    return sparse.add_(0.0)  # a masked weight is 0, not -0


def _better_rows(new: Tensor, old: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """The row of `new` or of `old` with the smaller |X weight^T - X target^T|^2, for each row."""
    better = row_energies(target - new, hessian) < row_energies(target - old, hessian)  # False for NaN
    return torch.where(better.unsqueeze(1), new, old)


def row_energies(weight: Tensor, gram: Tensor) -> Tensor:
    """|X w|^2 (rows,) of each row w of `weight` (rows, columns), where `gram` is X^T X."""
    return ((weight @ gram) * weight).sum(1)
