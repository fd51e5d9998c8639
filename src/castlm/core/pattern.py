"""The interface of a pattern. `NM` in `castlm.core.nm` is castlm's own; a program may add one beside it.

Importing this module does not import torch, so that `castlm verify` starts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from castlm.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(ABC):
    """A rule that says which weights of a matrix (out, in) are kept.

    Subclasses are frozen dataclasses, and `str(pattern)` parses back. The mask of a row depends on that row alone,
    because the ranks of a run share the rows of a weight.
    """

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

    def at(self, name: str) -> Pattern:
        """The pattern of one layer, by its name; the pattern itself unless it differs from layer to layer."""
        return self

    def check_placement(self, param: Tensor) -> None:
        """Raises `InputError` if a DTensor is sharded in another way than by rows."""
        from torch.distributed.tensor import DTensor, Shard

        placements = param.placements if isinstance(param, DTensor) else ()
        if not all(placement.is_replicate() or placement == Shard(0) for placement in placements):
            raise InputError(
                f"a sparse parameter of shape {tuple(param.shape)} is placed as {placements}, which splits groups of "
                f"{self}: shard sparse weights by rows, Shard(0)"
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises `InputError` if a weight of this shape cannot have the pattern."""
        reason = self.misfit(shape)
        if reason:
            raise InputError(
                f"a weight of shape {tuple(shape)} cannot be {self} sparse: {reason}; leave the layer dense or choose "
                "another pattern"
            )

    def check_mask(self, mask: Tensor, param: Tensor) -> None:
        """Raises `InputError` unless a mask is bool, of this rank's rows of `param`, and keeps no more than the pattern
        does."""
        import torch

        from castlm.core.shards import local

        shape = tuple(local(param).shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise InputError(
                f"a mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit a weight of shape {shape}: pass a "
                "torch.bool mask of that shape, True where a weight is kept"
            )
        if num_violations := self.violations(mask):
            raise InputError(f"a mask of {shape} is not {self}: it keeps too much in {num_violations:,} places")
