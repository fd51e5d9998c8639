"""Sparsity patterns: which weights a layer keeps, how a mask is made, and how violations are counted.

To add a pattern, write one subclass of `Pattern` here and list it in `PATTERNS`. Importing this module does not import
torch, so that commands which only parse a pattern start quickly; the methods that take tensors import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, TypeVar

from castlm.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound="Pattern")


class Pattern(ABC):
    """A rule that says which weights are kept. Subclasses are frozen dataclasses, and `str(pattern)` parses back.

    A mask is made for one *unit* at a time. By default each weight is a unit of its own, and a subclass only defines
    `parse_form`, `misfit`, `mask` and `violations`. A pattern that prunes several weights together (a channel of an MLP
    is a row of two weights and a column of a third) also overrides `units`, `unit_masks` and `unit_violations`.
    """

    form: ClassVar[str]
    """What the text of the pattern looks like, for error messages."""
    independent_rows: ClassVar[bool] = False
    """Whether the mask of a row depends on that row alone, so that a weight may be sharded by rows."""

    @classmethod
    def parse(cls: type[P], text: str) -> P:
        """The pattern that a text describes.

        Raises:
            InputError: no pattern has this form, a number is out of range, or the pattern is not a `cls`.

        Example:
            >>> Pattern.parse("2:4")
            NM(n=2, m=4)
        """
        candidates = (kind.parse_form(text) for kind in PATTERNS) if isinstance(text, str) else ()
        pattern = next((candidate for candidate in candidates if candidate is not None), None)
        if not isinstance(pattern, cls):
            forms = ", ".join(kind.form for kind in PATTERNS if issubclass(kind, cls))
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

    def check_mask(self, mask: Tensor, shape: Sequence[int]) -> None:
        """Raises `InputError` unless `mask` is a bool tensor of this shape that keeps no more than the pattern does."""
        import torch

        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
            raise InputError(
                f"a mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit a weight of shape {tuple(shape)}: "
                "pass a torch.bool mask of the weight's shape, True where a weight is kept"
            )
        violations = self.violations(mask)
        if violations:
            raise InputError(
                f"a mask of shape {tuple(shape)} is not {self}: it keeps too many weights in {violations:,} places; "
                f"make it with Pattern.parse({str(self)!r}).mask"
            )


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive weights along the input axis are kept, as in 2:4.

    Raises:
        InputError: `n` and `m` are not integers with 1 <= n < m.

    Example:
        >>> import torch
        >>> pattern = NM(2, 4)
        >>> str(pattern)
        '2:4'
        >>> pattern.mask(torch.tensor([[1.0, -3.0, 2.0, 2.0]]))
        tensor([[False,  True,  True, False]])
        >>> pattern.violations(torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 0.0, 0.0, 0.0]]))
        1
    """

    n: int
    m: int

    form: ClassVar[str] = "n:m (n weights kept of every m)"
    independent_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n < self.m):
            raise InputError(
                f"pattern {self.n}:{self.m} is not n:m with 1 <= n < m (n weights kept of every m): try 2:4"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse_form(cls, text: str) -> NM | None:
        n, colon, m = text.partition(":")
        if not colon or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in (n, m)):
            return None
        return cls(int(n), int(m))

    def misfit(self, shape: Sequence[int]) -> str | None:
        if not shape:
            return "it has no axis to form groups along"
        return f"its width {shape[-1]} does not divide by m = {self.m}" if shape[-1] % self.m else None

    def check_width(self, width: int) -> None:
        """Raises `InputError` unless `width`, the length of the input axis, divides by `m`."""
        self.check_shape((width,))

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the `n` largest `|weight|` of every `m` consecutive weights (CAST, arXiv 2509.25996, Eq. 6).

        Args:
            weight: (..., width), any real dtype. fp32 tensors on a CPU take the C++ kernel where it is built, with the
                same result.

        Returns:
            bool, the shape of `weight`, True where a weight is kept: exactly `n` in every group. Of equal magnitudes
            the earlier ones are kept.
        """
        from castlm.core.masks import largest_mask

        self.check_shape(weight.shape)
        return largest_mask(weight.detach(), self.n, self.m)

    def violations(self, weight: Tensor) -> int:
        """The number of groups of `weight` (..., width) that hold more than `n` non-zeros. NaN is a non-zero."""
        self.check_shape(weight.shape)
        groups = weight.reshape(*weight.shape[:-1], weight.shape[-1] // self.m, self.m)
        return int((groups.count_nonzero(dim=-1) > self.n).sum())

    def refresh_(
        self, units: Sequence[Sequence[Tensor]], packed: Sequence[Sequence[Tensor]], compile: bool = False
    ) -> tuple[Tensor | int, bool]:
        from castlm.core.masks import refresh_masks_

        return refresh_masks_([*chain(*units)], [*chain(*packed)], self.n, self.m, compile)


PATTERNS: tuple[type[Pattern], ...] = (NM,)
"""The patterns that `Pattern.parse` tries, in this order."""


def as_pattern(pattern: Pattern | str) -> Pattern:
    """`pattern` itself, or the pattern that a text such as "2:4" describes."""
    return pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)


def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask that keeps the `n` largest `|weight|` of every `m` consecutive weights.

    Args:
        weight: (..., width); `width` divides by `m`.

    Returns:
        bool, the shape of `weight`, True where a weight is kept.

    Raises:
        InputError: a pattern that is not 1 <= n < m, a width that does not divide by `m`, or NaN in `weight`.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([1.0, -3.0, 2.0, 2.0]))
        tensor([False,  True,  True, False])
    """
    return NM(n, m).mask(weight)


def count_nm_violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """The number of groups of `weight` (..., width) that hold more than `n` non-zeros. NaN is a non-zero.

    Raises:
        InputError: a bad pattern, or a width that does not divide by `m`.

    Example:
        >>> import torch
        >>> count_nm_violations(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0]]))
        1
    """
    return NM(n, m).violations(weight)


def is_nm_sparse(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether every group of `weight` (..., width) holds at most `n` non-zeros.

    Example:
        >>> import torch
        >>> is_nm_sparse(torch.tensor([0.0, 0.0, 1.0, 2.0]))
        True
    """
    return count_nm_violations(weight, n, m) == 0
