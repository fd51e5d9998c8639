"""The refinements of SparseGPT: better masks for a layer by ADMM, and a refit of its kept weights.

SparseGPT never revisits a decision. ADMM does; conjugate gradients leave the mask as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from castlm.core.nm import Pattern
from castlm.oneshot.ranks import by_rows, share_each
from castlm.oneshot.solvers import row_energies
from castlm.world import ALONE, World

FIRST_PENALTY, LAST_PENALTY = 0.1, 1.0
"""Penalty on the squared distance between dense and n:m weights, for a Hessian whose diagonal is scaled to 1; it grows
geometrically. On layers of SmolLM2-135M, first penalties of 0.05 to 0.3 and last ones of 1 to 3 differ by less than 1 %
in error."""


def improve_masks(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    iterations: int,
    world: World = ALONE,
) -> Tensor:
    """Weights with new masks that lower |X weight^T - X target^T|^2; a row that does not improve stays as it is.

    Least squares over n:m weights is split in two steps that alternate: least squares over dense weights, which
    `system_of` solves exactly, and the nearest n:m weights, which the mask solves exactly. A growing penalty draws the
    two solutions together (ADMM, as in ALPS, Meng et al. 2024, arXiv 2406.07831).

    Args:
        weight: fp32, (rows, columns), of `pattern`: the start of the iterations.
        target: (rows, columns), the dense weights.
        hessian: X^T X, (columns, columns), damped, so that its diagonal is positive.
        iterations: each multiplies the weight by a (columns, columns) matrix, on a CPU twice.
        world: the ranks that divide the panels of rows, whose size bounds the memory of a CPU to six times a panel, and
            the inverses that a GPU takes.

    Returns:
        (rows, columns), of `pattern`. The kept weights are near their optimum; a refit reaches it.
    """
    # In units in which each input has energy 1, one penalty fits all columns: H' = S^-1 H S^-1, W' = W S.
    scale = hessian.diagonal().sqrt()  # (576,)
    penalties = torch.logspace(0, 1, iterations, base=LAST_PENALTY / FIRST_PENALTY).mul_(FIRST_PENALTY).tolist()
    system = system_of((hessian / scale).div_(scale.unsqueeze(1)), penalties, world)

    def improved(panels: Sequence[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        # The mask of W S is chosen by |w_j| * |X_j|, Wanda's score, where that of W would ignore the inputs.
        at_work = [_Rows(sparse * scale, dense * scale, system, pattern) for sparse, dense in panels]
        for penalty, next_penalty in zip(penalties, [*penalties[1:], penalties[-1]]):
            system.begin(penalty)
            for rows in at_work:
                rows.iterate(system, penalty / next_penalty)
        for (sparse, dense), rows in zip(panels, at_work):
            new = rows.sparse.add_(0.0) / scale  # a masked weight is 0, not -0
            # |X w^T - X target^T|^2 of each row, (512,); a row with NaN is not better
            is_better = row_energies(dense - new, hessian) < row_energies(dense - sparse, hessian)
            yield torch.where(is_better.unsqueeze(1), new, sparse)

    if system.at_once:
        return by_rows(world, improved, weight, target, at_once=True)
    return by_rows(world, lambda *panel: next(improved([panel])), weight, target)


class _Rows:
    """Some rows at work. With the scaled H and target W, an iteration of ADMM with penalty p is:

    .. code-block:: text

        dense  = (W H + p (sparse - dual)) (H + p I)^-1          least squares with the penalty, exact
        sparse = nearest n:m weights to dense + dual
        dual   = dual + dense - sparse                           scaled by p / next p, as the penalty grows
    """

    def __init__(self, sparse: Tensor, target: Tensor, system: System, pattern: Pattern) -> None:
        self.sparse, self.dual, self.pattern = sparse, torch.zeros_like(sparse), pattern
        self.pull = system.pull(target)  # (512, 576)

    def iterate(self, system: System, shrink: float) -> None:
        """One iteration; `shrink` is p / next p."""
        dense = system.solve(self.sparse.sub_(self.dual), self.pull)
        dense += self.dual
        self.sparse = dense * self.pattern.mask(dense)  # a quarter of the time of masked_fill
        self.dual = dense.sub_(self.sparse).mul_(shrink)  # `dense` holds dense + dual here


class Eigenvectors:
    """Solves systems with H + p I, H = V diag(values) V^T (columns, columns), in the basis V, where they are diagonal.

    V serves all penalties, so that each panel of rows takes all of its iterations while it is in the cache. On two
    cores of an AMD EPYC, the 16 `Inverses` of 2,048 columns take four times as long as V (0.67 and 2.88 s).
    """

    at_once = False
    """Whether all panels of rows take an iteration before any takes the next."""

    def __init__(self, hessian: Tensor, penalties: Sequence[float], world: World = ALONE) -> None:
        self.values: Tensor
        self.vectors: Tensor
        self.values, self.vectors = torch.linalg.eigh(hessian)

    def pull(self, target: Tensor) -> Tensor:
        """The share W H of the target in `solve`, (rows, columns)."""
        return (target @ self.vectors).mul_(self.values)

    def begin(self, penalty: float) -> None:
        """Fixes p for the calls of `solve` that follow."""
        self.penalty = penalty

    def solve(self, weight: Tensor, pull: Tensor) -> Tensor:
        """(W H + p weight) (H + p I)^-1; it may overwrite `weight` (rows, columns)."""
        # Two products of (512, 576) with (576, 576): into the basis V, and back.
        turned = weight.matmul(self.vectors).mul_(self.penalty).add_(pull)
        return turned.div_(self.values + self.penalty) @ self.vectors.T


class Inverses:
    """As `Eigenvectors`, by the inverse of H + p I for each p, from its Cholesky factor.

    For a GPU, which multiplies and factorizes matrices far faster than it finds eigenvectors. An inverse serves all
    rows, so that they take an iteration together, and one rank makes it for all. No GPU has run it yet.

    Args:
        penalties: given to `begin` one after another, in this order.
    """

    at_once = True

    def __init__(self, hessian: Tensor, penalties: Sequence[float], world: World = ALONE) -> None:
        self.hessian = hessian
        self._inverses = share_each(world, [partial(self._inverse, penalty) for penalty in penalties], hessian)

    def pull(self, target: Tensor) -> Tensor:
        return target @ self.hessian

    def begin(self, penalty: float) -> None:
        self.penalty = penalty
        self.inverse = self.hessian[:0]  # frees the last one before the next is made
        self.inverse = next(self._inverses)

    def _inverse(self, penalty: float) -> Tensor:
        system = self.hessian.clone()
        system.diagonal().add_(penalty)
        # `cholesky_ex` does not raise if it fails: rows from a wrong inverse are not better, and stay as they are.
        factor = torch.linalg.cholesky_ex(system).L
        del system  # (28672, 28672) of a 70B model is 3 GiB
        return torch.cholesky_inverse(factor).contiguous()

    def solve(self, weight: Tensor, pull: Tensor) -> Tensor:
        return weight.mul_(self.penalty).add_(pull) @ self.inverse


System = Eigenvectors | Inverses


def system_of(hessian: Tensor, penalties: Sequence[float], world: World) -> System:
    """The system of a scaled Hessian that suits its device."""
    kind = Eigenvectors if hessian.device.type == "cpu" else Inverses
    return kind(hessian, penalties, world)


def refit(weight: Tensor, target: Tensor, hessian: Tensor, iterations: int, world: World = ALONE) -> Tensor:
    """Moves the non-zeros of `weight` (rows, columns) towards the minimum of |X weight^T - X target^T|^2.

    SparseGPT compensates a pruned weight only with weights to its right; this uses all kept weights of a row. It runs
    conjugate gradients on the panels of `by_rows`, which bounds the memory to seven times theirs and keeps the working
    set of an iteration in the processor's cache, preconditioned by the diagonal of `hessian` = X^T X, damped. A row
    that does not improve stays as it is.
    """
    return by_rows(world, lambda rows, target_rows: _refit_rows(rows, target_rows, hessian, iterations), weight, target)


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
        step = (direction @ hessian).mul_(mask)  # A d with A = M H M, (1024, 576)
        # r^T P r / d^T A d of each row; a row that has arrived divides 0 by 1e-30
        length = energy / torch.linalg.vecdot(direction, step).unsqueeze(1).clamp_(min=1e-30)
        weight.addcmul_(length, direction)
        residual.addcmul_(length, step, value=-1)
        preconditioned = torch.mul(residual, inverse, out=step)
        new = torch.linalg.vecdot(residual, preconditioned).unsqueeze(1)
        # the next direction, conjugate to those before
        torch.addcmul(preconditioned, new / energy.clamp_(min=1e-30), direction, out=direction)
        energy = new
    # The error is quadratic in w, so it has fallen by the step times the sum of the gradients at both of its ends.
    fall = torch.linalg.vecdot(weight - start, first.add_(residual))
    return torch.where(fall.unsqueeze(1) > 0, weight, start)  # NaN is not above 0
