"""Refits the kept weights of a layer by conjugate gradients, with its mask as it is: a refinement of SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.oneshot.ranks import ALONE, MAX_ROWS, ByRows


def refit(weight: Tensor, target: Tensor, hessian: Tensor, iterations: int, by_rows: ByRows = ALONE) -> Tensor:
    """Moves the non-zeros of `weight` (rows, columns) towards the minimum of |X weight^T - X target^T|^2.

    SparseGPT compensates a pruned weight only with weights to its right; this uses all kept weights of a row. It runs
    conjugate gradients on the panels of `by_rows`, which bounds the memory to seven times theirs and keeps the working
    set of an iteration in the processor's cache, preconditioned by the diagonal of `hessian` = X^T X, damped. A row
    that does not improve stays as it is.
    """
    return by_rows(lambda rows, target_rows: _refit_rows(rows, target_rows, hessian, iterations), weight, target)


def refit_holds(rows: int, columns: int) -> int:
    """Elements that `refit` holds at its peak, with its arguments."""
    # start, target and result; of the rows at work, mask, loss, residual, direction, step and new weight; H, damped
    return 3 * rows * columns + 7 * min(rows, MAX_ROWS) * columns + 2 * columns**2


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
