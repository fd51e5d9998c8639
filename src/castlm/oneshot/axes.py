"""Finds the order, or the rotation, of an axis in which pruning the weights along it to n:m loses less.

An order only divides the channels into groups. The search starts from channels dealt out by importance, as in RIA
(Zhang et al. 2024). Each round takes one channel out of every group and puts all of them back by a linear assignment,
which is solved exactly, so that the kept score never falls.

A rotation R of an activation x leaves the function of a network unchanged if weights that read x become `W R` and
weights that write it become `R^T W`. It changes the basis in which n of m weights are chosen. The objective is the loss
that optimal brain surgery predicts (Hassibi & Stork 1992): pruning w_j alone, while all other weights of its row
compensate, costs w_j^2 / [H^-1]_jj; here this is summed over the m - n cheapest weights of each group. It is
differentiable almost everywhere. Optimizing the error of the solved layer itself gave worse results, because its
gradient holds only for the current mask. R is the Cayley transform of a skew-symmetric matrix, found with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from castlm.core.nm import NM
from castlm.oneshot.solvers import row_energies
from castlm.oneshot.sparsegpt import sparsegpt_by_factor

_RATE = 0.03  # of Adam, for the skew matrix of a rotation
_ROWS = 512  # rows of a weight that are used in one iteration, or in an estimate of the solved error
_SCORE_ROWS = 1024
"""The largest number of rows of a score that the search uses. More rows lower the error more than more rounds do."""
_MAX_GROUPS = 512
"""The largest number of groups in one assignment, whose time grows with its cube: for 2,048 groups in parts of 512, the
search finds 95 % of the gain in a twelfth of the time (random scores, one thread, AMD EPYC)."""


def find_permutation(score: Tensor, pattern: NM, rounds: int) -> Tensor:
    """The order of columns, int64 (columns,) on the CPU, in which n:m keeps most of `score` (rows, columns), all >= 0.

    A GPU computes the costs of the assignments of its scores, and a CPU solves them. No GPU has run it yet.
    """
    score = score.float()
    # The same rows in each process: an order must not depend on who finds it.
    if len(score) > _SCORE_ROWS:
        score = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(0))[:_SCORE_ROWS]]
    # From the most to the least important, the columns are dealt out to the groups one after another, so that each
    # group has one of every quarter: (1536,) -> (4, 384) -> (384, 4)
    ranked = score.sum(0).argsort(descending=True, stable=True).cpu()
    order = ranked.view(pattern.m, -1).T.reshape(-1)
    columns = score.T.contiguous()
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds):
        order = _reassigned(columns, order, number, pattern, generator)
    return order


def _reassigned(columns: Tensor, order: Tensor, number: int, pattern: NM, generator: torch.Generator) -> Tensor:
    """`order` after one round: one column leaves each group, and a linear assignment puts all of them back.

    More than `_MAX_GROUPS` groups are divided at random into parts of that size, with one assignment each.

    A row keeps the n best of a group's m columns. With n of 2 and a rest of m - 1 columns, the best of the rest stays
    whichever column comes, and the second best, the threshold, stays unless the new column is larger: the row keeps the
    best n - 1 of the rest, and max(threshold, candidate). The first part does not depend on the assignment, so the sum
    of the maxima over the rows is what an assignment gains.
    """
    m, device = pattern.m, columns.device
    groups = order.view(-1, m)  # (384, 4)
    num_groups = len(groups)
    all_groups = torch.arange(num_groups)
    if number < m:  # the last of each group, then the last but one, ...: the least important leave first
        leaving = torch.full((num_groups,), m - 1 - number)
    else:
        leaving = torch.randint(m, (num_groups,), generator=generator)
    stays = torch.ones_like(groups, dtype=torch.bool)  # (384, 4), False at the leaver of each group
    stays[all_groups, leaving] = False
    leavers = groups[all_groups, leaving]  # (384,)
    rest = groups[stays].view(-1, m - 1)  # (384, 3)
    parts: Sequence[Tensor] = (all_groups,)
    if num_groups > _MAX_GROUPS:
        parts = torch.randperm(num_groups, generator=generator).split(_MAX_GROUPS)
    new = groups.clone()
    for part in parts:
        # The threshold of each group and row, the n-th best of the rest: (384, 3, 256) -> (384, 256)
        cut = columns[rest[part].to(device)].topk(pattern.n, dim=1).values[:, pattern.n - 1]
        candidates = columns[leavers[part].to(device)]  # (384, 256)
        # cost[i, j] = -sum over rows of max(threshold of group i, candidate j)
        cost = -torch.stack([torch.maximum(threshold, candidates).sum(1) for threshold in cut])  # (384, 384)
        cost -= cost.amin(1, keepdim=True)  # leaves the solution as it is, and finds it two to four times as fast
        cost -= cost.amin(0)
        _, chosen = linear_sum_assignment(cost.cpu().numpy())  # chosen[i]: the leaver that group i takes
        new[part, leaving[part]] = leavers[part][torch.as_tensor(chosen)]
    return new.reshape(-1)


@dataclass(frozen=True)
class Term:
    """A weight in the objective of a rotation.

    Its rotated axis is cut into consecutive parts of the rotation's size; `parts` has the rotation's number for each.
    """

    weight: Tensor  # (out, in) fp32
    inverse: Tensor
    """The inverse of the damped Hessian of its input, (in, in); for axis "out" only its diagonal, (in,)."""
    energy: float  # tr(W H W^T), by which the predicted loss is divided
    axis: Literal["in", "out"]
    parts: tuple[int, ...]


def rotate_columns(matrix: Tensor, rotations: Tensor, parts: Sequence[int]) -> Tensor:
    """`matrix` (rows, columns) times the block-diagonal matrix of `rotations[part]` (size, size) for each part."""
    size = rotations.shape[-1]
    cut = matrix.reshape(len(matrix), len(parts), size)  # (576, 576) -> (576, 9, 64)
    return torch.einsum("rps,pst->rpt", cut, _of_parts(rotations, parts)).reshape(len(matrix), -1)


def _of_parts(rotations: Tensor, parts: Sequence[int]) -> Tensor:
    """`rotations[parts]`, (num_parts, size, size).

    Threads would sum the gradient of that index in an order that changes from run to run.
    """
    each = rotations.unbind()
    return torch.stack([each[part] for part in parts])


def learn_rotations(
    terms: Sequence[Term],
    num: int,
    size: int,
    pattern: NM,
    *,
    iterations: int,
) -> Tensor:
    """Rotations (num, size, size) that lower the predicted loss of `terms`, starting from the identity.

    Each iteration rotates, forward and backward, at most 512 rows of every term with axis "in" and the whole weight of
    every term with axis "out", and solves `num` systems (size, size).
    """
    device = terms[0].weight.device
    # S = 0 is R = I: the search begins at the model's own basis.
    skew = torch.zeros(num, size, size, device=device, requires_grad=True)
    identity = torch.eye(size, device=device)

    def rotations_of(skew: Tensor) -> Tensor:
        upper = skew.triu(1)
        antisymmetric = upper - upper.mT
        # R = (I + S)^-1 (I - S) is orthogonal for any skew-symmetric S, so Adam needs no constraint.
        rotations: Tensor = torch.linalg.solve(identity + antisymmetric, identity - antisymmetric)
        return rotations

    optimizer = torch.optim.Adam([skew], lr=_RATE, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(iterations):
            # cosine from 0.03 to 0.0006
            optimizer.param_groups[0]["lr"] = _RATE * (0.51 + 0.49 * math.cos(math.pi * step / iterations))
            rotations = rotations_of(skew)
            loss = torch.zeros((), device=device)
            for term in terms:
                loss = loss + _predicted_loss(term, rotations, pattern, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rotations_of(skew).detach()


def _predicted_loss(
    term: Term,
    rotations: Tensor,
    pattern: NM,
    generator: torch.Generator,
) -> Tensor:
    """The share of the term's energy that pruning would cost, estimated on a random choice of its rows."""
    rows = _some_rows(len(term.weight), generator)
    if term.axis == "out":
        # R^T W of v: its rows are rotated, (192, 576)
        weight = rotate_columns(term.weight.T, rotations, term.parts).T[rows]
        diagonal = term.inverse
    else:
        weight = rotate_columns(term.weight[rows], rotations, term.parts)
        # The diagonal of R^T A R, for a block-diagonal R, needs only the diagonal blocks of A:
        # (576, 576) -> (9, 64, 9, 64) -> the 9 diagonal blocks (64, 64, 9) -> (9, 64, 64)
        number, size = len(term.parts), rotations.shape[-1]
        blocks = term.inverse.view(number, size, number, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        chosen = _of_parts(rotations, term.parts)
        diagonal = ((blocks @ chosen) * chosen).sum(1).reshape(-1)
    root = weight * diagonal.rsqrt()  # its square is w_j^2 / [H^-1]_jj, (512, 576)
    lost = root * ~pattern.mask(root.detach())  # the m - n lowest of each group, several times faster than topk
    # The sum over 512 of 1,536 rows estimates a third of the whole: scaled up, in units of the term's energy.
    return lost.square().sum() * (len(term.weight) / len(weight) / term.energy)


def _some_rows(num_rows: int, generator: torch.Generator) -> Tensor | slice:
    """A random choice of `_ROWS` rows, int64; all of them if there are no more."""
    return torch.randperm(num_rows, generator=generator)[:_ROWS] if num_rows > _ROWS else slice(None)


def sampled_energies(weights: Sequence[Tensor], hessian: Tensor) -> list[float]:
    """tr(W H W^T) of the rows of each weight (out, in) that `solved_errors` solves.

    A change of the basis of the weights' input leaves it as it is.
    """
    return [float(row_energies(_sampled(weight), hessian).sum().clamp(min=1e-30)) for weight in weights]


def solved_errors(
    weights: Sequence[Tensor], hessian: Tensor, factor: Tensor, pattern: NM, energies: Sequence[float]
) -> list[float]:
    """Relative output errors tr(D H D^T) / tr(W H W^T) of weights (out, in) pruned by SparseGPT, on 512 of their rows.

    The weights read the same input, and are solved together.

    Args:
        hessian: (in, in), without damping.
        factor: its `upper_factor`, with damping.
        energies: of `sampled_energies`.
    """
    chosen = [_sampled(weight) for weight in weights]
    stacked = torch.cat(chosen)
    alive = stacked.masked_fill(hessian.diagonal() == 0, 0)  # as `sparsegpt` does with dead columns
    pruned = sparsegpt_by_factor(alive, factor, pattern.n, pattern.m)
    lost = row_energies(stacked - pruned, hessian).split([len(weight) for weight in chosen])
    return [float(part.sum()) / energy for part, energy in zip(lost, energies, strict=True)]


def _sampled(weight: Tensor) -> Tensor:
    return weight[_some_rows(len(weight), torch.Generator().manual_seed(0))]
