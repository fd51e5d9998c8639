"""Learns the rotation of an axis that minimizes the loss of pruning the weights along it to n:m.

A rotation R of an activation x leaves the function of a network unchanged if weights that read x become `W R` and
weights that write it become `R^T W`. It changes the basis in which n of m weights are chosen. The objective is the loss
that optimal brain surgery predicts (Hassibi & Stork 1992): pruning w_j alone, while all other weights of its row
compensate, costs w_j^2 / [H^-1]_jj; here this is summed over the m - n cheapest weights of each group. It is
differentiable almost everywhere. Optimizing the error of the solved layer itself gave worse results, because its
gradient holds only for the current mask. R is the Cayley transform of a skew-symmetric matrix, found with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from castlm.core.nm import NM
from castlm.oneshot.solvers import row_energies
from castlm.oneshot.sparsegpt import sparsegpt

DAMPING = 0.01
"""Share of the mean diagonal that is added to a Hessian, as in SparseGPT."""

_ROWS = 512  # rows of a weight that are used in one iteration, or in an estimate of the solved error


@dataclass(frozen=True)
class Term:
    """A weight in the objective of a rotation.

    Its rotated axis is cut into consecutive parts of the rotation's size; `parts` has the rotation's number for each.
    """

    weight: Tensor
    """(out, in) fp32."""
    inverse: Tensor
    """The inverse of the damped Hessian of its input: (in, in) if columns turn; only its diagonal (in,) if rows do."""
    energy: float
    """tr(W H W^T), by which the predicted loss is divided."""
    axis: Literal["in", "out"]
    parts: tuple[int, ...]


def turn_columns(matrix: Tensor, rotations: Tensor, parts: Sequence[int]) -> Tensor:
    """`matrix` (rows, columns) times the block-diagonal matrix of `rotations[part]` (size, size) for each part."""
    size = rotations.shape[-1]
    cut = matrix.reshape(len(matrix), len(parts), size)  # (576, 576) -> (576, 9, 64)
    return torch.einsum("rps,pst->rpt", cut, rotations[list(parts)]).reshape(len(matrix), -1)


def skew_to_rotation(skew: Tensor) -> Tensor:
    """The Cayley transforms of the upper triangles of `skew` (num, size, size): rotations, the identity at 0."""
    upper = skew.triu(1)
    antisymmetric = upper - upper.mT
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # R = (I + S)^-1 (I - S) is orthogonal for any skew-symmetric S, so Adam needs no constraint.
    return torch.linalg.solve(identity + antisymmetric, identity - antisymmetric)


def complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis (size, size - 1) of the vectors whose entries sum to 0."""
    ones = torch.ones(size, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(size, dtype=torch.float64)[:, 1:]], dim=1)).Q
    return basis[:, 1:].float()


def learn_rotations(
    terms: Sequence[Term],
    num: int,
    size: int,
    pattern: NM,
    *,
    iterations: int,
    learning_rate: float,
    keep_mean: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """Rotations (num, size, size) that lower the predicted loss of `terms`, starting from the identity.

    Each iteration rotates, forward and backward, at most 512 rows of every term whose columns turn and the whole weight
    of every term whose rows turn, and solves `num` systems (size, size).

    Args:
        keep_mean: allow only rotations that keep the vector of ones, and with it the mean that LayerNorm subtracts.
        alive: called once per iteration.
    """
    device = terms[0].weight.device
    frame = complement_of_ones(size).to(device) if keep_mean else None
    free = size - 1 if keep_mean else size
    skew = torch.zeros(num, free, free, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([skew], lr=learning_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(iterations):
            optimizer.param_groups[0]["lr"] = learning_rate * (0.51 + 0.49 * math.cos(math.pi * step / iterations))
            rotations = _framed(skew_to_rotation(skew), frame)
            diagonals: dict[int, Tensor] = {}
            loss = torch.zeros((), device=device)
            for term in terms:
                loss = loss + _predicted_loss(term, rotations, diagonals, pattern, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            alive()
    return _framed(skew_to_rotation(skew), frame).detach()


def _framed(rotations: Tensor, frame: Tensor | None) -> Tensor:
    if frame is None:
        return rotations
    size = frame.shape[0]
    # F R F^T turns the vectors whose entries sum to 0, F (576, 575); 1 1^T / size keeps the vector of ones.
    return frame @ rotations @ frame.T + torch.full((size, size), 1 / size, device=frame.device)


def _predicted_loss(
    term: Term,
    rotations: Tensor,
    diagonals: dict[int, Tensor],
    pattern: NM,
    generator: torch.Generator,
) -> Tensor:
    """The share of the term's energy that pruning would cost, estimated on a random choice of its rows.

    Args:
        diagonals: a cache of the rotated inverses' diagonals by id(term.inverse), which terms with one input share.
    """
    rows = _some_rows(len(term.weight), generator)
    if term.axis == "out":
        weight = turn_columns(term.weight.T, rotations, term.parts).T
        weight, diagonal = (weight if rows is None else weight[rows]), term.inverse
    else:
        weight = turn_columns(term.weight if rows is None else term.weight[rows], rotations, term.parts)
        if id(term.inverse) not in diagonals:
            diagonals[id(term.inverse)] = rotated_diagonal(term.inverse, rotations, term.parts)
        diagonal = diagonals[id(term.inverse)]
    cost = weight.square() / diagonal  # w_j^2 / [H^-1]_jj, (512, 576)
    lost = (cost * ~pattern.mask(cost.detach())).sum()  # the m - n lowest of each group, several times faster than topk
    return lost * (len(term.weight) / len(weight) / term.energy)


def rotated_diagonal(matrix: Tensor, rotations: Tensor, parts: Sequence[int]) -> Tensor:
    """The diagonal of R^T A R for a block-diagonal R. It needs only the diagonal blocks of A = `matrix`."""
    size = rotations.shape[-1]
    # (576, 576) -> (9, 64, 9, 64) -> the 9 diagonal blocks (64, 64, 9) -> (9, 64, 64)
    blocks = matrix.view(len(parts), size, len(parts), size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    chosen = rotations[list(parts)]
    return ((blocks @ chosen) * chosen).sum(1).reshape(-1)


def _some_rows(num_rows: int, generator: torch.Generator) -> Tensor | None:
    """A random choice of `_ROWS` rows, int64; None if there are no more."""
    return torch.randperm(num_rows, generator=generator)[:_ROWS] if num_rows > _ROWS else None


def solved_error(weight: Tensor, hessian: Tensor, pattern: NM) -> float:
    """Relative output error tr(D H D^T) / tr(W H W^T) of a weight (out, in) pruned by SparseGPT, on 512 of its rows."""
    return solved_errors([weight], hessian, pattern)[0]


def solved_errors(weights: Sequence[Tensor], hessian: Tensor, pattern: NM) -> list[float]:
    """`solved_error` of weights that read the same input, solved together."""
    chosen = []
    for weight in weights:
        rows = _some_rows(len(weight), torch.Generator().manual_seed(0))
        chosen.append(weight if rows is None else weight[rows])
    stacked = torch.cat(chosen)
    pruned, _ = sparsegpt(stacked.clone(), hessian.clone(), pattern.n, pattern.m, DAMPING)
    lost, whole = (row_energies(x, hessian).split([*map(len, chosen)]) for x in (stacked - pruned, stacked))
    return [float(part.sum() / of.sum().clamp(min=1e-30)) for part, of in zip(lost, whole)]
