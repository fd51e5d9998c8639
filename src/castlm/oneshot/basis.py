"""Changes the basis of a dense model so that an n:m prune of it loses less, and leaves its function as it is.

Three axes inside a transformer can be turned without a trace outside: the neurons of an MLP (a permutation), the values
of each KV head, which `v_proj` writes and `o_proj` reads (a permutation or any rotation), and the residual stream (a
permutation; a rotation too, once the gains of the norms are folded into the layers that read them, as in SliceGPT,
Ashkboos et al. 2024). Which weights share a group of m, and how large they are in it, depends on that basis, and the
gain stays through training. The result is a plain checkpoint of the same architecture.

A change is kept only if the error of the layers solved by SparseGPT falls under it and the outputs stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, SparseLayer
from castlm.core.pattern import NM, Pattern, as_pattern
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.models.architecture import eval_mode
from castlm.oneshot.block_basis import Change, Statistic, Statistics, turn_mlps_, turn_values_
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.families import Block, Wiring, describe
from castlm.oneshot.inputs import input_hessians
from castlm.oneshot.options import BasisOptions
from castlm.oneshot.stream_basis import Stream, is_tied
from castlm.oneshot.walk import BlockInputs, Images, block_stack

TOLERANCE = 1e-4
"""Largest difference of an output relative to the largest output, for weights of 32 bits."""
TOLERANCE_NARROW = 5e-2
"""The same for weights of 16 bits, which are rounded again after they have been rotated."""

_CHECK_TOKENS = 256

MIN_SEQUENCES = 128
TOKENS_PER_INPUT = 4
"""The statistics that choose a basis take in this many tokens for each input of the widest layer, in at least
`MIN_SEQUENCES` sequences: more do not lower the error, and the pass over them is half of the cost."""


@dataclass
class BasisReport:
    """What `change_basis_` did."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out or undone, and why."""
    untied: bool = False
    """Whether the output head has got a weight of its own."""
    logits_moved: float = 0.0
    """Largest difference of a logit, relative to the largest logit."""
    seconds: float = 0.0
    stream_basis: Tensor | None = None
    """The new basis of the residual stream, as `castlm.core.hidden.in_stream_basis` takes it; None if it stayed."""

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON, with the shape of `stream_basis` in its place."""
        shape = None if self.stream_basis is None else list(self.stream_basis.shape)
        return asdict(replace(self, stream_basis=None)) | {"stream_basis": shape}

    def lines(self) -> list[str]:
        return [*map(str, self.changes), *self.notes]


@torch.no_grad()
def change_basis_(
    model: PreTrainedModel,
    calibration: Tensor,
    options: BasisOptions | None = None,
    *,
    images: Images = None,
    pattern: Pattern | str = "2:4",
    filter_fn: FilterFn = is_sparse_linear,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    precision: str = "fp32",
) -> BasisReport:
    """Turns the axes of a dense `model` in place, as `options` say.

    Takes a pass of some of the calibration text through the model (`sequences_needed`), and
    `options.rotation_iterations` steps of Adam for each rotation. Memory beyond the model: the statistics of one block;
    for the residual stream also two fp32 matrices (hidden, hidden) for each of its norms.

    Args:
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`.
        images: for each sequence what the model's forward takes beside its tokens.
        filter_fn: which layers are going to be pruned, as for `sparse_linears`; only their errors count.
        say: called with a line about each kind of change, and about what is left out or undone.
        progress: called with (steps done, steps in all).
        precision: of the pass, as for `prune_oneshot_`.

    Raises:
        InputError: a family that does not allow what is asked for; under "auto" this is said and left out.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> change_basis_(model, tokens, say=print)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    options = options or BasisOptions()
    options.check()
    started, report = time.perf_counter(), BasisReport()
    pattern = as_pattern(pattern)
    layers, _ = sparse_linears(model, pattern, filter_fn)
    check_calibration(model, calibration)
    wiring, note = wiring_or_note(model, pattern, options)
    report.notes += [note] if note else []
    if wiring is not None:
        was_tied = is_tied(model)
        assert isinstance(pattern, NM)
        with eval_mode(model):
            turning = _Turning(model, wiring, options, pattern, report, progress)
            turning.run(calibration, images, layers, precision)
        report.untied = was_tied and not is_tied(model)
    report.seconds = time.perf_counter() - started
    for line in report.lines():
        say(line)
    return report


def wiring_or_note(model: PreTrainedModel, pattern: Pattern, options: BasisOptions) -> tuple[Wiring | None, str | None]:
    """The wiring by which the basis is changed; None where nothing is turned, with the reason if the family is why.

    Raises:
        InputError: another pattern than n:m, or a family that does not allow it, where "auto" does not go without.
    """
    if options.is_off or (options.rotate == "auto" and not isinstance(pattern, NM)):
        return None, None
    if not isinstance(pattern, NM):
        raise InputError(f"a change of basis is for n:m patterns, not {pattern}: use rotate auto")
    try:
        return describe(model), None
    except InputError as error:
        if options.rotate != "auto":
            raise
        return None, str(error)


class BlockTurns:
    """The changes of basis that stay inside a transformer block, and what they have brought so far."""

    def __init__(self, options: BasisOptions, pattern: NM) -> None:
        self.options, self.pattern = options, pattern
        self.values = Change("values rotated" if options.rotates_values else "values permuted")
        self.mlps = Change("MLP neurons permuted")

    def turn_(self, block: Block, statistics: Statistics, inputs: BlockInputs) -> tuple[Statistics, str | None]:
        """Turns the values and the neurons of the current block.

        Args:
            statistics: of the block's layers that are going to be pruned; changed.

        Returns:
            The statistics in the new basis, and why the block was left as it was, if it was.
        """
        options, hidden, untouched = self.options, next(iter(inputs)), dict(statistics)
        outputs = partial(inputs.call(0).run, inputs.blocks[inputs.index], hidden)  # the tolerance is of their dtype
        before, undo = outputs(), []
        if options.rotates_values or options.permute:
            iterations = options.rotation_iterations if options.rotates_values else 0
            undo += turn_values_(block.attention, statistics, self.pattern, self.values, iterations)
        if options.permute:
            undo += turn_mlps_(block.mlps, statistics, self.pattern, self.mlps)
        if undo:
            moved = _distance(before, outputs())
            if not moved <= tolerance_of(before.dtype):
                for weight, old in undo:
                    weight.copy_(old)
                return untouched, f"its basis is left as it was, for its outputs moved by {moved:.1g}"
        return statistics, None

    def changes(self) -> list[Change]:
        """Those that were tried."""
        return [change for change in (self.values, self.mlps) if change.num_tried]


class _Turning:
    """One change of basis at work: block after block, then the residual stream."""

    def __init__(
        self,
        model: PreTrainedModel,
        wiring: Wiring,
        options: BasisOptions,
        pattern: NM,
        report: BasisReport,
        progress: Callable[[int, int], None],
    ) -> None:
        self.model, self.wiring, self.options, self.pattern, self.report = model, wiring, options, pattern, report
        self.progress = progress
        self.stream = Stream(model, wiring, pattern, rotates=options.rotate == "residual")
        if self.stream.rotates and (obstacle := self.stream.obstacle()):
            raise InputError(f"the residual stream of {wiring.family} cannot be rotated: {obstacle}; use rotate values")
        self.block_turns = BlockTurns(options, pattern)
        self.done = 0
        self.total = len(wiring.blocks) + (options.rotation_iterations if self.stream.rotates else 0)

    def run(self, calibration: Tensor, images: Images, layers: Mapping[str, SparseLayer], precision: str) -> None:
        sample = calibration[:1, :_CHECK_TOKENS].to(self.model.device)
        before = self._logits(sample)
        if self.stream.rotates:
            self.stream.fold_()
        stack, blocks = block_stack(self.model, layers)
        calibration = calibration[: sequences_needed(layers, *calibration.shape, self.stream.rotates)]
        images = None if images is None else images[: len(calibration)]
        inputs = BlockInputs(self.model, blocks, calibration, images=images, precision=precision)
        for index, block in enumerate(self.wiring.blocks):
            inside = {name: layer for name, layer in layers.items() if name.startswith(f"{stack}.{index}.")}
            outputs: list[Tensor] | None = [] if inside and index + 1 < len(blocks) else None
            self._turn_block(index, block, block_statistics(inside, inputs, len(calibration), outputs), inputs)
            if index + 1 < len(blocks):
                inputs.advance(outputs)  # a change of basis leaves them as they are
            self._step()
        self.report.changes += self.block_turns.changes()
        self._turn_stream(sample, before)

    def _turn_block(self, index: int, block: Block, statistics: Statistics, inputs: BlockInputs) -> None:
        turned, note = self.block_turns.turn_(block, statistics, inputs)
        if note:
            self.report.notes.append(f"block {index}: {note}")
        self.stream.see(block, turned)

    def _turn_stream(self, sample: Tensor, before: Tensor) -> None:
        """Rotates the stream, or permutes it where it is not rotated; undoes what moves the logits."""
        if self.stream.rotates:
            why_not = "no layer that is pruned reads it"
            if self.stream.is_read:
                rotated, why_not = Change("residual stream rotated"), "the error of its layers would not fall"
                self.stream.rotate_(rotated, self.options.rotation_iterations, self._step)
                self.report.changes.append(rotated)
            if self.stream.undo is None:
                self.stream.unfold_()
                self.report.notes.append(f"residual stream: not rotated, for {why_not}")
        if self.options.permute and self.stream.undo is None and self.stream.is_read and not self.wiring.ends:
            permuted = Change("residual stream permuted")
            self.stream.permute_(permuted)
            self.report.changes.append(permuted)
        moved = _distance(before, self._logits(sample))
        if self.stream.undo is not None and not moved <= tolerance_of(self.model.dtype):
            self.stream.undo()
            self.report.notes.append(f"residual stream: left as it was, for the logits moved by {moved:.1g}")
            moved = _distance(before, self._logits(sample))
        elif self.stream.undo is not None:
            self.report.stream_basis = self.stream.basis
        self.report.logits_moved = moved

    def _logits(self, sample: Tensor) -> Tensor:
        return self.model(input_ids=sample, use_cache=False).logits

    def _step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def sequences_needed(
    layers: Mapping[str, SparseLayer], num_sequences: int, seq_len: int, rotates_stream: bool = False
) -> int:
    """How many of the calibration sequences the choice of a basis reads: see `TOKENS_PER_INPUT`. All where there are
    experts, or where the rotation of the residual stream is learned.
    """
    if rotates_stream or any(isinstance(layer, ExpertLinear) for layer in layers.values()):
        return num_sequences
    widest = max((layer.in_features for layer in layers.values()), default=0)
    return min(num_sequences, max(MIN_SEQUENCES, -(-TOKENS_PER_INPUT * widest // seq_len)))


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference of an output that a change of basis may make in a model of this dtype."""
    return TOLERANCE if dtype in (torch.float32, torch.float64) else TOLERANCE_NARROW


def block_statistics(
    layers: Mapping[str, SparseLayer], inputs: BlockInputs, num_sequences: int, outputs: list[Tensor] | None = None
) -> Statistics:
    """Of the current block's layers; those that read the same input share one. `outputs` is that of `see_inputs`."""
    if not layers:
        return {}
    made: dict[int, Statistic] = {}
    hessians = input_hessians(layers, inputs, num_sequences, outputs)
    return {name: made.setdefault(id(hessian), Statistic(hessian)) for name, hessian in hessians.items()}


def _distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest of `before`."""
    return float((after - before).abs().max() / before.abs().max())
