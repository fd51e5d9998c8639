"""The ranks of a run: process group, device, sharding. One process is one rank, through the same code.

The engine is torch's own: `torchrun`, DTensor and FSDP2, which shards rows and so keeps groups of m whole.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from castlm.core.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among the ranks. `mesh` is None for a single process."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def init_world(device: str, sharding: str, timeout_s: int = 600) -> World:
    """Joins the process group that `torchrun` describes, or stands alone.

    Raises:
        InputError: CUDA asked for and not there, or a hybrid mesh that the ranks do not fill.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees no GPU: install a CUDA build of torch, or use device cpu")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    if size == 1:
        return World(0, 1, here, None)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    if sharding == "full":
        return World(rank, size, here, init_device_mesh(kind, (size,), mesh_dim_names=("shard",)))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size))) if sharding == "hybrid" else 1
    if size % per_node:
        raise InputError(f"{size} ranks do not divide into nodes of {per_node}: start the same number on every node")
    mesh = init_device_mesh(kind, (size // per_node, per_node), mesh_dim_names=("replicate", "shard"))
    return World(rank, size, here, mesh)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a model: the members of each `nn.ModuleList` that is not inside another."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for name in outer for block in model.get_submodule(name)]


def shard_(module: nn.Module, world: World) -> None:
    """Shards every transformer block of `module`, then the rest, in place; nothing for a single process.

    Parametrizations have to be there already: the other order fails.
    """
    if world.mesh is None:
        return
    for block in transformer_blocks(module):
        fully_shard(block, mesh=world.mesh)
    fully_shard(module, mesh=world.mesh)
    assert isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def close_world(world: World) -> None:
    if world.mesh is not None and dist.is_initialized():
        dist.destroy_process_group()
