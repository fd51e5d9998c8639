"""DTensors whose rows are sharded, as FSDP2 makes them: what n:m groups survive, and what cuts them apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from castlm.core.errors import InputError
from castlm.core.pattern import check_pattern, check_width


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself, as (numel,). It shares memory, but is no view to autograd:
    `torch.compile` guards the shape that a view was taken of, and would compile anew for each."""
    return local(tensor).view(-1).detach()


def like_rows(local: Tensor, param: Tensor) -> Tensor:
    """`local` (rows, width) as the shard of a DTensor of as many rows as `param` and placed alike, or as it is."""
    if not isinstance(param, DTensor):
        return local
    width = local.shape[1]
    shape = torch.Size((param.shape[0], width))
    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=(width, 1))


def check_sparse_parameter(param: Tensor, n: int, m: int) -> None:
    """Whether AdamS can keep n:m masks on `param`. Raises `InputError` when it is not 2-D (FSDP1 and ZeRO flatten), is
    half precision (bf16 swallows `lam`), has a width that does not divide by `m`, or is sharded along its groups."""
    check_pattern(n, m)
    shape = tuple(param.shape)
    if param.dim() != 2:
        raise InputError(
            f"a sparse parameter has shape {shape}, not (out, in): sharding that flattens parameters (FSDP1, DeepSpeed "
            "ZeRO) cuts groups apart; use FSDP2 fully_shard"
        )
    if param.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"a sparse parameter of shape {shape} is {param.dtype}, which swallows the decay: keep fp32 master weights "
            "and use autocast or FSDP mixed precision"
        )
    check_width(param.shape[1], m)
    if isinstance(param, DTensor):
        for placement in param.placements:
            if not (placement.is_replicate() or placement == Shard(0)):
                raise InputError(
                    f"a sparse parameter of shape {shape} is placed as {placement}, which splits groups of {m}: shard "
                    "its rows, Shard(0)"
                )
