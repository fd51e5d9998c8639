"""Cholesky factors of a damped Hessian, which SparseGPT, GPTQ and the changes of basis share."""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.core.errors import InputError


def upper_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """R upper triangular with R R^T = H + damping * mean(diag H) * I, and the damping."""
    # Cholesky gives H = L L^T with L lower triangular. Of H with both axes reversed, reversing L gives the upper R.
    lower, damping = lower_factor(hessian.flip(0, 1), damping)
    return lower.flip(0, 1), damping


def lower_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The Cholesky factor L of H + damping * mean(diag H) * I, and the damping, raised tenfold until there is one.

    From 0 it is raised to 0.01. The diagonal of `hessian` is overwritten. Raises `InputError` if a damping of 1 does
    not suffice.
    """
    diagonal = hessian.diagonal()
    # The mean of the undamped diagonal: raising the damping must not compound.
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
