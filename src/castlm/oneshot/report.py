"""What one-shot pruning did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

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
    is_left_unshifted: bool = False
    """Whether shifted targets were asked for, and the layer, of experts, has its own."""


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
        if unshifted := sum(result.is_left_unshifted for result in self.layers):
            lines.append(
                f"target_asymmetry and stream_correction do nothing for experts: {unshifted} of {len(self.layers)} "
                "layers are solved without them"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """What castlm.json says of it: nothing of a damping or of experts that a method or a model does not have."""
        damping = {} if self.damping is None else {"damping": self.damping, "raised_damping": self.raised_damping}
        zero_inputs = {"masked_by_magnitude": self.zero_inputs} if self.zero_inputs else {}
        return damping | few_experts_record(self.few_experts) | zero_inputs

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"zero_fraction": self.zero_fraction, "raised_damping": self.raised_damping}


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
