"""What one-shot pruning did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from castlm.oneshot.block_basis import Change
from castlm.oneshot.reconstruct import Reconstruction


@dataclass
class LayerResult:
    """What became of one layer."""

    name: str
    shape: tuple[int, ...]
    """(out, in), of experts (experts, out, in)."""
    num_zeros: int
    error: float | None = None
    """|X W^T - X W'^T|^2 / |X W^T|^2 on the first 256 calibration tokens; None without calibration. Of experts the
    mean."""
    num_dead: int = 0
    """Input columns that the calibration text never moves from 0."""
    damping: float | None = None
    """That SparseGPT took: above what was asked for where the Hessian could not be factorized with that."""
    num_few: int = 0
    """Experts to which fewer tokens were routed than an input of theirs has columns, and that have seen all tokens
    instead."""
    num_zero_inputs: int = 0
    """1 where the calibration text leaves the whole input at 0 and the mask is by magnitude; of experts how many."""


@dataclass
class BasisReport:
    """What the changes of basis of a start did."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out or undone, and why."""
    untied: bool = False
    """Whether the output head has got a weight of its own."""
    moved: float = 0.0
    """Largest difference of a block's output, or of a logit, relative to the largest."""
    seconds: float = 0.0
    stream_basis: Tensor | None = None
    """The rotation (hidden, hidden) of the residual stream; None if it stayed."""

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON, with the shape of `stream_basis` in its place."""
        shape = None if self.stream_basis is None else list(self.stream_basis.shape)
        return asdict(replace(self, stream_basis=None)) | {"stream_basis": shape}

    def lines(self) -> list[str]:
        return [*map(str, self.changes), *self.notes]

    def of(self, what: str) -> Change:
        """The change of that name, which may have been tried in earlier blocks."""
        found = next((change for change in self.changes if change.what == what), None)
        if found is None:
            self.changes.append(found := Change(what))
        return found


@dataclass
class OneshotReport:
    """What `prune_oneshot_` did."""

    method: str
    pattern: str
    num_sequences: int
    seq_len: int
    damping: float | None
    """As asked for; None where the method has none."""
    layers: list[LayerResult] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    """Reason by name."""
    reconstructions: list[Reconstruction] = field(default_factory=list)
    """By block, where blocks are reconstructed."""
    seconds: float = 0.0
    """All that is not the basis."""
    basis: BasisReport = field(default_factory=BasisReport)

    def saved(self) -> dict[str, Any]:
        """What is known of the finished blocks, for JSON."""
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
        """Takes over what an earlier process has `saved`."""
        self.layers = [LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in saved["layers"]]
        self.reconstructions = [Reconstruction(**block) for block in saved["reconstructions"]]
        self.seconds, self.basis.seconds = saved["seconds"], saved["basis_seconds"]
        self.basis.changes = [Change(**change) for change in saved["changes"]]
        self.basis.notes, self.basis.moved = list(saved["notes"]), saved["moved"]

    @property
    def zero_fraction(self) -> float:
        """Of the weights of the pruned layers."""
        return sum(r.num_zeros for r in self.layers) / sum(math.prod(r.shape) for r in self.layers)

    @property
    def raised_damping(self) -> dict[str, float]:
        """The layers that needed more damping than was asked for, with what they took."""
        return {r.name: r.damping for r in self.layers if r.damping is not None and r.damping != self.damping}

    @property
    def few_experts(self) -> dict[str, int]:
        """By layer, how many experts have seen all tokens of the text, because too few were routed to them."""
        return {result.name: result.num_few for result in self.layers if result.num_few}

    @property
    def zero_inputs(self) -> dict[str, int]:
        """By layer, how many of its matrices (one, or experts) were masked by magnitude, as their input is always 0."""
        return {result.name: result.num_zero_inputs for result in self.layers if result.num_zero_inputs}

    def notes(self) -> list[str]:
        """A line for each thing that went otherwise than asked for."""
        lines = [few_experts_note(self.few_experts)] if self.few_experts else []
        if raised := self.raised_damping:
            most = max(raised.values())
            lines.append(
                f"{len(raised)} of {len(self.layers)} layers took more damping than {self.damping:g}, up to {most:g}"
            )
        if found := self.zero_inputs:
            lines.append(
                f"the calibration text leaves the whole input of {', '.join([*found][:3])}"
                f"{f' and {len(found) - 3} others' if len(found) > 3 else ''} at 0: masked by magnitude there"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """The content of castlm.json about the start; no damping or experts where a method or a model has none."""
        damping = {} if self.damping is None else {"damping": self.damping, "raised_damping": self.raised_damping}
        zero_inputs = {"masked_by_magnitude": self.zero_inputs} if self.zero_inputs else {}
        times = {"basis": self.basis.as_dict(), "prune_seconds": round(self.seconds, 2)}
        return times | damping | few_experts_record(self.few_experts) | zero_inputs

    def as_dict(self) -> dict[str, Any]:
        """The whole report for JSON."""
        basis = self.basis.as_dict()
        found = asdict(replace(self, basis=BasisReport()))
        return found | {"basis": basis, "zero_fraction": self.zero_fraction, "raised_damping": self.raised_damping}


def few_experts_note(few: Mapping[str, int]) -> str:
    """A line about experts that were calibrated on all tokens, of which there are some in each layer of `few`."""
    of_block: dict[str, int] = {}
    for name, number in few.items():
        experts = name.rpartition(".")[0]
        of_block[experts] = max(number, of_block.get(experts, 0))
    return (
        f"{sum(of_block.values())} experts had fewer tokens routed to them than an input of theirs has columns, and "
        "were calibrated on all tokens: more calibration text gives them their own"
    )


def few_experts_record(few: Mapping[str, int]) -> dict[str, Any]:
    """What castlm.json says of experts that were calibrated on all tokens; nothing where there are none."""
    return {"experts_calibrated_on_all_tokens": dict(few)} if few else {}


def relative_error(lost: Tensor, whole: Tensor) -> float:
    """`|lost|^2 / |whole|^2`; 0 where there is nothing to lose."""
    norm = whole.square().sum()
    return float(lost.square().sum() / norm) if norm > 0 else 0.0
