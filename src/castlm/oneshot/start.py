"""The start: sparse weights and masks before step 0, made from a dense model in one walk over its transformer blocks.

In each block in turn, the inputs of its layers decide the basis, the layers are pruned, reconstruction (an option)
trains the block towards its dense outputs, and its outputs enter the next block. With staged statistics, the inputs of
a layer are measured after the layers before it are pruned; layers that read the same tensor (q, k, v; gate, up) share
one statistic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.nm import NM, Pattern
from castlm.core.sparsify import FilterFn, SparseLayer, is_sparse_linear, sparse_linears
from castlm.models.architecture import eval_mode
from castlm.names import duration
from castlm.oneshot.basis import turn_block_, wiring_or_note
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.families import describe
from castlm.oneshot.folder import StartFolder
from castlm.oneshot.inputs import (
    ERROR_TOKENS,
    ExpertInputs,
    Seen,
    check_plain_weights,
    entries_of,
    grouped,
    inputs_in_order,
    see_inputs,
)
from castlm.oneshot.options import NO_BASIS, NO_REFINEMENTS, BasisOptions, Refinements, check_damping, part_of
from castlm.oneshot.reconstruct import reconstruct_
from castlm.oneshot.report import BasisReport, LayerResult, OneshotReport
from castlm.oneshot.residual import rotate_residual_
from castlm.oneshot.solve import prune_experts, prune_layers
from castlm.oneshot.solvers import SOLVERS, Settings, Solver
from castlm.oneshot.source import MemoryModel, StoredModel
from castlm.oneshot.walk import BlockInputs, Extras, Step, walk
from castlm.patterns import parse_pattern
from castlm.structured.prune import prune_units_

BLOCK_COLUMNS = 128
"""Columns of SparseGPT between two full matmuls. It affects only the speed."""
_SHORT = 10.0  # seconds; the time that a shorter start will take is not announced

Say = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with (finished blocks, all blocks)."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The settings of a start: the basis, the solver, its refinements and the pattern.

    Raises:
        InputError: an option that is out of range.
    """

    method: str | None
    """A name in `SOLVERS`, or in `SCORED_BY` for a structured pattern; None only changes the basis."""
    pattern: Pattern
    basis: BasisOptions = NO_BASIS
    refinements: Refinements = NO_REFINEMENTS
    damping: float = 0.01
    """SparseGPT: share of H's mean diagonal that is added to the diagonal."""
    block_columns: int = BLOCK_COLUMNS
    seed: int = 0
    """Seed of method "random"."""
    filter_fn: FilterFn = is_sparse_linear
    """Chooses the layers to prune, as for `sparse_linears`."""
    precision: str = "fp32"
    """Precision of the passes over the calibration text: "fp32" runs them in the dtype of the weights, "bf16" under
    autocast, which multiplies in bf16. Statistics and solvers are fp32."""

    def __post_init__(self) -> None:
        self.refinements.check()
        self.basis.check()
        check_damping(self.damping)

    @classmethod
    def of(cls, options: Any, method: str, pattern: Pattern, **others: Any) -> Start:
        """Makes a start from `options`, which have the fields of `BasisOptions`, `Refinements` and
        `EffortOptions`.

        Args:
            others: further fields of the start.

        Raises:
            InputError: an option that is out of range, or that has no effect with the method.
        """
        refinements = part_of(options, Refinements).for_solver(method, pattern, options.start_effort)
        basis = part_of(options, BasisOptions)
        return cls(method=method, pattern=pattern, basis=basis, refinements=refinements, **others)

    def options(self) -> dict[str, Any]:
        """All settings on which the result depends, besides the model and the text, for JSON."""
        return {
            "method": self.method,
            "pattern": str(self.pattern),
            "damping": self.damping,
            "seed": self.seed,
            "precision": self.precision,
            **asdict(self.basis),
            **asdict(self.refinements),
        }

    @torch.no_grad()
    def make_(
        self,
        source: MemoryModel | StoredModel,
        calibration: Tensor | None = None,
        extras: Extras = None,
        *,
        folder: StartFolder | None = None,
        say: Say = lambda line: None,
        progress: Progress = lambda done, total: None,
        time_after: Callable[[float], str] = lambda seconds_per_token: "",
    ) -> OneshotReport:
        """Prunes a model in memory in place, or a `StoredModel` block by block into `folder`, with the same bits.

        Memory beyond the model, or one block of it: the hidden states of the calibration text (on disk if there is a
        `folder`), and the statistics of one block (SparseGPT: an fp32 matrix (in, in) for each distinct input).

        Args:
            calibration: int64, (num_sequences, seq_len), as from `draw_calibration`. Magnitude needs none.
            extras: for each sequence, the further arguments of the model's forward, such as images.
            folder: records each finished block, so that a start that was killed continues.
            say: called with a line about each change that was made, omitted or undone, and about the remaining time.
            time_after: words about the time of what follows the start, from the seconds of one token in the forward
                pass of one block.

        Raises:
            InputError: an unknown method, a bad pattern or number, a method that needs calibration text without any,
                tokens that the model cannot take, nothing to prune, a weight or an input of a layer that is not finite,
                or a model that cannot be followed block by block.
        """
        assert self.method is not None or folder is None
        model = source.model
        if self.pattern.cut_out is not None:
            wiring_or_note(model, self.pattern, self.basis)  # raises for a rotation, which only n:m has
            return self._prune_units_(model, calibration, extras, folder, progress)
        layers, left_dense = sparse_linears(model, self.pattern, self.filter_fn)
        self._check(source, layers, calibration)
        num_sequences, seq_len = (0, 0) if calibration is None else calibration.shape
        asked = self.damping if self.method == "sparsegpt" else None
        report = OneshotReport(
            str(self.method), str(self.pattern), num_sequences, seq_len, asked, left_dense=left_dense
        )
        turns = False
        if calibration is not None:
            wiring, note = wiring_or_note(model, self.pattern, self.basis)
            turns = wiring is not None
            with eval_mode(model), _timed(report.basis):
                if wiring is not None and self.basis.rotate == "residual":
                    assert isinstance(source, MemoryModel)
                    assert isinstance(self.pattern, NM)
                    what = wiring, layers, calibration, extras, self.pattern, self.basis.rotation_iterations
                    rotate_residual_(source, *what, self.precision, report.basis)
            report.basis.notes += [note] if note else []
        if folder is not None and folder.done:
            report.restore_(folder.results)
            say(
                f"continuing after {folder.done} of {len(source.blocks)} transformer blocks, which are in {folder.path}"
            )
        started = left_walk = time.perf_counter()
        with eval_mode(model):
            blocks = walk(
                source,
                layers,
                calibration,
                extras=extras,
                precision=self.precision,
                follows_dense=self.refinements.reconstruct_epochs > 0,
                folder=folder,
                results=report.saved,
                progress=progress,
            )
            for number, step in enumerate(blocks):
                report.seconds += time.perf_counter() - left_walk  # the walk's passes, and what it writes
                left = len(source.blocks) - step.index
                seconds = (time.perf_counter() - started) * left  # once the first block is done
                if number == 1 and seconds > _SHORT and step.inputs is not None:
                    after = time_after(step.inputs.seconds_per_token())
                    say(f"the start takes about {duration(seconds)} more, for {left} transformer blocks{after}")
                self._make_block_(source, step, turns, report)
                left_walk = time.perf_counter()
            report.seconds += time.perf_counter() - left_walk
        report.basis.changes = [change for change in report.basis.changes if change.num_tried]
        for line in report.basis.lines():
            say(line)
        return report

    def _make_block_(self, source: MemoryModel | StoredModel, step: Step, turns: bool, report: OneshotReport) -> None:
        """Changes the basis of the current block, prunes it, and reconstructs its outputs."""
        inputs = step.inputs
        if not step.inside:
            return
        if inputs is None:
            for name, layer in step.inside.items():
                report.layers += prune_layers({name: layer.weight}, None, self._solver, self._settings)
            return
        for seen in self._stages(source, step, inputs, turns, report):
            if self.method is not None:
                with _timed(report):
                    report.layers += self._prune_(step.inside, seen)
                    inputs.keep_outputs(step.inside[name] for entry in seen for name in entry.names)
        if self.refinements.reconstruct_epochs:
            inputs.drop_outputs()
            with _timed(report):
                block_report = reconstruct_(
                    inputs.blocks[inputs.index],
                    lambda _, hidden, batch: inputs.run(hidden, batch),
                    inputs,
                    step.dense_outputs,
                    {layer.weight: layer.weight != 0 for layer in step.inside.values()},
                    epochs=self.refinements.reconstruct_epochs,
                    learning_rate=self.refinements.reconstruct_rate,
                )
            report.reconstructions.append(block_report)

    def _stages(
        self, source: MemoryModel | StoredModel, step: Step, inputs: BlockInputs, turns: bool, report: OneshotReport
    ) -> Iterator[Seen]:
        """Yields the inputs of the layers to prune next, in their new basis, until the whole block is pruned."""
        inside = step.inside
        first: Seen = []
        if turns:
            with _timed(report.basis):
                first = self._turn_(source, step, inputs, report.basis)
        source.keep_dense(inside)
        if not self.refinements.staged_statistics or self.method is None:
            yield first or self._see(inside, inputs, report)
            return
        groups = grouped(first or inputs_in_order(inside, inputs))
        names = [[name for entry in group for name in entry.names] for group in groups]
        first = groups[0] if turns else []  # no pruned layer comes before it, so its inputs are still right
        del groups
        for group in names:
            yield first or self._see({name: inside[name] for name in group}, inputs, report)
            first = []

    def _see(self, layers: Mapping[str, SparseLayer], inputs: BlockInputs, report: OneshotReport) -> Seen:
        with _timed(report):
            return see_inputs(layers, inputs, self._solver, inputs.num_sequences)

    def _turn_(self, source: MemoryModel | StoredModel, step: Step, inputs: BlockInputs, report: BasisReport) -> Seen:
        """Changes the basis of the current block; returns the inputs of its layers in the new basis, in order."""
        assert isinstance(self.pattern, NM)
        seen = see_inputs(step.inside, inputs, SOLVERS["sparsegpt"], inputs.num_sequences)
        block = describe(source.model).blocks[step.index]  # anew: its views are of the weights in memory now
        turn_block_(block, seen, inputs, self.basis, self.pattern, report)
        if self._solver.axes == 1:  # H = 2 X^T X / num_sequences, and Wanda reads the mean of |X_j|^2
            for entry in entries_of(seen):
                entry.statistic = entry.statistic.diagonal() / 2
        return seen

    def _prune_(self, inside: Mapping[str, SparseLayer], seen: Seen) -> list[LayerResult]:
        """Prunes the layers that read the inputs `seen`."""
        results = []
        for entry in seen:
            if isinstance(entry, ExpertInputs):
                layer = inside[entry.names[0]]
                assert isinstance(layer, ExpertLinear)
                results.append(prune_experts(layer, entry, self._solver, self._settings, self.refinements))
            else:
                weights = {name: inside[name].weight for name in entry.names}
                results += prune_layers(weights, entry, self._solver, self._settings, self.refinements)
        return results

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.method or "sparsegpt"]

    @property
    def _settings(self) -> Settings:
        return Settings(self.pattern, self.damping, self.block_columns)

    def _prune_units_(
        self,
        model: PreTrainedModel,
        calibration: Tensor | None,
        extras: Extras,
        folder: StartFolder | None,
        progress: Progress,
    ) -> OneshotReport:
        return prune_units_(
            model,
            str(self.method),
            self.pattern,
            calibration=calibration,
            extras=extras,
            damping=self.damping,
            refit_iterations=self.refinements.num_refits(self.pattern),
            filter_fn=self.filter_fn,
            folder=folder,
            progress=progress,
            precision=self.precision,
        )

    def _check(
        self, source: MemoryModel | StoredModel, layers: Mapping[str, SparseLayer], calibration: Tensor | None
    ) -> None:
        """Raises `InputError` for options or layers that cannot be used, before any weight is changed."""
        method, refinements = self.method, self.refinements
        if method is not None and method not in SOLVERS:
            raise InputError(f"there is no one-shot method {method!r}: choose one of {', '.join(SOLVERS)}")
        if method == "sparsegpt" and not isinstance(self.pattern, NM):
            raise InputError(f"SparseGPT prunes to n:m patterns, not to {self.pattern}: use wanda or magnitude")
        if self.block_columns < 1:
            raise InputError(f"block_columns = {self.block_columns} is out of range: it must be at least 1")
        if self.basis.rotate == "residual" and isinstance(source, StoredModel):
            raise InputError("rotate residual needs the whole model in memory: use rotate values, or memory model")
        check_plain_weights(layers, "pruning")
        if calibration is not None:
            check_calibration(source.model, calibration)
            if refinements.reconstruct_epochs and len(calibration) < 2:
                raise InputError("reconstruct_epochs needs at least 2 calibration sequences, one of them held out")
        elif method is None or SOLVERS[method].add is not None:
            raise InputError(f"method {method} needs a calibration text: pass calibration, from draw_calibration")
        if refinements != NO_REFINEMENTS and method != "sparsegpt":
            raise InputError(f"refinements are for method sparsegpt, not for {method}: omit them")


class _timed:  # noqa: N801
    """Adds the time spent inside the context to `report.seconds`."""

    def __init__(self, report: BasisReport | OneshotReport) -> None:
        self.report = report

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.report.seconds += time.perf_counter() - self.started


def prune_oneshot_(
    model: PreTrainedModel,
    method: str,
    *,
    pattern: Pattern | str = "2:4",
    calibration: Tensor | None = None,
    extras: Extras = None,
    damping: float = 0.01,
    block_size: int = BLOCK_COLUMNS,
    basis: BasisOptions = NO_BASIS,
    refinements: Refinements = NO_REFINEMENTS,
    seed: int = 0,
    filter_fn: FilterFn = is_sparse_linear,
    progress: Progress | None = None,
    precision: str = "fp32",
) -> OneshotReport:
    """Prunes a model to a pattern in place, without training; by default with the method as published.

    The weights keep their dtype. `castlm.structured.prune.prune_units_` prunes structured patterns, with the methods
    in `SCORED_BY`; method taylor holds the gradient of every weight that may be pruned.

    Args:
        method: "magnitude", "wanda" or "sparsegpt", see `SOLVERS`; for a structured pattern, a name in `SCORED_BY`.
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`. Magnitude needs none, and uses only
            its first 256 tokens, to measure reconstruction errors.
        extras: for each sequence, the further arguments of the model's forward, such as images.
        damping: see `Start`, as for `seed`, `filter_fn` and `precision`.
        block_size: SparseGPT: columns between two full matmuls. It affects only the speed.
        basis: changes of basis; none by default.
        refinements: refinements of SparseGPT; none by default. Structured patterns read only `refit_iterations`.
        progress: called with (finished blocks, all blocks).

    Raises:
        InputError: as `Start.make_`. Blocks before the one that the message names are pruned already.

    Reference: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    start = Start(
        method=method,
        pattern=parse_pattern(pattern),
        basis=basis,
        refinements=refinements,
        damping=damping,
        block_columns=block_size,
        seed=seed,
        filter_fn=filter_fn,
        precision=precision,
    )
    layers, _ = sparse_linears(model, start.pattern, filter_fn)
    if method == "magnitude" and calibration is not None and calibration.dim() == 2 and isinstance(start.pattern, NM):
        num_sequences = math.ceil(ERROR_TOKENS / calibration.shape[1])
        calibration, extras = calibration[:num_sequences], extras and extras[:num_sequences]
    return start.make_(MemoryModel(model, layers), calibration, extras, progress=progress or (lambda done, total: None))


def change_basis_(
    model: PreTrainedModel,
    calibration: Tensor,
    options: BasisOptions | None = None,
    *,
    extras: Extras = None,
    pattern: Pattern | str = "2:4",
    filter_fn: FilterFn = is_sparse_linear,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    precision: str = "fp32",
) -> BasisReport:
    """Changes the basis of a dense model in place, without pruning it.

    Args:
        calibration, extras, precision: as for `prune_oneshot_`.
        options: the changes; None for the defaults of `BasisOptions`.
        filter_fn: chooses the layers that will be pruned, as for `sparse_linears`; only their errors count.
        say: called with a line about each kind of change, and about each change that was omitted or undone.
        progress: called with (finished blocks, all blocks).

    Raises:
        InputError: a family that does not allow the changes; "auto" keeps the basis instead, and reports it.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> change_basis_(model, tokens, say=print)  # doctest: +SKIP
    """
    start = Start(
        method=None,
        pattern=parse_pattern(pattern),
        basis=options or BasisOptions(),
        filter_fn=filter_fn,
        precision=precision,
    )
    layers, _ = sparse_linears(model, start.pattern, filter_fn)
    report = start.make_(MemoryModel(model, layers), calibration, extras, say=say, progress=progress)
    return replace(report.basis)
