"""The step that changes the basis of each transformer block, before its layers are pruned."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from castlm.core.nm import NM
from castlm.data.calibration import CalibrationText
from castlm.oneshot.basis import change_block_basis_, why_unchanged
from castlm.oneshot.families import describe
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.options import BasisOptions, Effort
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.source import Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit


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
            block, visit.seen, visit.inputs, self.basis, self.effort, self.pattern, report.basis, visit.ranks
        )
        report.basis.seconds += time.perf_counter() - began
