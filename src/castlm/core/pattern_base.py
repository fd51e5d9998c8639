"""The interface of a sparsity pattern: which weights a layer keeps, how a mask is made, how violations are counted.

Importing this module does not import torch, so that commands which only parse a pattern start quickly; the methods that
take tensors import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from castlm.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

P = TypeVar("P", bound="Pattern")


class Pattern(ABC):
    """A rule that says which weights are kept. Subclasses are frozen dataclasses, and `str(pattern)` parses back.

    A mask is made for one *unit* at a time. By default each weight is a unit of its own, and a subclass only defines
    `parse_form`, `misfit`, `mask` and `violations`. A pattern that prunes several weights together (a channel of an MLP
    is a row of two weights and a column of a third) also overrides `units`, `unit_masks` and `unit_violations`.
    """

    table: ClassVar[tuple[type[Pattern], ...]] = ()
    """The patterns that `parse` tries, in this order; `castlm.core.pattern` fills it."""

    form: ClassVar[str]
    """What the text of the pattern looks like, for error messages."""
    independent_rows: ClassVar[bool] = False
    """Whether the mask of a row depends on that row alone, so that a weight may be sharded by rows."""
    outside: ClassVar[str] = "in no unit of the pattern"
    """Why a layer that `units` leaves out stays dense."""

    @classmethod
    def parse(cls: type[P], text: str) -> P:
        """The pattern that a text describes.

        Raises:
            InputError: no pattern has this form, a number is out of range, or the pattern is not a `cls`.

        Examples:
            >>> Pattern.parse("2:4")
            NM(n=2, m=4)
        """
        candidates = (kind.parse_form(text) for kind in cls.table) if isinstance(text, str) else ()
        pattern = next((candidate for candidate in candidates if candidate is not None), None)
        if not isinstance(pattern, cls):
            forms = ", ".join(kind.form for kind in cls.table if issubclass(kind, cls))
            raise InputError(f"pattern {text!r} is not of the form {forms}: try 2:4")
        return pattern

    @classmethod
    @abstractmethod
    def parse_form(cls: type[P], text: str) -> P | None:
        """The pattern that `text` describes; None if it does not have the form of this class."""

    @abstractmethod
    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have the pattern, as a clause; None if it can."""

    @abstractmethod
    def mask(self, weight: Tensor) -> Tensor:
        """The mask of `weight` (out, in) by magnitude: bool, of the same shape, True = kept.

        Raises:
            InputError: the shape does not fit the pattern, or `weight` contains NaN.
        """

    @abstractmethod
    def violations(self, weight: Tensor) -> int:
        """The number of places in `weight` (out, in) with more non-zeros than the pattern allows. NaN is a non-zero."""

    def for_model(self, model: nn.Module) -> Pattern:
        """This pattern with what it has to know of a model, such as the size of its heads; mostly itself."""
        return self

    def units(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The layers of a model, grouped by which are masked together, in the order that `unit_masks` expects."""
        return [(name,) for name in names]

    def unit_masks(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights of one unit, as `mask`."""
        return [self.mask(weight) for weight in weights]

    def unit_violations(self, weights: Sequence[Tensor]) -> int:
        """The violations in the weights of one unit, as `violations`."""
        return sum(self.violations(weight) for weight in weights)

    def refresh_(
        self, units: Sequence[Sequence[Tensor]], packed: Sequence[Sequence[Tensor]], compile: bool = False
    ) -> tuple[Tensor | int, bool]:
        """Recomputes the masks of several units, in place.

        Args:
            units: the weights of each unit, (out, in) each.
            packed: the mask of each weight, (out, ceil(in / 8)) uint8 as `pack_mask` makes it; overwritten.
            compile: whether to run through `torch.compile`, for a pattern that can.

        Returns:
            The number of mask entries that changed, and whether a weight contains NaN.
        """
        from castlm.core.masks import pack_mask, replace_

        flips: Tensor | int = 0
        for weights, masks in zip(units, packed):
            for mask, new in zip(masks, self.unit_masks(weights)):
                flips = flips + replace_(mask, pack_mask(new))
        return flips, False

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises `InputError` if a weight of this shape cannot have the pattern."""
        reason = self.misfit(shape)
        if reason:
            raise InputError(
                f"a weight of shape {tuple(shape)} cannot be {self} sparse: {reason}; leave the layer dense or choose "
                "another pattern"
            )

    def check_mask(self, mask: Tensor, shape: Sequence[int], count: bool = True) -> None:
        """Raises `InputError` unless `mask` is a bool tensor of this shape that keeps no more than the pattern does.

        Args:
            count: whether to count what it keeps, which the mask of some rows alone does not say of every pattern.
        """
        import torch

        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
            raise InputError(
                f"a mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit a weight of shape {tuple(shape)}: "
                "pass a torch.bool mask of the weight's shape, True where a weight is kept"
            )
        violations = self.violations(mask) if count else 0
        if violations:
            raise InputError(
                f"a mask of shape {tuple(shape)} is not {self}: it keeps too many weights in {violations:,} places; "
                f"make it with Pattern.parse({str(self)!r}).mask"
            )

    def check_unit_masks(self, masks: Sequence[Tensor]) -> None:
        """Raises `InputError` if the masks of the weights of one unit keep more than the pattern does together."""
        violations = self.unit_violations(masks)
        if violations:
            shapes = ", ".join(str(tuple(mask.shape)) for mask in masks)
            raise InputError(
                f"the masks of shapes {shapes} are not {self} together: they keep too much in {violations:,} places; "
                f"make them with Pattern.parse({str(self)!r}).unit_masks"
            )
