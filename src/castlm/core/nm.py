"""The n:m pattern: n of every m consecutive weights along the input axis are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from castlm.core.errors import InputError
from castlm.core.pattern_base import Pattern

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive weights along the input axis are kept, as in 2:4.

    Raises:
        InputError: `n` and `m` are not integers with 1 <= n < m.

    Examples:
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
