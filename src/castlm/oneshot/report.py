"""The report of a start, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from castlm.facts import Basis, BasisChange, Reconstructed, Solved
from castlm.oneshot.routed import calibrated_on_all_note


@dataclass
class LayerResult:
    """The result of pruning one layer."""

    name: str
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""
    num_zeros: int
    error: float | None = None
    """|X W^T - X W'^T|^2 / |X W^T|^2 on the first 256 calibration tokens, the mean over experts; None without
    calibration text."""
    damping: float | None = None
    """SparseGPT's damping, which is raised above the given value if the Hessian could not be factorized."""
    num_few: int = 0
    """Experts with fewer routed tokens than their input has columns, which were calibrated on all tokens instead."""
    num_zero_inputs: int = 0
    """Matrices (1, or the number of experts) masked by magnitude because their whole input is 0 on the calibration
    text."""

    @classmethod
    def of_matrices(cls, name: str, results: Sequence[LayerResult], num_few: int) -> LayerResult:
        """The result of a layer (experts, out, in) from the results of its matrices (out, in)."""
        return cls(
            name,
            (len(results), *results[0].shape),
            num_zeros=sum(result.num_zeros for result in results),
            error=sum(result.error or 0.0 for result in results) / len(results),
            damping=max((result.damping for result in results if result.damping is not None), default=None),
            num_few=num_few,
            num_zero_inputs=sum(result.num_zero_inputs for result in results),
        )


@dataclass
class OneshotReport:
    """The result of a start: its layers and its changes of basis."""

    damping: float | None = None
    """The given damping; None for a method without damping."""
    layers: list[LayerResult] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    """The reason for each layer that stays dense, by name."""
    reconstructions: list[Reconstructed] = field(default_factory=list)
    """One for each block, if blocks are reconstructed."""
    share: float = 1.0
    """The share of the layers in the weights by which the transformer blocks multiply; of `castlm prune`."""
    seconds: float = 0.0
    """Time without the changes of basis."""
    basis: Basis = field(default_factory=Basis)

    def saved(self) -> dict[str, Any]:
        """The results of the finished blocks, for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "reconstructions": [asdict(block) for block in self.reconstructions],
            "seconds": self.seconds,
            "changes": [asdict(change) for change in self.basis.changes],
            "notes": self.basis.notes,
            "moved": self.basis.moved,
            "basis_seconds": self.basis.seconds,
        }

    def restore_(self, saved: Mapping[str, Any]) -> None:
        """Restores the results that an earlier process has `saved`."""
        self.layers = [LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in saved["layers"]]
        self.reconstructions = [Reconstructed(**block) for block in saved["reconstructions"]]
        changes = [BasisChange(**change) for change in saved["changes"]]
        self.basis = Basis(changes, list(saved["notes"]), saved["moved"], saved["basis_seconds"])
        self.seconds = saved["seconds"]

    @property
    def zero_fraction(self) -> float:
        """The share of zeros among the weights of the pruned layers."""
        return sum(r.num_zeros for r in self.layers) / sum(math.prod(r.shape) for r in self.layers)

    @property
    def raised_damping(self) -> dict[str, float]:
        """The damping of each layer that needed more than the given one, by name."""
        return {r.name: r.damping for r in self.layers if r.damping is not None and r.damping != self.damping}

    @property
    def calibrated_on_all(self) -> dict[str, int]:
        """The number of experts, by layer, that were calibrated on all tokens because too few were routed to them."""
        return {result.name: result.num_few for result in self.layers if result.num_few}

    @property
    def zero_inputs(self) -> dict[str, int]:
        """The number of matrices (one, or experts), by layer, masked by magnitude because their input is always 0."""
        return {result.name: result.num_zero_inputs for result in self.layers if result.num_zero_inputs}

    def notes(self) -> list[str]:
        """A line for each deviation from the given options."""
        lines = [calibrated_on_all_note(self.calibrated_on_all)] if self.calibrated_on_all else []
        if raised := self.raised_damping:
            most = max(raised.values())
            lines.append(
                f"{len(raised)} of {len(self.layers)} layers took more damping than {self.damping:g}, up to {most:g}"
            )
        if names := list(self.zero_inputs):
            others = f" and {len(names) - 3} others" if len(names) > 3 else ""
            lines.append(
                f"the calibration text leaves the whole input of {', '.join(names[:3])}{others} at 0: masked by "
                "magnitude there"
            )
        return lines

    def solved(self) -> Solved:
        """The entries of castlm.json about the start."""
        return Solved(
            basis=self.basis,
            prune_seconds=round(self.seconds, 2),
            damping=self.damping,
            raised_damping=None if self.damping is None else self.raised_damping,
            experts_calibrated_on_all_tokens=self.calibrated_on_all or None,
            masked_by_magnitude=self.zero_inputs or None,
        )


def relative_error(lost: Tensor, whole: Tensor) -> float:
    """`|lost|^2 / |whole|^2`; 0 if `whole` is 0."""
    norm = whole.square().sum()
    return float(lost.square().sum() / norm) if norm > 0 else 0.0
