"""Better n:m masks than SparseGPT's, which decides from left to right and never revisits a decision.

The problem of a layer, least squares over n:m weights, is split in two steps that alternate: least squares over dense
weights, which an eigendecomposition solves exactly, and the nearest n:m weights, which the mask solves exactly. A
growing penalty draws the two solutions together (ADMM, as in ALPS, Meng et al. 2024, arXiv 2406.07831).
"""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.core.nm import Pattern
from castlm.oneshot.solvers import better_rows

FIRST_PENALTY, LAST_PENALTY = 0.1, 1.0
"""Penalty on the squared distance between dense and n:m weights, for a Hessian whose diagonal is scaled to 1; it grows
geometrically. On layers of SmolLM2-135M, first penalties of 0.05 to 0.3 and last ones of 1 to 3 differ by less than 1 %
in error."""

ADMM_ROWS = 1024
"""Rows that are solved at a time, which bounds the memory to six times theirs."""


def improve_masks(weight: Tensor, target: Tensor, hessian: Tensor, pattern: Pattern, iterations: int) -> Tensor:
    """Weights with new masks that lower |X weight^T - X target^T|^2; a row that does not improve stays as it is.

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
    for rows, wanted in zip(weight.split(ADMM_ROWS), target.split(ADMM_ROWS)):
        new = _alternate(rows * scale, wanted * scale, values, vectors, pattern, penalties) / scale
        found.append(better_rows(new, rows, wanted, hessian))
    return torch.cat(found)


def _alternate(
    sparse: Tensor, target: Tensor, values: Tensor, vectors: Tensor, pattern: Pattern, penalties: list[float]
) -> Tensor:
    """The iterations, in units in which each input has energy 1. With H = V diag(values) V^T and penalty p:

    .. code-block:: text

        dense  = (target H + p (sparse - dual)) (H + p I)^-1     least squares with the penalty, exact in the basis V
        sparse = nearest n:m weights to dense + dual
        dual   = dual + dense - sparse                           scaled by p / next p, as the penalty grows
    """
    pull = (target @ vectors).mul_(values)  # target H V, (1024, 576)
    dual = torch.zeros_like(sparse)
    for penalty, following in zip(penalties, [*penalties[1:], penalties[-1]]):
        dense = sparse.sub_(dual).matmul(vectors).mul_(penalty).add_(pull).div_(values + penalty) @ vectors.T
        dense += dual
        sparse = dense * pattern.mask(dense)  # a quarter of the time of masked_fill
        dual = dense.sub_(sparse).mul_(penalty / following)  # `dense` holds dense + dual here
    return sparse.add_(0.0)  # a masked weight is 0, not -0
