"""A structured pattern together with n:m: units are masked whole, and what is left is n:m sparse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.pattern_base import Pattern
from castlm.core.structured import Channels, Heads, Structured, cut

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Combined(Pattern):
    """A structured pattern, and n:m in what it keeps; layers outside of its units are n:m alone.

    Groups of m run through what is left after the cut: in the columns of down, through the kept channels.
    """

    outer: Structured
    inner: NM

    form: ClassVar[str] = "one of these with n:m, as channels:0.75+2:4"

    def __str__(self) -> str:
        return f"{self.outer}+{self.inner}"

    @classmethod
    def parse_form(cls, text: str) -> Combined | None:
        first, plus, second = text.partition("+")
        inner = NM.parse_form(second) if plus else None
        outer = next((found for kind in (Channels, Heads) if (found := kind.parse_form(first))), None)
        if inner is None or outer is None:
            return None
        # the columns of down are the kept channels; of o they are whole heads, whose size mostly divides by m
        return cls(replace(outer, multiple=inner.m) if isinstance(outer, Channels) else outer, inner)

    def for_model(self, model: nn.Module) -> Combined:
        outer = self.outer.for_model(model)
        assert isinstance(outer, Structured)
        return replace(self, outer=outer)

    def units(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        names = list(names)
        units = self.outer.units(names)
        grouped = {name for unit in units for name in unit}
        return units + [(name,) for name in names if name not in grouped]

    def misfit(self, shape: Sequence[int]) -> str | None:
        return self.inner.misfit(shape)

    def mask(self, weight: Tensor) -> Tensor:
        raise InputError(f"pattern {self} masks several weights together: use unit_masks")

    def violations(self, weight: Tensor) -> int:
        """Returns 0: a single weight does not determine the number of kept units; `unit_violations` counts."""
        return 0

    def unit_masks(self, weights: Sequence[Tensor]) -> list[Tensor]:
        if len(weights) == 1:  # a layer outside of the units of `outer`
            return [self.inner.mask(weight) for weight in weights]
        return self.masks_within(self.outer.kept_units(weights), weights)

    def masks_within(self, kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The masks that keep n of m in what is left of `weights` when only the units `kept` (units,) stay."""
        import torch

        outer = self.outer.expand(kept, weights)
        masks = []
        for weight, mask in zip(weights, outer):
            small = self.inner.mask(cut(weight, mask))
            masks.append(torch.zeros_like(mask).masked_scatter_(mask, small))
        return masks

    def unit_violations(self, weights: Sequence[Tensor]) -> int:
        if len(weights) == 1:
            return sum(self.inner.violations(weight) for weight in weights)
        found = self.outer.unit_violations(weights)
        outer = self.outer.expand(self.outer.kept_units(weights), weights)
        return found + sum(self.inner.violations(cut(weight, mask)) for weight, mask in zip(weights, outer))


def is_structured(pattern: Pattern) -> bool:
    """Whether a pattern masks whole units, alone or with n:m."""
    return isinstance(pattern, Structured | Combined)
