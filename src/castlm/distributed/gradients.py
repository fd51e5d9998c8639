"""Sums and norms of gradients whose bits do not depend on the number of ranks.

A step adds up the gradients of its micro-batches in the order of the text: micro-batch `a` of rank `r` of R is number
`a R + r`. One process adds one after another. Several ranks do the same here: the ranks exchange their gradients of a
rank's rows, and it adds them to the sum so far. NCCL and gloo would add them in an order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from castlm.core.shards import local
from castlm.core.sparsify import transformer_blocks
from castlm.distributed.sharding import is_sharded, may_skip_modules, sharded_blocks
from castlm.world import World

_BITS = 36
"""Bits of the largest square in an exact sum: it has room for 2^27 rows."""


class SumsInOrder:
    """Lets FSDP add up the gradients of micro-batches and ranks as one process does.

    It holds on CPUs, for a model that is sharded over all ranks and whose parameters have a gradient in each
    micro-batch: not with experts or images. Others keep FSDP's sums.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor], world: World) -> None:
        blocks = transformer_blocks(module)
        is_whole = len(sharded_blocks(module)) == len(blocks) and not any(map(may_skip_modules, blocks.values()))
        on_cpus = is_sharded(module) and world.device.type == "cpu" and world.num_replicas == 1
        self._parameters = list(parameters)
        self._sums: list[_InOrder] = []
        if on_cpus and is_whole:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    self._sums.append(_InOrder())
                    part.set_custom_reduce_scatter(self._sums[-1])

    def before(self, number: int) -> None:
        """Begins the pass of the 0-based micro-batch `number` of a step."""
        if self._sums and number:  # FSDP would add it to the sum, which its gradients already contain
            for parameter in self._parameters:
                parameter.grad = None

    def finish(self) -> None:
        """Ends the sums of a step; without it they would be kept until the next one."""
        for each in self._sums:
            each.so_far = None


class _InOrder(ReduceScatter):
    """Adds up the rows of this rank in the gradients of all ranks, and in those of the micro-batches before."""

    def __init__(self) -> None:
        self.so_far: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        # FSDP averages, and the loss is multiplied by the number of ranks: exact for a power of two
        assert op == dist.ReduceOp.AVG, f"FSDP asked for {op}"
        ranks = group.size()
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        first, *others = received.view(ranks, -1)
        if self.so_far is None:
            output_tensor.copy_(first)
        else:
            assert len(self.so_far) == len(output_tensor), "some parameter has a gradient in some micro-batches alone"
            torch.mul(self.so_far, ranks, out=output_tensor)
            output_tensor += first
        for part in others:
            output_tensor += part
        output_tensor /= ranks
        self.so_far = output_tensor


def squares_of(parameter: Tensor) -> Tensor:
    """The squared norms of the rows of a parameter's gradient that this rank holds, (rows,) float64; of a vector, the
    squares of its elements."""
    assert parameter.grad is not None
    mine = local(parameter.grad)
    rows = mine.flatten(0, -2) if mine.dim() > 1 else mine.view(-1, 1)  # (1536, 576), or (576, 1)
    squares: Tensor = torch.linalg.vector_norm(rows, dim=-1).double().square()
    return squares


def norm_of(squares: Iterable[Tensor], sharded_like: Tensor) -> Tensor:
    """The norm of all gradients, () float32, from their `squares_of`; inf where one is not finite.

    Squares are rounded to whole multiples of a fixed power of two, 2^-36 of the one above the largest square, and added
    as int64. Sums of whole numbers are exact, so neither the order nor the number of ranks changes a bit.

    Args:
        sharded_like: a parameter that is sharded as all are.
    """
    parts = list(squares)
    mine = torch.cat([*parts, parts[0].new_zeros(1)])  # a rank may hold no rows
    groups = []
    if isinstance(sharded_like, DTensor):
        mesh, placements = sharded_like.device_mesh, sharded_like.placements
        groups = [mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard()]
    largest = mine.max().nan_to_num(nan=math.inf, posinf=math.inf)
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    if not math.isfinite(largest):
        return largest.float()
    # 2^(e-1) <= largest < 2^e: each square times 2^(_BITS - e) is below 2^_BITS. Rounded to int64, their sum is exact,
    # and so the same in any order and on any number of ranks. A square loses half a unit at most, 2^-36 of the largest.
    shift = _BITS - math.frexp(float(largest))[1]
    total = (mine * 2.0**shift).round().long().sum()
    for group in groups:
        dist.all_reduce(total, group=group)
    return torch.tensor(math.sqrt(math.ldexp(int(total), -shift)), dtype=torch.float32, device=mine.device)


def gradient_norm(parameters: Collection[Tensor]) -> Tensor:
    """The norm of the gradients of `parameters`, () float32: on a CPU that of `norm_of`.

    On other devices gradients themselves depend on the number of ranks, so torch's norm does, with fewer kernels and no
    wait for the device.
    """
    first = next(iter(parameters))
    if first.device.type == "cpu":
        return norm_of((squares_of(p) for p in parameters if p.grad is not None), first)
    return torch_norm_of(parameters)


class NormInParts:
    """The `gradient_norm` of parameters whose gradients are not there at the same time, on one rank.

    Args:
        parameters: in the order in which `gradient_norm` would take them.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._is_exact = self._parameters[0].device.type == "cpu"
        self._measures: dict[Tensor, Tensor] = {}

    def clear(self) -> None:
        self._measures.clear()

    def add(self, parameter: Tensor) -> None:
        """Measures the gradient of a parameter."""
        assert parameter.grad is not None
        # torch's own kernel of `torch_norm_of`, whose result for one tensor does not depend on the others
        exact = self._is_exact
        self._measures[parameter] = squares_of(parameter) if exact else torch._foreach_norm([parameter.grad])[0]

    def norm(self) -> Tensor:
        """The norm of the gradients that were measured since `clear`, () float32."""
        found = [self._measures[parameter] for parameter in self._parameters if parameter in self._measures]
        if self._is_exact:
            return norm_of(found, self._parameters[0])
        norm: Tensor = torch.linalg.vector_norm(torch.stack(found))
        return norm


def torch_norm_of(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of the gradients of `parameters`, () float32, in torch's order of sums."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales the gradients of `parameters` so that a `norm` of all gradients above `max_norm` becomes that."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
