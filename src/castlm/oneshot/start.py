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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern, as_pattern
from castlm.core.sparsify import FilterFn, SparseLayer, is_sparse_linear, sparse_linears
from castlm.models.architecture import eval_mode
from castlm.names import duration
from castlm.oneshot.basis import change_block_basis_, wiring_or_note
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

_SHORT = 10.0  # seconds; the time that a shorter start will take is not announced

BlockSolver = Callable[[Mapping[str, SparseLayer], BlockInputs | None], list[LayerResult]]
"""Prunes the layers of the current block, in place; an instance of `Pattern.solver_class`."""
Say = Callable[[str], None]
Progress = Callable[[int, int], None]
"""Called with (finished blocks, all blocks)."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The settings of a start: the basis, the solver, its refinements and the pattern."""

    method: str | None
    """A name in `SOLVERS`, or one of the pattern's own `solvers`; None only changes the basis."""
    pattern: Pattern
    basis: BasisOptions = NO_BASIS
    refinements: Refinements = NO_REFINEMENTS
    """Those without an effect become as in `NO_REFINEMENTS`; one that was asked for raises `InputError`."""
    seed: int = 0
    """Seed with which the calibration text is drawn, for the record."""
    filter_fn: FilterFn = is_sparse_linear
    """Chooses the layers to prune, as for `sparse_linears`."""
    precision: str = "fp32"
    """Precision of the passes over the calibration text: "fp32" runs them in the dtype of the weights, "bf16" under
    autocast, which multiplies in bf16. Statistics and solvers are fp32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        if self.method is not None:
            object.__setattr__(self, "refinements", self.refinements.for_solver(self.method, self.pattern))

    @classmethod
    def of(cls, options: Any, method: str, pattern: Pattern, **others: Any) -> Start:
        """Makes a start from `options`, which have the fields of `BasisOptions`, `Refinements` and
        `EffortOptions`.

        Args:
            others: further fields of the start.

        Raises:
            InputError: an option that has no effect with the method.
        """
        refinements = part_of(options, Refinements).for_solver(method, pattern, options.start_effort)
        basis = part_of(options, BasisOptions)
        return cls(method=method, pattern=pattern, basis=basis, refinements=refinements, **others)

    def options(self) -> dict[str, Any]:
        """All settings on which the result depends, besides the model and the text, for JSON."""
        return {
            "method": self.method,
            "pattern": str(self.pattern),
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
        `folder`), and the statistics of one block (SparseGPT: an fp32 matrix (in, in) for each distinct input). With
        staged statistics, a model in memory also needs the outputs of the attention of one block.

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
        layers, left_dense = sparse_linears(model, self.pattern, self.filter_fn)
        self._check(source, layers, calibration)
        has_own_solver = self.pattern.solver_class is not None
        reads_damping = self.method == "sparsegpt" or has_own_solver
        report = OneshotReport(self.refinements.damping if reads_damping else None, left_dense=left_dense)
        started = time.perf_counter()
        with eval_mode(model):
            own_solver: BlockSolver | None = None
            if self.pattern.solver_class is not None:
                solver_class = pkgutil.resolve_name(self.pattern.solver_class)
                own_solver = solver_class(self, model, layers, calibration, extras)
            wiring = None
            if calibration is not None:
                wiring, note = wiring_or_note(model, self.pattern, self.basis)
                report.basis.notes += [note] if note else []
            if wiring is not None and calibration is not None and self.basis.rotate == "residual":
                assert isinstance(source, MemoryModel)
                assert isinstance(self.pattern, NM)
                rotate_residual_(
                    source,
                    wiring,
                    layers,
                    calibration,
                    extras,
                    pattern=self.pattern,
                    iterations=self.basis.rotation_iterations,
                    precision=self.precision,
                    report=report.basis,
                )
                report.basis.seconds = time.perf_counter() - started
            if folder is not None and folder.done:
                report.restore_(folder.results)
                started = time.perf_counter() - report.basis.seconds - report.seconds  # the earlier process counts too
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
            first_started = 0.0
            for number, step in enumerate(blocks):
                if number == 0:  # the text has passed through the embeddings
                    first_started = time.perf_counter()
                if number == 1 and step.inputs is not None:  # the first block is done: the others take as long
                    num_left = len(source.blocks) - step.index
                    seconds = (time.perf_counter() - first_started) * num_left
                    if seconds > _SHORT:
                        after = time_after(step.inputs.seconds_per_token())
                        say(f"the start takes about {duration(seconds)} more, for {num_left} transformer blocks{after}")
                if own_solver is not None and step.inside:
                    report.layers += own_solver(step.inside, step.inputs)
                elif step.inputs is not None and step.inside:
                    self._make_block_(source, step, step.inputs, wiring is not None, report)
                else:  # magnitude without a calibration text
                    for name, layer in step.inside.items():
                        report.layers += prune_layers({name: layer.weight}, None, self._solver, self._settings)
                report.seconds = time.perf_counter() - started - report.basis.seconds
            report.seconds = time.perf_counter() - started - report.basis.seconds
        report.basis.changes = [change for change in report.basis.changes if change.num_tried]
        for line in (*report.basis.changes, *report.basis.notes):
            say(str(line))
        return report

    def _check(
        self, source: MemoryModel | StoredModel, layers: Mapping[str, SparseLayer], calibration: Tensor | None
    ) -> None:
        """Raises `InputError` for a method, refinements or a text that do not fit, before anything changes."""
        solvers, refinements = self.pattern.solvers, self.refinements
        has_own_solver = self.pattern.solver_class is not None
        if self.method is not None and self.method not in solvers:
            raise InputError(f"{self.method!r} does not prune to {self.pattern}: choose one of {', '.join(solvers)}")
        needs_text = self.method in self.pattern.calibrated or (not has_own_solver and self._solver.add is not None)
        if calibration is not None:
            check_calibration(source.model, calibration)
        elif needs_text:
            raise InputError(f"method {self.method} needs a calibration text: pass calibration, from draw_calibration")
        if self.basis.rotate == "residual" and isinstance(source, StoredModel):
            raise InputError("rotate residual needs the whole model in memory: use rotate values, or memory model")
        check_plain_weights(layers)
        if refinements.reconstruct_epochs and calibration is not None and len(calibration) < 2:
            raise InputError("reconstruct_epochs needs at least 2 calibration sequences, one of them held out")

    def _make_block_(
        self,
        source: MemoryModel | StoredModel,
        step: Step,
        inputs: BlockInputs,
        changes_basis: bool,
        report: OneshotReport,
    ) -> None:
        """Changes the basis of the current block, prunes its layers in the order of their calls, and reconstructs."""
        inside = step.inside
        seen: Seen = []
        if changes_basis:
            began = time.perf_counter()
            seen = self._change_basis_(source, step, inputs, report.basis)
            report.basis.seconds += time.perf_counter() - began
        source.keep_dense(inside)
        if self.method is None:
            return
        stages = [list(inside)]
        if self.refinements.staged_statistics:
            by_stage = _stages(seen if changes_basis else see_inputs(inside, inputs, None, 0))
            stages = [[name for entry in stage for name in entry.names] for stage in by_stage]
            # No pruned layer comes before the first stage, so its statistics are still right; the others are freed.
            seen = by_stage[0] if changes_basis else []
            del by_stage
        # Where one block at a time is in memory, to need little of it counts more than time.
        keeps_outputs = isinstance(source, MemoryModel) and self.refinements.keeps_outputs
        for num_done, names in enumerate(stages, 1):
            if not seen:
                seen = see_inputs({name: inside[name] for name in names}, inputs, self._solver, inputs.num_sequences)
            report.layers += prune_seen(inside, seen, self._solver, self._settings)
            seen = []
            unpruned = [inside[name] for later in stages[num_done:] for name in later]
            if keeps_outputs and unpruned:
                inputs.keep_outputs(_finished(inputs.blocks[inputs.index], inside.values(), unpruned))
        if self.refinements.reconstruct_epochs:
            block_report = reconstruct_(
                inputs.blocks[inputs.index],
                inputs.run,
                inputs,
                step.dense_outputs,
                {layer.weight: layer.weight != 0 for layer in inside.values()},
                epochs=self.refinements.reconstruct_epochs,
                learning_rate=self.refinements.reconstruct_rate,
            )
            report.reconstructions.append(block_report)

    def _change_basis_(
        self, source: MemoryModel | StoredModel, step: Step, inputs: BlockInputs, report: BasisReport
    ) -> Seen:
        """Changes the basis of the current block; returns the inputs of its layers in the new basis, in order."""
        assert isinstance(self.pattern, NM)
        seen = see_inputs(step.inside, inputs, SOLVERS["sparsegpt"], inputs.num_sequences)
        block = describe(source.model).blocks[step.index]  # described again: its views are of the weights in memory now
        change_block_basis_(block, seen, inputs, self.basis, self.pattern, report)
        if self._solver.axes == 1:  # H = 2 X^T X / num_sequences, and Wanda reads the mean of |X_j|^2
            for entry in entries_of(seen):
                entry.statistic = entry.statistic.diagonal() / 2
        return seen

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.method or "sparsegpt"]

    @property
    def _settings(self) -> Settings:
        return Settings(self.pattern, self.refinements)


def _stages(seen: Seen) -> list[Seen]:
    """Inputs in the order of the calls, grouped by the layers that are pruned before the next statistics are taken.

    A group has the layers that read one input, such as q, k and v. Layers whose names differ only in the number of a
    module, such as parallel experts, are one group.
    """
    alike: dict[tuple[str, ...], Seen] = {}
    for entry in seen:
        names = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in entry.names)
        alike.setdefault(names, []).append(entry)
    return list(alike.values())


def _finished(
    block: nn.Module, layers: Collection[SparseLayer], unpruned: Collection[SparseLayer]
) -> Iterator[nn.Module]:
    """The modules directly in `block`, such as its attention, that contain `layers` and none that is unpruned."""
    for module in block.children():
        inside = set(module.modules()) - {module}
        if not inside.isdisjoint(layers) and inside.isdisjoint(unpruned):
            yield module


def prune_oneshot_(
    model: PreTrainedModel,
    method: str | None,
    *,
    pattern: Pattern = NM(2, 4),  # noqa: B008
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
            only `refit_iterations` and `damping`); `filter_fn` and `precision`.

    Raises:
        InputError: as `Start.make_`. Blocks before the one that the message names are pruned already.

    Reference: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    start = Start(method=method, pattern=pattern, **options)
    layers, _ = sparse_linears(model, start.pattern, start.filter_fn)
    if method == "magnitude" and calibration is not None and start.pattern.solver_class is None:
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
