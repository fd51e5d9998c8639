"""The table of sparsity patterns, and shorthands for n:m.

To add a pattern, write one subclass of `Pattern` and list it in `PATTERNS`. Importing this module does not import
torch, so that commands which only parse a pattern start quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from castlm.core.combined import Combined
from castlm.core.nm import NM
from castlm.core.pattern_base import Pattern
from castlm.core.structured import Channels, Heads

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NM",
    "PATTERNS",
    "Channels",
    "Combined",
    "Heads",
    "Pattern",
    "as_pattern",
    "count_nm_violations",
    "is_nm_sparse",
    "nm_mask",
]

PATTERNS: tuple[type[Pattern], ...] = (NM, Channels, Heads, Combined)
"""The patterns that `Pattern.parse` tries, in this order."""
Pattern.table = PATTERNS


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

    Examples:
        >>> import torch
        >>> nm_mask(torch.tensor([1.0, -3.0, 2.0, 2.0]))
        tensor([False,  True,  True, False])
    """
    return NM(n, m).mask(weight)


def count_nm_violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """The number of groups of `weight` (..., width) that hold more than `n` non-zeros. NaN is a non-zero.

    Raises:
        InputError: a bad pattern, or a width that does not divide by `m`.

    Examples:
        >>> import torch
        >>> count_nm_violations(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0]]))
        1
    """
    return NM(n, m).violations(weight)


def is_nm_sparse(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether every group of `weight` (..., width) holds at most `n` non-zeros.

    Raises:
        InputError: as `count_nm_violations`.

    Examples:
        >>> import torch
        >>> is_nm_sparse(torch.tensor([0.0, 0.0, 1.0, 2.0]))
        True
    """
    return count_nm_violations(weight, n, m) == 0
