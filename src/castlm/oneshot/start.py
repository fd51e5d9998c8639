"""The start: sparse weights and masks before step 0, made from a dense model in one walk over its transformer blocks.

In each block in turn, the inputs of its layers decide the basis, the layers are pruned, reconstruction (an option)
trains the block towards its dense outputs, and its outputs enter the next block. With staged statistics, the inputs of
a layer are measured after the layers before it are pruned; layers that read the same tensor (q, k, v; gate, up) share
one statistic.
"""

from __future__ import annotations

import math
import pkgutil
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.core.sparsify import FilterFn, SparseLayer, is_sparse_linear, sparse_linears
from castlm.fields import Bound, Bounded
from castlm.models.architecture import eval_mode
from castlm.names import duration
from castlm.oneshot.basis import turn_block_, wiring_or_note
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.families import describe
from castlm.oneshot.folder import StartFolder
from castlm.oneshot.inputs import Seen, check_plain_weights, entries_of, see_inputs
from castlm.oneshot.options import NO_BASIS, NO_REFINEMENTS, BasisOptions, Refinements, part_of
from castlm.oneshot.reconstruct import reconstruct_
from castlm.oneshot.report import BasisReport, LayerResult, OneshotReport
from castlm.oneshot.residual import rotate_residual_
from castlm.oneshot.solve import prune_layers, prune_seen
from castlm.oneshot.solvers import ERROR_TOKENS, SOLVERS, Settings, Solver
from castlm.oneshot.source import MemoryModel, StoredModel
from castlm.oneshot.walk import BlockInputs, Extras, Step, walk
from castlm.patterns import parse_pattern

_SHORT = 10.0  # seconds; the time that a shorter start will take is not announced

OwnSolver = Callable[[Mapping[str, SparseLayer], BlockInputs | None], list[LayerResult]]
"""Prunes the layers of the current block, in place; see `Pattern.own_solver`."""
Say = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with (finished blocks, all blocks)."""


@dataclass(frozen=True, kw_only=True)
class Start(Bounded):
    """The settings of a start: the basis, the solver, its refinements and the pattern.

    Raises:
        InputError: an option that is out of range.
    """

    method: str | None
    """A name in `SOLVERS`, or one of the pattern's own `solvers`; None only changes the basis."""
    pattern: Pattern
    basis: BasisOptions = NO_BASIS
    refinements: Refinements = NO_REFINEMENTS
    damping: float = 0.01
    """SparseGPT: share of H's mean diagonal that is added to the diagonal."""
    seed: int = 0
    """Seed with which the calibration text is drawn, for the record."""
    filter_fn: FilterFn = is_sparse_linear
    """Chooses the layers to prune, as for `sparse_linears`."""
    precision: str = "fp32"
    """Precision of the passes over the calibration text: "fp32" runs them in the dtype of the weights, "bf16" under
    autocast, which multiplies in bf16. Statistics and solvers are fp32."""

    def out_of_range(self) -> Iterator[Bound]:
        yield "damping", 0 <= self.damping <= 1, "between 0 and 1"

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
        model, pattern, solver = source.model, self.pattern, SOLVERS.get(str(self.method))
        if self.method is not None and self.method not in pattern.solvers:
            raise InputError(f"{self.method!r} does not prune to {pattern}: choose one of {', '.join(pattern.solvers)}")
        if calibration is not None:
            check_calibration(model, calibration)
        elif self.method is None or self.method in pattern.calibrated or (solver and solver.add is not None):
            raise InputError(f"method {self.method} needs a calibration text: pass calibration, from draw_calibration")
        layers, left_dense = sparse_linears(model, pattern, self.filter_fn)
        if self.basis.rotate == "residual" and isinstance(source, StoredModel):
            raise InputError("rotate residual needs the whole model in memory: use rotate values, or memory model")
        check_plain_weights(layers)
        if self.refinements.reconstruct_epochs and calibration is not None and len(calibration) < 2:
            raise InputError("reconstruct_epochs needs at least 2 calibration sequences, one of them held out")
        if self.refinements != NO_REFINEMENTS and self.method != "sparsegpt" and pattern.own_solver is None:
            raise InputError(f"refinements are for method sparsegpt, not for {self.method}: omit them")
        takes_damping = self.method == "sparsegpt" or pattern.own_solver is not None
        report = OneshotReport(self.damping if takes_damping else None, left_dense=left_dense)
        with eval_mode(model):
            own_solver: OwnSolver | None = None
            if pattern.own_solver is not None:
                with _timed(report):
                    own_solver = pkgutil.resolve_name(pattern.own_solver)(self, model, layers, calibration, extras)
            wiring = None
            if calibration is not None:
                wiring, note = wiring_or_note(model, pattern, self.basis)
                report.basis.notes += [note] if note else []
                if wiring is not None and self.basis.rotate == "residual":
                    assert isinstance(source, MemoryModel)
                    assert isinstance(pattern, NM)
                    what = wiring, layers, calibration, extras, pattern, self.basis.rotation_iterations
                    with _timed(report.basis):
                        rotate_residual_(source, *what, self.precision, report.basis)
            if folder is not None and folder.done:
                report.restore_(folder.results)
                where = f"{folder.done} of {len(source.blocks)} transformer blocks, which are in {folder.path}"
                say(f"continuing after {where}")
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
            started = left_walk = time.perf_counter()
            for number, step in enumerate(blocks):
                report.seconds += time.perf_counter() - left_walk  # the walk's passes, and what it writes
                left = len(source.blocks) - step.index
                seconds = (time.perf_counter() - started) * left  # once the first block is done
                if number == 1 and seconds > _SHORT and step.inputs is not None:
                    after = time_after(step.inputs.seconds_per_token())
                    say(f"the start takes about {duration(seconds)} more, for {left} transformer blocks{after}")
                if own_solver is None:
                    self._make_block_(source, step, wiring is not None, report)
                elif step.inside:
                    with _timed(report):
                        report.layers += own_solver(step.inside, step.inputs)
                left_walk = time.perf_counter()
            report.seconds += time.perf_counter() - left_walk
        report.basis.changes = [change for change in report.basis.changes if change.num_tried]
        for line in (*report.basis.changes, *report.basis.notes):
            say(str(line))
        return report

    def _make_block_(self, source: MemoryModel | StoredModel, step: Step, turns: bool, report: OneshotReport) -> None:
        """Changes the basis of the current block, prunes it, and reconstructs its outputs."""
        inputs, settings = step.inputs, Settings(self.pattern, self.damping, self.refinements)
        if not step.inside:
            return
        if inputs is None:
            for name, layer in step.inside.items():
                report.layers += prune_layers({name: layer.weight}, None, self._solver, settings)
            return
        for seen in self._stages(source, step, inputs, turns, report):
            if self.method is not None:
                with _timed(report):
                    report.layers += prune_seen(step.inside, seen, self._solver, settings)
                    inputs.keep_outputs(step.inside[name] for entry in seen for name in entry.names)
        if self.refinements.reconstruct_epochs:
            inputs.drop_outputs()
            with _timed(report):
                block_report = reconstruct_(
                    inputs.blocks[inputs.index],
                    inputs.run,
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
        stages = [list(inside)]
        if self.refinements.staged_statistics and self.method is not None:
            # Layers whose names differ only in the number of a module, such as parallel experts, are one stage.
            alike: dict[tuple[str, ...], Seen] = {}
            for seen in first or see_inputs(inside, inputs, None, 0):
                key = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in seen.names)
                alike.setdefault(key, []).append(seen)
            stages = [[name for seen in group for name in seen.names] for group in alike.values()]
            # No pruned layer comes before the first stage, so its inputs are still right; the others are freed.
            first = next(iter(alike.values())) if turns else []
            del alike, seen
        for names in stages:
            if not first:
                with _timed(report):
                    wanted = {name: inside[name] for name in names}
                    first = see_inputs(wanted, inputs, self._solver, inputs.num_sequences)
            yield first
            first = []

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

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.method or "sparsegpt"]


@contextmanager
def _timed(report: BasisReport | OneshotReport) -> Iterator[None]:
    """Adds the time spent inside the context to `report.seconds`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds += time.perf_counter() - started


def prune_oneshot_(
    model: PreTrainedModel,
    method: str | None,
    *,
    pattern: Pattern | str = "2:4",
    calibration: Tensor | None = None,
    extras: Extras = None,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> OneshotReport:
    """Prunes a model to a pattern in place, without training; by default with the method as published.

    The weights keep their dtype. Structured patterns have solvers of their own, which `pattern.solvers` names; method
    taylor holds the gradient of every weight that may be pruned.

    Args:
        method: "magnitude", "wanda" or "sparsegpt", see `SOLVERS`; one of a structured pattern's own solvers; or None,
            which prunes nothing.
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`. Magnitude needs none, and uses only
            its first 256 tokens, to measure reconstruction errors.
        extras: for each sequence, the further arguments of the model's forward, such as images.
        say: as for `Start.make_`.
        progress: as for `Start.make_`.
        options: further fields of `Start`: `basis` and `refinements`, both off by default (structured patterns read
            only `refit_iterations`); `damping`, `filter_fn` and `precision`.

    Raises:
        InputError: as `Start.make_`. Blocks before the one that the message names are pruned already.

    Reference: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    start = Start(method=method, pattern=parse_pattern(pattern), **options)
    layers, _ = sparse_linears(model, start.pattern, start.filter_fn)
    if method == "magnitude" and calibration is not None and start.pattern.own_solver is None:
        num_sequences = math.ceil(ERROR_TOKENS / calibration.shape[1])
        calibration, extras = calibration[:num_sequences], extras and extras[:num_sequences]
    return start.make_(MemoryModel(model, layers), calibration, extras, say=say, progress=progress)


def change_basis_(
    model: PreTrainedModel, calibration: Tensor, basis: BasisOptions | None = None, **options: Any
) -> BasisReport:
    """Changes the basis of a dense model in place, without pruning it.

    Args:
        calibration: as for `prune_oneshot_`.
        basis: the changes; None for the defaults of `BasisOptions`.
        options: further arguments of `prune_oneshot_`. `filter_fn` chooses the layers that will be pruned: only their
            errors count. `say` is called with a line about each change that was made, omitted or undone.

    Raises:
        InputError: a family that does not allow the changes; "auto" keeps the basis instead, and reports it.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> change_basis_(model, tokens, say=print)  # doctest: +SKIP
    """
    return prune_oneshot_(model, None, calibration=calibration, basis=basis or BasisOptions(), **options).basis
