"""Masks of units on weights whose rows are sharded: made of the gathered weights, and cut to the rows of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from castlm.core.masks import pack_mask, replace_
from castlm.core.pattern import Pattern
from castlm.core.shards import local, own_rows, whole


def gathers(pattern: Pattern, params: Sequence[Tensor]) -> bool:
    """Whether the masks of `params` are made of whole weights that no rank holds: all ranks make them together."""
    return not pattern.independent_rows and any(isinstance(param, DTensor) for param in params)


def own_unit_masks(pattern: Pattern, params: Sequence[Tensor]) -> list[Tensor]:
    """The masks of the weights of one unit group, of the rows that this rank holds.

    Where `gathers`, the weights are gathered, one group at a time, and all ranks call this. The masks are then those
    that a single process makes, bit for bit.
    """
    if not gathers(pattern, params):
        return pattern.unit_masks([local(param.detach()) for param in params])
    masks = pattern.unit_masks([whole(param.detach()) for param in params])
    return [mask[own_rows(param)] for mask, param in zip(masks, params)]


def refresh_gathered_(
    pattern: Pattern, units: Sequence[Sequence[Tensor]], packed: Sequence[Sequence[Tensor]]
) -> Tensor | int:
    """`Pattern.refresh_` where `gathers`: all ranks call this, with the packed masks of their own rows.

    Returns:
        The number of entries that changed on this rank.
    """
    flips: Tensor | int = 0
    for params, masks in zip(units, packed):
        for mask, new in zip(masks, own_unit_masks(pattern, params)):
            flips = flips + replace_(mask, pack_mask(new))
    return flips
