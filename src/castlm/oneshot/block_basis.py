"""The changes of basis inside a transformer block: the values of each KV head, and the neurons of each MLP.

Both axes are internal to the block, so a change needs no folded norm and no untied embedding, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from castlm.core.nm import NM
from castlm.oneshot.families import Attention, Matrix, Mlp
from castlm.oneshot.inputs import ExpertInputs, LayerInput
from castlm.oneshot.permutation import find_permutation
from castlm.oneshot.rotation import DAMPING, Term, learn_rotations, solved_error, turn_columns
from castlm.oneshot.solvers import damped, row_energies, whole_hessian
from castlm.oneshot.sparsegpt import lower_factor

_RATE = 0.05  # of Adam, for the skew matrix of a rotation
_MIN_GAIN = 1e-3  # least relative fall of the error for which a change is kept

Undo = list[tuple[Tensor, Tensor]]
"""Weights that were changed, each with its old value."""


@dataclass
class Change:
    """One kind of change over the whole model, with the mean relative error of its layers solved by SparseGPT."""

    what: str
    before: float = 0.0
    after: float = 0.0
    num_kept: int = 0
    num_tried: int = 0

    def decide(self, before: float, after: float) -> bool:
        """Records a change of the error from `before` to `after`, and returns whether to keep it."""
        keep = after < before * (1 - _MIN_GAIN)
        self.num_tried += 1
        self.num_kept += keep
        self.before += (before - self.before) / self.num_tried
        self.after += ((after if keep else before) - self.after) / self.num_tried
        return keep

    def __str__(self) -> str:
        where = f"{self.num_kept} of {self.num_tried} kept, " if self.num_kept < self.num_tried else ""
        return f"{self.what}: {where}layer error {self.before:.4f} -> {self.after:.4f}"


class Statistic:
    """The Hessian (in, in) and a sample (tokens, in) of a layer's input, with quantities that are computed once."""

    def __init__(self, hessian: Tensor, sample: Tensor) -> None:
        self.hessian, self.sample = hessian, sample

    @cached_property
    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(self._factor())

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of H^-1 = L^-T L^-1, (in,): column sums of squares of L^-1, which costs less than `inverse`."""
        identity = torch.eye(len(self.hessian), device=self.hessian.device)
        return torch.linalg.solve_triangular(self._factor(), identity, upper=False).square_().sum(0)

    def _factor(self) -> Tensor:
        """L of the damped Hessian L L^T."""
        factor, _ = lower_factor(damped(self.hessian, DAMPING), 0)
        return factor

    def energy(self, weight: Tensor) -> float:
        """tr(W H W^T)."""
        return float(row_energies(weight, self.hessian).sum().clamp(min=1e-30))

    def importance(self, weight: Tensor) -> Tensor:
        """The loss that optimal brain surgery predicts for pruning each weight (rows, columns), relative to the energy.

        w_j^2 / [H^-1]_jj: the loss after all other weights of the row compensate (Hassibi & Stork 1992).
        """
        return weight.square() / self.inverse_diagonal / self.energy(weight)

    def permuted(self, order: Tensor) -> Statistic:
        return Statistic(self.hessian[order][:, order], self.sample[:, order])

    def rotated(self, rotations: Tensor, parts: tuple[int, ...]) -> Statistic:
        halfway = turn_columns(self.hessian, rotations, parts)
        return Statistic(turn_columns(halfway.T, rotations, parts), turn_columns(self.sample, rotations, parts))


Statistics = dict[str, Statistic]
"""Statistics by the name of the layer. Layers that read the same input share one; layers that stay dense have none."""


def statistics_of(entries: Iterable[LayerInput | ExpertInputs]) -> Statistics:
    """The statistics of a block's inputs; an expert's key is the name of the layer and the number of the expert."""
    found: Statistics = {}
    for entry in entries:
        for seen in entry.experts.values() if isinstance(entry, ExpertInputs) else [entry]:
            found |= dict.fromkeys(seen.names, Statistic(whole_hessian(seen.statistic), seen.sample))
    return found


def turn_values_(attention: Attention, statistics: Statistics, pattern: NM, change: Change, iterations: int) -> Undo:
    """Rotates the values of each KV head (permutes them if `iterations` is 0) if that lowers the error of v and o.

    Replaces the output layer's entry in `statistics` with the statistic of its new input.
    """
    value, output = attention.value, attention.output
    if output.layer not in statistics:
        return []
    if iterations:
        rotations = _learn_values(attention, statistics, pattern, iterations)
    elif attention.head_dim % pattern.m == 0:
        rotations = _value_permutations(attention, statistics, pattern)
    else:
        return []
    readers, writers = tuple(attention.kv_head_of), tuple(range(attention.num_kv_heads))
    new_value = turn_columns(value.weight.float().T, rotations, writers).T
    new_output = turn_columns(output.weight.float(), rotations, readers)
    new_statistic = statistics[output.layer].rotated(rotations, readers)
    before = solved_error(output.weight.float(), statistics[output.layer].hessian, pattern)
    after = solved_error(new_output, new_statistic.hessian, pattern)
    if value.layer in statistics:
        before += solved_error(value.weight.float(), statistics[value.layer].hessian, pattern)
        after += solved_error(new_value, statistics[value.layer].hessian, pattern)
        before, after = before / 2, after / 2
    if not change.decide(before, after):
        return []
    new = [(value.weight, new_value), (output.weight, new_output)]
    if value.bias is not None:
        new.append((value.bias, turn_columns(value.bias.float()[None], rotations, writers)[0]))
    statistics[output.layer] = new_statistic
    return replace_(new)


def _learn_values(attention: Attention, statistics: Statistics, pattern: NM, iterations: int) -> Tensor:
    """A rotation (num_kv_heads, head_dim, head_dim) for each KV head."""
    value, output = attention.value, attention.output
    weight, statistic = output.weight.float(), statistics[output.layer]
    readers, writers = tuple(attention.kv_head_of), tuple(range(attention.num_kv_heads))
    terms = [Term(weight, statistic.inverse, statistic.energy(weight), "in", readers)]
    if value.layer in statistics:
        weight, statistic = value.weight.float(), statistics[value.layer]
        terms.append(Term(weight, statistic.inverse_diagonal, statistic.energy(weight), "out", writers))
    return learn_rotations(
        terms, attention.num_kv_heads, attention.head_dim, pattern, iterations=iterations, learning_rate=_RATE
    )


def _value_permutations(attention: Attention, statistics: Statistics, pattern: NM) -> Tensor:
    """A permutation matrix (num_kv_heads, head_dim, head_dim) for each KV head."""
    importance = statistics[attention.output.layer].importance(attention.output.weight.float())
    by_head = importance.view(len(importance), -1, attention.head_dim)  # (576, 576) -> (576, 9, 64)
    identity, found = torch.eye(attention.head_dim, device=importance.device), []
    for kv_head in range(attention.num_kv_heads):
        mine = [head for head, kv in enumerate(attention.kv_head_of) if kv == kv_head]
        score = by_head[:, mine].transpose(0, 1).reshape(-1, attention.head_dim)  # (576, 3, 64) -> (1728, 64)
        found.append(identity[:, find_permutation(score, pattern)])
    return torch.stack(found)


def turn_mlps_(mlps: list[Mlp], statistics: Statistics, pattern: NM, change: Change) -> Undo:
    """Permutes the neurons of each MLP whose down-projection is pruned, if that lowers its error."""
    undo: Undo = []
    for mlp in mlps:
        if mlp.down.layer not in statistics:
            continue
        weight, statistic = mlp.down.weight.float(), statistics[mlp.down.layer]
        order = find_permutation(statistic.importance(weight), pattern).to(weight.device)
        permuted = statistic.permuted(order)
        before = solved_error(weight, statistic.hessian, pattern)
        if change.decide(before, solved_error(weight[:, order], permuted.hessian, pattern)):
            statistics[mlp.down.layer] = permuted
            new = [(mlp.down.weight, mlp.down.weight[:, order])]
            for matrix in mlp.inner:
                new += rows_of(matrix, lambda rows, order=order: rows[order])
            undo += replace_(new)
    return undo


def rows_of(matrix: Matrix, turn: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The weight and the bias of a matrix, each with its value after `turn` of axis 0."""
    parts = [matrix.weight] if matrix.bias is None else [matrix.weight, matrix.bias]
    return [(part, turn(part)) for part in parts]


def replace_(new: list[tuple[Tensor, Tensor]]) -> Undo:
    """Gives weights new values, in place, and returns the old ones."""
    undo = [(weight, weight.clone()) for weight, _ in new]
    for weight, value in new:
        weight.copy_(value)
    return undo
