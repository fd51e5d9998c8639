"""How a start is made of a dense model: a change of basis, then the one-shot solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.combined import is_structured
from castlm.core.pattern import Pattern
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.oneshot.basis import BasisReport, change_basis_
from castlm.oneshot.options import BasisOptions, Refinements, check_damping, part_of
from castlm.oneshot.prune import check_prune, prune_oneshot_
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.solvers import Settings
from castlm.oneshot.walk import Images

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""


@dataclass(frozen=True, kw_only=True)
class OneshotStart:
    """The basis in which a model is pruned, by which method, and to which pattern.

    Raises:
        InputError: an option that is out of range.
    """

    method: str
    pattern: Pattern
    basis: BasisOptions
    refinements: Refinements
    damping: float = 0.01
    """Of SparseGPT."""
    seed: int = 0
    """Of method "random"."""
    filter_fn: FilterFn = is_sparse_linear
    """Which layers are pruned, as for `sparse_linears`."""
    precision: str = "fp32"
    """Of the passes over the calibration text, as for `prune_oneshot_`."""

    def __post_init__(self) -> None:
        self.refinements.check()
        self.basis.check()
        check_damping(self.damping)

    @classmethod
    def of(cls, options: Any, method: str, pattern: Pattern, **others: Any) -> OneshotStart:
        """The start by `options`, which have the fields of `BasisOptions` and `Refinements`.

        Args:
            others: fields of the start that differ from their defaults.

        Raises:
            InputError: an option that is out of range, or that does nothing with the method.
        """
        refinements = part_of(options, Refinements).for_solver(method, pattern)
        basis = part_of(options, BasisOptions)
        return cls(method=method, pattern=pattern, basis=basis, refinements=refinements, **others)

    @property
    def settings(self) -> Settings:
        """Of n:m."""
        return Settings(self.pattern, self.damping, 128)

    def change_basis_(
        self,
        model: PreTrainedModel,
        calibration: Tensor,
        images: Images,
        *,
        say: Callable[[str], None],
        progress: Progress,
    ) -> BasisReport:
        """`castlm.oneshot.basis.change_basis_` with these options, which are those of `prune_` that follows.

        Raises:
            InputError: as `prune_`, of n:m, before the work of the change of basis.
        """
        if not is_structured(self.pattern):
            layers, _ = sparse_linears(model, self.pattern, self.filter_fn)
            check_prune(model, self.method, layers, calibration, self.settings, self.refinements)
        return change_basis_(
            model,
            calibration,
            self.basis,
            images=images,
            pattern=self.pattern,
            filter_fn=self.filter_fn,
            say=say,
            progress=progress,
            precision=self.precision,
        )

    def prune_(
        self, model: PreTrainedModel, calibration: Tensor | None, images: Images, *, progress: Progress
    ) -> OneshotReport:
        """`castlm.oneshot.prune.prune_oneshot_` with these options."""
        return prune_oneshot_(
            model,
            self.method,
            pattern=self.pattern,
            calibration=calibration,
            images=images,
            damping=self.damping,
            refinements=self.refinements,
            seed=self.seed,
            filter_fn=self.filter_fn,
            progress=progress,
            precision=self.precision,
        )


def start_record(basis: BasisReport | None, report: OneshotReport) -> dict[str, Any]:
    """What castlm.json says of a start; `basis` is None where the method reads no calibration text."""
    return {
        "basis": None if basis is None else basis.as_dict(),
        "prune_seconds": round(report.seconds, 2),
        **report.record(),
    }
