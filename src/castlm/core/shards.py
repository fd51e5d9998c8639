"""DTensors whose rows are sharded, as FSDP2 makes them: the part of this rank, and new ones placed alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from castlm.core.errors import InputError


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself, as (numel,), sharing memory.

    The result is detached, and so not a view for autograd: `torch.compile` guards the shape of a view's base and would
    recompile for each new shape.
    """
    return local(tensor).view(-1).detach()


def like_rows(local: Tensor, param: Tensor) -> Tensor:
    """`local` (rows on this rank, ..., width) as a DTensor with the rows and the placement of `param`, if that is one.

    The rows of the 3-D weight of experts are the experts.
    """
    if not isinstance(param, DTensor):
        return local
    # Rows of the whole parameter, width of the part: bits of a mask, (768, 72) on each of 2 ranks -> (1536, 72).
    shape = torch.Size((param.shape[0], *local.shape[1:]))
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    mesh, placements = param.device_mesh, param.placements
    # The shape is passed because a rank cannot know it from its own rows where they do not divide evenly: 193 rows on 2
    # ranks are 97 and 96. run_check would broadcast.
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice:
    """The rows of the full tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    first, num_rows = 0, len(tensor)
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            mesh = tensor.device_mesh
            num_rows, offset = Shard.local_shard_size_and_offset(num_rows, mesh.size(dim), mesh.get_local_rank(dim))
            first += offset
    return slice(first, first + num_rows)  # rank 1 of 2, (1536, 576): slice(768, 1536)


def check_matrix(what: str, weight: Tensor) -> None:
    """Raises `InputError`, which begins with `what`, unless a weight is a matrix or a stack of experts' matrices."""
    if weight.dim() not in (2, 3):
        raise InputError(
            f"{what} has shape {tuple(weight.shape)}, not (out, in) or (experts, out, in): sharding that flattens "
            "weights (FSDP1, DeepSpeed ZeRO) cuts groups apart; use FSDP2 fully_shard or DDP"
        )


def sum_over_shards(parameters: Iterable[Tensor], counts: Iterable[Tensor]) -> list[int]:
    """`counts`, one 0-dimensional tensor of this rank for each parameter, summed over the ranks that shard it."""
    alike: dict[Any, list[tuple[int, Tensor]]] = {}  # positions and counts of the parameters that are placed alike
    for position, (parameter, count) in enumerate(zip(parameters, counts)):
        place = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        alike.setdefault(place, []).append((position, count))
    total: dict[int, int] = {}
    for place, members in alike.items():
        # One all-reduce for all parameters that are placed alike, not one for each.
        stacked = torch.stack([count.to(members[0][1].device) for _, count in members])
        if place is not None:
            mesh, placements = place
            for dim, placement in enumerate(placements):
                op = dist.ReduceOp.SUM if placement.is_shard() else dist.ReduceOp.MAX  # replicas hold the same count
                dist.all_reduce(stacked, op, group=mesh.get_group(dim))
        total |= {position: int(count) for (position, _), count in zip(members, stacked.tolist())}
    return [total[position] for position in sorted(total)]
