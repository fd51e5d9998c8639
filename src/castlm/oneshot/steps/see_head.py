"""The step that sums the Hessian of the output head's input, by which `round_table` rounds a head to int6 or int4.

It changes nothing, and comes last: the head reads what the changed blocks give.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from castlm.oneshot.inputs import check_finite_input
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.solvers import SOLVERS, whole_hessian
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit

HEAD_HESSIAN = "hessian:head"
"""The name of the Hessian in the file of the last block."""


class SeeHead(Step):
    """Sums the Hessian of the output head's input after the last block, and leaves it beside this block.

    Attributes:
        hessian: fp32 (hidden, hidden), on the CPU; None before the last block, and in a start that continues behind it.
    """

    def __init__(self) -> None:
        self.hessian: Tensor | None = None

    def __str__(self) -> str:
        return "the output head"

    def options(self) -> dict[str, Any]:
        return {"sees_head": True}

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        if visit.inputs is None or visit.index < len(visit.source.blocks) - 1:
            return
        hessian: Tensor | None = None
        for hidden in visit.inputs.leaving(visit.source):
            rows = hidden.flatten(0, 1)  # (2, 512, 576) -> (1024, 576)
            if hessian is None:
                hessian = SOLVERS["sparsegpt"].zeros(rows)
            SOLVERS["sparsegpt"].add(hessian, rows, visit.inputs.num_sequences)
        assert hessian is not None
        check_finite_input("the output head", hessian)
        self.hessian = visit.beside[HEAD_HESSIAN] = whole_hessian(hessian).cpu()
