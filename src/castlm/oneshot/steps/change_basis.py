"""The step that changes the basis of each transformer block, before its layers are pruned."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.data.calibration import CalibrationText
from castlm.oneshot.basis import change_block_basis_, wiring_or_note
from castlm.oneshot.families import Wiring, describe
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.options import BasisOptions
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.residual import rotate_residual_
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.source import MemoryModel, Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit


class ChangeBasis(Step):
    """Changes the basis inside each block so that pruning it to n:m loses less; see `castlm.oneshot.basis`.

    With rotate residual, the stream between the blocks is rotated before the first block. A family that does not allow
    the changes keeps its basis with rotate auto, and the report says why.
    """

    def __init__(self, pattern: NM, basis: BasisOptions) -> None:
        self.pattern, self.basis = pattern, basis
        self.is_divided = basis.rotate != "residual"
        self.wiring: Wiring | None = None
        """None if the basis stays as it is."""

    def __str__(self) -> str:
        return "a change of basis"

    def options(self) -> dict[str, Any]:
        return asdict(self.basis)

    def check(self, source: Source, text: CalibrationText | None) -> None:
        if self.basis.rotate == "residual" and not source.is_whole:
            raise InputError("rotate residual needs the whole model in memory: use rotate values, or memory model")

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        assert text is not None
        began = time.perf_counter()
        self.wiring, note = wiring_or_note(source.model, self.basis)
        report.basis.notes += [note] if note else []
        if self.wiring is not None and self.basis.rotate == "residual":
            assert isinstance(source, MemoryModel)
            rotate_residual_(source, self.wiring, text, self.pattern, self.basis.rotation_iterations, report.basis)
            report.basis.seconds = time.perf_counter() - began

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        if self.wiring is None or visit.inputs is None or not visit.inside:
            return
        began = time.perf_counter()
        visit.seen = see_inputs(visit.inside, visit.inputs, SOLVERS["sparsegpt"], visit.inputs.num_sequences)
        # described again: its views are of the weights that are in memory now
        block = describe(visit.source.model).blocks[visit.index]
        change_block_basis_(block, visit.seen, visit.inputs, self.basis, self.pattern, report.basis, visit.ranks)
        report.basis.seconds += time.perf_counter() - began
