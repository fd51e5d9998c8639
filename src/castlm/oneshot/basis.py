"""Changes the basis inside a transformer block so that pruning it to n:m loses less; its function stays the same.

Two axes inside a block can be changed without changing its outputs: the neurons of an MLP (a permutation), and the
values of each KV head, which `v_proj` writes and `o_proj` reads (a permutation or any rotation). The basis decides
which weights share a group of m and how large they are; its gain remains after training. Neither axis leaves the
block, so the result is a plain checkpoint of the same architecture. A change is kept only if it lowers the error of the
layers solved by SparseGPT and leaves the outputs the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.cholesky import upper_factor
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.data.calibration import CalibrationText
from castlm.facts import Basis, BasisChange
from castlm.oneshot.axes import (
    Term,
    find_permutation,
    learn_rotations,
    rotate_columns,
    sampled_energies,
    solved_errors,
)
from castlm.oneshot.families import Attention, Block, Mlp, describe
from castlm.oneshot.inputs import entries_of, see_inputs
from castlm.oneshot.options import BasisOptions, Effort
from castlm.oneshot.ranks import each_by_one
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.routed import Seen
from castlm.oneshot.solvers import SOLVERS, damped, row_energies, whole_hessian
from castlm.oneshot.source import Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import BlockInputs, Visit
from castlm.world import ALONE, World

TOLERANCE, TOLERANCE_NARROW = 1e-4, 5e-2
"""Largest difference of an output relative to the largest output, for weights of 32 bits, and for weights of 16 bits,
which are rounded again after the rotation."""
_MIN_GAIN = 1e-3  # least relative fall of the error for which a change is kept
_DAMPING = 0.01  # share of the mean diagonal that is added to a Hessian, as in SparseGPT

Undo = list[tuple[Tensor, Tensor]]
"""Weights that were changed, each with its old value."""


def why_unchanged(model: PreTrainedModel, options: BasisOptions) -> str | None:
    """The reason why the model's family does not allow changes of basis; None if it does.

    Raises:
        InputError: a family whose basis cannot change. "auto" keeps the basis instead.
    """
    try:
        describe(model)
        return None
    except InputError as error:
        if options.rotate != "auto":
            raise
        return str(error)


class Statistic:
    """The Hessian (in, in) and a sample (tokens, in) of a layer's input."""

    def __init__(self, hessian: Tensor, sample: Tensor) -> None:
        self.hessian, self.sample = hessian, sample

    def factor(self) -> Tensor:
        """The upper triangular R of the damped Hessian R R^T, (in, in)."""
        factor, _ = upper_factor(damped(self.hessian, _DAMPING), 0)
        return factor

    def energy(self, weight: Tensor) -> float:
        """tr(W H W^T)."""
        return float(row_energies(weight, self.hessian).sum().clamp(min=1e-30))

    def permuted(self, order: Tensor) -> Statistic:
        # P^T H P: rows and columns, (1536, 1536)
        return Statistic(self.hessian[order][:, order], self.sample[:, order])

    def rotated(self, rotations: Tensor, parts: tuple[int, ...]) -> Statistic:
        halfway = rotate_columns(self.hessian, rotations, parts)  # H R; then (R^T H R)^T = R^T (H R), as H is symmetric
        return Statistic(rotate_columns(halfway.T, rotations, parts), rotate_columns(self.sample, rotations, parts))


def inverse_of(factor: Tensor) -> Tensor:
    """H^-1 of H = R R^T, (in, in)."""
    # With both axes reversed, R is the lower triangular factor of H with both axes reversed.
    return torch.cholesky_inverse(factor.flip(0, 1)).flip(0, 1)


def inverse_diagonal(factor: Tensor) -> Tensor:
    """The diagonal of H^-1 = R^-T R^-1, (in,): column sums of squares of R^-1, which costs less than `inverse_of`."""
    identity = torch.eye(len(factor), device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse.square_().sum(0)


def importance(weight: Tensor, factor: Tensor) -> Tensor:
    """The loss w_j^2 / [H^-1]_jj that optimal brain surgery predicts for pruning each weight."""
    return weight.square() / inverse_diagonal(factor)


Statistics = dict[str, Statistic]
"""Statistics by the name of the layer. Layers that read the same input share one; layers that stay dense have none."""


def statistics_of(seen: Seen) -> Statistics:
    """The statistics of a block's inputs; an expert's key is the name of the layer and the number of the expert."""
    found: Statistics = {}
    for entry in entries_of(seen):
        found |= dict.fromkeys(entry.names, Statistic(whole_hessian(entry.statistic), entry.sample))
    return found


def change_block_basis_(
    block: Block,
    seen: Seen,
    inputs: BlockInputs,
    options: BasisOptions,
    effort: Effort,
    pattern: NM,
    report: Basis,
    world: World = ALONE,
) -> None:
    """Changes the basis of the values and neurons of the current block of `inputs`, and of the statistics in `seen`.

    Each rank searches in some of the parts, and all make the same changes.
    """
    statistics = statistics_of(seen)
    attention, turns_values = block.attention, options.rotates_values or options.permute
    mlps = [mlp for mlp in block.mlps if mlp.down.layer in statistics] if options.permute else []
    searches: list[Callable[[], Found | None]] = [
        partial(find_order, mlp, statistics, pattern, effort.permute_iterations) for mlp in mlps
    ]
    if turns_values:
        searches.insert(0, partial(find_turn, attention, statistics, pattern, options, effort))
    found = each_by_one(world, searches)
    # rank 0 has the first batch
    before = inputs.first_outputs(is_unchanged=True) if world.rank == 0 else None
    undo: Undo = []
    if turns_values:
        what = "values rotated" if options.rotates_values else "values permuted"
        of_values = found.pop(0)
        if of_values is not None and keeps(report, what, of_values):
            # The order of the changes does not matter: the neurons' search reads other weights and another statistic.
            undo += turn_values_(attention, statistics, of_values.turn)
    if options.permute:
        for mlp, of_mlp in zip(mlps, found, strict=True):
            assert of_mlp is not None
            if keeps(report, "MLP neurons permuted", of_mlp):
                undo += permute_neurons_(mlp, statistics, of_mlp.turn)
    if not undo:
        return

    def change_of_outputs() -> tuple[float, bool]:
        assert before is not None
        moved = distance(before, inputs.first_outputs())
        return moved, moved > tolerance_of(before.dtype)

    # The one test of the algebra: rotated and permuted, the block must give the same outputs up to rounding.
    moved, is_too_far = world.on_main(change_of_outputs, patient=True)
    if is_too_far:
        for weight, old in undo:
            weight.copy_(old)
        report.notes.append(
            f"block {inputs.block_index}: basis unchanged, because its outputs would move by {moved:.1g}"
        )
        return
    report.moved = max(report.moved, moved)
    for entry in entries_of(seen):
        changed = statistics[entry.names[0]]
        entry.statistic, entry.sample = changed.hessian, changed.sample


class Found(NamedTuple):
    """The result of a search: a change, and the relative error of its layers before and after it."""

    turn: Tensor
    """Rotations (num_kv_heads, head_dim, head_dim), or the order of neurons, int64 (neurons,); on the CPU."""
    before: float
    after: float


def keeps(report: Basis, what: str, found: Found) -> bool:
    """Records the result of a search for the change `what`, and returns whether to make it."""
    change = next((change for change in report.changes if change.what == what), None)
    if change is None:
        report.changes.append(change := BasisChange(what, 0.0, 0.0, 0, 0))
    is_kept = found.after < found.before * (1 - _MIN_GAIN)
    change.num_tried += 1
    change.num_kept += is_kept
    change.before += (found.before - change.before) / change.num_tried  # means over all searches
    change.after += ((found.after if is_kept else found.before) - change.after) / change.num_tried
    return is_kept


def find_turn(
    attention: Attention, statistics: Statistics, pattern: NM, options: BasisOptions, effort: Effort
) -> Found | None:
    """A rotation of the values of each KV head (a permutation with rotate off), for a lower error of v and o.

    None if no change applies.
    """
    value, output = attention.value, attention.output
    if output.layer not in statistics:
        return None
    values, outputs = value.weight.float(), output.weight.float()
    of_output, of_value = statistics[output.layer], statistics.get(value.layer)
    output_factor = of_output.factor()
    value_factor = None if of_value is None else of_value.factor()
    readers, writers = _parts_of(attention)
    if options.rotates_values:
        terms = [Term(outputs, inverse_of(output_factor), of_output.energy(outputs), "in", readers)]
        if of_value is not None and value_factor is not None:
            terms.append(Term(values, inverse_diagonal(value_factor), of_value.energy(values), "out", writers))
        rotations = learn_rotations(
            terms,
            attention.num_kv_heads,
            attention.head_dim,
            pattern,
            iterations=effort.rotation_iterations,
        )
    elif attention.head_dim % pattern.m == 0:
        score = importance(outputs, output_factor)
        rotations = _value_permutations(attention, score, pattern, effort.permute_iterations)
    else:
        return None
    new_value = rotate_columns(values.T, rotations, writers).T
    new_output = rotate_columns(outputs, rotations, readers)
    new_statistic = of_output.rotated(rotations, readers)
    # Both errors are relative to one energy, tr(W H W^T), which a rotation of W and H leaves as it is.
    energies = sampled_energies([outputs], of_output.hessian)
    [before] = solved_errors([outputs], of_output.hessian, output_factor, pattern, energies)
    [after] = solved_errors([new_output], new_statistic.hessian, new_statistic.factor(), pattern, energies)
    if of_value is not None and value_factor is not None:
        both = [values, new_value]
        energies = sampled_energies(both, of_value.hessian)
        old, new = solved_errors(both, of_value.hessian, value_factor, pattern, energies)
        before, after = (before + old) / 2, (after + new) / 2  # v and o count alike, whatever their sizes
    return Found(rotations.cpu(), before, after)


def turn_values_(attention: Attention, statistics: Statistics, rotations: Tensor) -> Undo:
    """Rotates the values of each KV head, and the statistic of the output layer."""
    value, output = attention.value, attention.output
    rotations, (readers, writers) = rotations.to(output.weight.device), _parts_of(attention)
    replaced = [
        (value.weight, rotate_columns(value.weight.float().T, rotations, writers).T),  # R^T W, (192, 576)
        # (576, 576): each of 9 heads reads one of 3 KV heads
        (output.weight, rotate_columns(output.weight.float(), rotations, readers)),
    ]
    if value.bias is not None:
        replaced.append((value.bias, rotate_columns(value.bias.float()[None], rotations, writers)[0]))
    statistics[output.layer] = statistics[output.layer].rotated(rotations, readers)
    return set_weights_(replaced)


def _parts_of(attention: Attention) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The KV head of each part of the columns of o, and of the rows of v."""
    return tuple(attention.kv_head_of), tuple(range(attention.num_kv_heads))


def _value_permutations(attention: Attention, scores: Tensor, pattern: NM, rounds: int) -> Tensor:
    """A permutation matrix (num_kv_heads, head_dim, head_dim) for each KV head."""
    by_head = scores.view(len(scores), -1, attention.head_dim)  # (576, 576) -> (576, 9, 64)
    identity = torch.eye(attention.head_dim, device=scores.device)
    found = []
    for kv_head in range(attention.num_kv_heads):
        readers = [head for head, read in enumerate(attention.kv_head_of) if read == kv_head]
        score = by_head[:, readers].transpose(0, 1).reshape(-1, attention.head_dim)  # (576, 3, 64) -> (1728, 64)
        # Columns of the identity in the new order: x @ P has x's channels in that order.
        found.append(identity[:, find_permutation(score, pattern, rounds)])
    return torch.stack(found)


def find_order(mlp: Mlp, statistics: Statistics, pattern: NM, rounds: int) -> Found:
    """An order of the neurons of an MLP for a lower error of its down-projection."""
    weight, statistic = mlp.down.weight.float(), statistics[mlp.down.layer]
    factor = statistic.factor()
    order = find_permutation(importance(weight, factor), pattern, rounds)
    there = order.to(weight.device)
    energies = sampled_energies([weight], statistic.hessian)
    [before] = solved_errors([weight], statistic.hessian, factor, pattern, energies)
    del factor
    permuted = statistic.permuted(there)
    [after] = solved_errors([weight[:, there]], permuted.hessian, permuted.factor(), pattern, energies)
    return Found(order, before, after)


def permute_neurons_(mlp: Mlp, statistics: Statistics, order: Tensor) -> Undo:
    """Permutes the neurons of an MLP, and the statistic of its down-projection."""
    order = order.to(mlp.down.weight.device)
    statistics[mlp.down.layer] = statistics[mlp.down.layer].permuted(order)
    new = [(mlp.down.weight, mlp.down.weight[:, order])]
    for matrix in mlp.inner:
        # gate and up, (1536, 576)
        new += [(part, part[order]) for part in (matrix.weight, matrix.bias) if part is not None]
    return set_weights_(new)


def set_weights_(new: list[tuple[Tensor, Tensor]]) -> Undo:
    """Gives weights new values, in place, and returns the old ones."""
    undo = [(weight, weight.clone()) for weight, _ in new]
    for weight, value in new:
        weight.copy_(value)
    return undo


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference of an output that a change of basis may cause at this dtype."""
    return TOLERANCE if dtype in (torch.float32, torch.float64) else TOLERANCE_NARROW


def distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest magnitude in `before`."""
    return float((after - before).abs().max() / before.abs().max())


class ChangeBasis(Step):
    """Changes the basis inside each block so that pruning it to n:m loses less; see `castlm.oneshot.basis`.

    A family that does not allow the changes keeps its basis with rotate auto, and the report says why.
    """

    is_divided = True

    def __init__(self, pattern: NM, basis: BasisOptions, effort: Effort) -> None:
        self.pattern, self.basis, self.effort = pattern, basis, effort
        self.is_known = False
        """Whether the family of the model allows the changes."""

    def __str__(self) -> str:
        return "a change of basis"

    def options(self) -> dict[str, Any]:
        effort = self.effort
        iterations = {
            "rotation_iterations": effort.rotation_iterations,
            "permute_iterations": effort.permute_iterations,
        }
        return {**asdict(self.basis), **iterations}

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        note = why_unchanged(source.model, self.basis)
        self.is_known = note is None
        report.basis.notes += [note] if note else []

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        if not self.is_known or visit.inputs is None or not visit.inside:
            return
        began = time.perf_counter()
        # The statistics stay in `visit`, in the new basis, and save `Solve` its first pass over the text.
        visit.seen = see_inputs(visit.inside, visit.inputs, SOLVERS["sparsegpt"], visit.inputs.num_sequences)
        # Described again, because the earlier views may be of weights that have left the memory.
        block = describe(visit.source.model)[visit.index]
        change_block_basis_(
            block, visit.seen, visit.inputs, self.basis, self.effort, self.pattern, report.basis, visit.world
        )
        report.basis.seconds += time.perf_counter() - began
