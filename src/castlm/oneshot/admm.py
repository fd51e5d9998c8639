"""Finds better masks for a layer by ADMM: a refinement of SparseGPT, which never revisits a decision."""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.core.nm import LayerPattern
from castlm.oneshot.ranks import ALONE, MOST_ROWS, ByRows
from castlm.oneshot.solvers import row_energies

FIRST_PENALTY, LAST_PENALTY = 0.1, 1.0
"""Penalty on the squared distance between dense and n:m weights, for a Hessian whose diagonal is scaled to 1; it grows
geometrically. On layers of SmolLM2-135M, first penalties of 0.05 to 0.3 and last ones of 1 to 3 differ by less than 1 %
in error."""


def improve_masks(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    pattern: LayerPattern,
    iterations: int,
    by_rows: ByRows = ALONE,
) -> Tensor:
    """Weights with new masks that lower |X weight^T - X target^T|^2; a row that does not improve stays as it is.

    Least squares over n:m weights is split in two steps that alternate: least squares over dense weights, which an
    eigendecomposition solves exactly, and the nearest n:m weights, which the mask solves exactly. A growing penalty
    draws the two solutions together (ADMM, as in ALPS, Meng et al. 2024, arXiv 2406.07831).

    Args:
        weight: fp32, (rows, columns), of `pattern`: the start of the iterations.
        target: (rows, columns), the dense weights.
        hessian: X^T X, (columns, columns), damped, so that its diagonal is positive.
        iterations: each multiplies the weight twice by a (columns, columns) matrix.
        by_rows: divides the rows into panels, which bounds the memory to six times that of a panel.

    Returns:
        (rows, columns), of `pattern`. The kept weights are near their optimum; a refit reaches it.
    """
    # In units in which each input has energy 1, one penalty fits all columns: H' = S^-1 H S^-1, W' = W S.
    scale = hessian.diagonal().sqrt()  # (576,)
    values, vectors = torch.linalg.eigh((hessian / scale).div_(scale.unsqueeze(1)))
    penalties = torch.logspace(0, 1, iterations, base=LAST_PENALTY / FIRST_PENALTY).mul_(FIRST_PENALTY).tolist()

    def improved(sparse: Tensor, dense: Tensor) -> Tensor:
        # The mask of W S is chosen by |w_j| * |X_j|, Wanda's score, where that of W would ignore the inputs.
        new = _alternate(sparse * scale, dense * scale, values, vectors, pattern, penalties) / scale
        # |X w^T - X target^T|^2 of each row, (512,); a row with NaN is not better
        is_better = row_energies(dense - new, hessian) < row_energies(dense - sparse, hessian)
        return torch.where(is_better.unsqueeze(1), new, sparse)

    return by_rows(improved, weight, target)


def improve_masks_holds(rows: int, columns: int) -> int:
    """Elements that `improve_masks` holds at its peak, with its arguments."""
    size, square = rows * columns, columns**2
    find = 3 * size + 5 * square  # start, target and dense weight; H, damped and scaled, in the eigendecomposition
    alternate = 7 * size + 4 * min(rows, MOST_ROWS) * columns + 3 * square  # new rows and their dual; H and its vectors
    return max(find, alternate)


def _alternate(
    sparse: Tensor, target: Tensor, values: Tensor, vectors: Tensor, pattern: LayerPattern, penalties: list[float]
) -> Tensor:
    """The iterations of ADMM. With H = V diag(values) V^T and penalty p:

    .. code-block:: text

        dense  = (target H + p (sparse - dual)) (H + p I)^-1     least squares with the penalty, exact in the basis V
        sparse = nearest n:m weights to dense + dual
        dual   = dual + dense - sparse                           scaled by p / next p, as the penalty grows
    """
    pull = (target @ vectors).mul_(values)  # target H V, (1024, 576)
    dual = torch.zeros_like(sparse)
    # Two products of (512, 576) with (576, 576) an iteration: into the basis V, where the system is diagonal, and back.
    for penalty, next_penalty in zip(penalties, [*penalties[1:], penalties[-1]]):
        dense = sparse.sub_(dual).matmul(vectors).mul_(penalty).add_(pull).div_(values + penalty) @ vectors.T
        dense += dual
        sparse = dense * pattern.mask(dense)  # a quarter of the time of masked_fill
        dual = dense.sub_(sparse).mul_(penalty / next_penalty)  # `dense` holds dense + dual here
    return sparse.add_(0.0)  # a masked weight is 0, not -0
