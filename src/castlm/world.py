"""The ranks of a run: process group, device and mesh. A single process is one rank and runs the same code.

The engine is torch's own: `torchrun`, DTensor and FSDP2, which shards rows and so keeps groups of m whole.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from castlm.core.errors import InputError, is_out_of_memory
from castlm.hardware import choose_device
from castlm.progress import note

T = TypeVar("T")
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
# Seconds to wait for ranks that may only be late, once a collective has failed.
DIAGNOSIS_S = 10


@dataclass(frozen=True)
class World:
    """This process among the ranks. `mesh` is None for a single process.

    `control` and `patient` are gloo groups besides the one for computation; they carry Python objects. Ranks wait in
    `control` at most `timeout_s`, in `patient` at most a day.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    timeout_s: float = 600

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold the same shard of every parameter."""
        return self.mesh.size(0) if self.mesh is not None and self.mesh.ndim == 2 else 1

    @property
    def shard_index(self) -> int:
        """Index of the shard of every parameter that this rank holds."""
        return self.rank % (self.size // self.num_replicas)  # 2 replicas of 4 shards: rank 6 holds shard 2

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values` over all ranks, and returns them on the device of this rank; in place if they are there."""
        if self.mesh is not None:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: T, *, patient: bool = False) -> list[T]:
        """The `value` of every rank, in order; any picklable object. With `patient`, ranks wait for it up to a day."""
        values: list[Any] = [value]
        if self.mesh is not None:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self.patient if patient else self.control)
        return values

    def on_main(self, action: Callable[[], T], *, patient: bool = False) -> T:
        """Runs `action` on the main rank and returns its result on every rank.

        Args:
            patient: for an action that may take longer than `timeout_s`: the other ranks wait for it up to a day, as
                long as the main rank lives.

        Raises:
            Exception: on the main rank, as `action`. The other ranks raise `SystemExit`, so that only one rank reports
                the error.
        """
        outcome: list[Any] = [None, False]  # result, whether it failed
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                failure, outcome[1] = error, True
        if self.mesh is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.patient if patient else self.control)
        if outcome[1]:
            raise SystemExit(2) if failure is None else failure
        result: T = outcome[0]
        return result

    @contextlib.contextmanager
    def context_on_main(self, context: contextlib.AbstractContextManager[T]) -> Iterator[T]:
        """Enters and leaves `context` on the main rank alone, and yields its value on every rank.

        The other ranks wait for both up to a day. After an error on the main rank, `context` receives it.
        """
        with contextlib.ExitStack() as stack:
            yield self.on_main(lambda: stack.enter_context(context), patient=True)
            self.on_main(stack.close, patient=True)

    def add_in_order_(self, total: Tensor, part: Tensor, num_ranks: int) -> None:
        """On the main rank, adds the `part` of ranks 0, 1, ... `num_ranks` - 1 to `total`, one after another.

        `part` is shaped like `total` on all ranks. The order of an `all_reduce` depends on the number of ranks.
        """
        if self.is_main:
            total += part
            # One buffer for all parts, so that the memory of rank 0 does not grow with the number of ranks.
            received = torch.empty(total.shape, dtype=total.dtype, device=total.device)
            for rank in range(1, num_ranks):
                dist.recv(received, rank, group=self._group_of(total))
                total += received
        elif self.rank < num_ranks:
            dist.send(part.contiguous(), 0, group=self._group_of(part))

    def share_(self, tensor: Tensor, owner: int) -> None:
        """Gives `tensor`, which is contiguous, the values that it has on rank `owner`."""
        if self.mesh is not None:
            dist.broadcast(tensor, owner, group=self._group_of(tensor))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """The group that carries a tensor: the patient one from host memory, else the one for computation."""
        return self.patient if tensor.device.type == "cpu" else None

    def check_all(self, failure: str | None, *, patient: bool = False) -> None:
        """Stops all ranks if one reports a failure: the main rank raises `InputError`, the others `SystemExit`.

        Args:
            patient: see `gather`.
        """
        failures = [text for text in self.gather(failure, patient=patient) if text is not None]
        if failures:
            raise InputError(failures[0]) if self.is_main else SystemExit(2)

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Stops all ranks if one of them has another value than the main rank; waits for nodes that still download.

        Args:
            values: by the name of a different value, such as "another training text".
        """
        found = self.gather(values, patient=True)
        odd = [(rank, what) for rank, other in enumerate(found) for what in values if other[what] != found[0][what]]
        failures = [f"rank {rank} has {what} than rank 0: give all of them the same files" for rank, what in odd]
        self.check_all(failures[0] if failures else None)

    def missing(self, timeout_s: float) -> str:
        """The ranks that do not arrive here within `timeout_s`; "" if all do.

        Rank 0 knows the missing ranks; the others only know that rank 0 does not answer.
        """
        if self.mesh is None:
            return ""
        try:
            timeout = datetime.timedelta(seconds=timeout_s)
            dist.monitored_barrier(self.control, timeout=timeout, wait_all_ranks=True)
        except RuntimeError as error:
            found = re.search(r"[Rr]anks? ([\d, ]+?) failed to pass", str(error))
            unnamed = "another rank" if self.is_main else "rank 0 (or one that it names)"  # the connection broke
            return f"rank {found[1]}" if found else unnamed
        return ""

    def meet(self, where: str) -> None:
        """Waits for all ranks; raises `InputError` with those that did not arrive within `timeout_s`."""
        missing = self.missing(self.timeout_s)
        if missing:
            raise InputError(f"{missing} did not reach {where} within {self.timeout_s:g} s: it hangs or has ended")


ALONE = World(0, 1, torch.device("cpu"), None)
"""A process that is the only rank."""


@contextlib.contextmanager
def reporting_once(world: World) -> Iterator[None]:
    """Turns an `InputError` of another rank than the main one into a line and `SystemExit`.

    For work in which ranks meet the same error together, so that the main rank's report stands alone as an error.
    """
    try:
        yield
    except InputError as error:
        if world.is_main:
            raise
        note(f"rank {world.rank}: {error}")
        raise SystemExit(2) from None


def is_main_rank() -> bool:
    """Whether this process is rank 0, or was not started by torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def init_world(device: str, sharding: str, timeout_s: float = 600) -> World:
    """Joins the process group that `torchrun` describes; without torchrun, the world is one process.

    Args:
        timeout_s: seconds that a rank waits for the others, in the loop and inside a collective.
    """
    kind = choose_device(device)
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # as torchrun sets them
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in names.items())
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here)
    if size == 1:
        return World(0, 1, here, None)
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    if sharding == "hybrid" and size % per_node:
        raise InputError(f"{size} ranks do not divide into nodes of {per_node}: start the same number on every node")
    timeout = datetime.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        # torchrun keeps one store over its restarts, and a rank that reads the address of an ended rank waits forever
        # (torch 2.13), so each start needs its own keys. Between nodes, the number of restarts can differ: there, set
        # `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, which makes torchrun create a new store instead.
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        if per_node == size and "LOCAL_WORLD_SIZE" in os.environ:
            store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo takes the address of the host's name, which can be 127.0.1.1 (Debian), where no other node reaches it.
        interface = interface_to(os.environ["MASTER_ADDR"]) if per_node != size else None
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    control = dist.new_group(backend="gloo", timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    if sharding == "full":
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        shards = per_node if sharding == "hybrid" else 1
        mesh = init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    return World(rank, size, here, mesh, control, patient, timeout_s)


_ELSEWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737), so packets to it take the default route


def interface_to(address: str) -> str | None:
    """The network interface by which other machines and `address` are reached; None if the system does not tell.

    An address that only this machine reaches, such as 127.0.1.1, gives the interface of the default route.
    """
    for target in (address, _ELSEWHERE):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((target, 9))  # sends nothing: it only chooses the route
            own = route.getsockname()[0]
            if not own.startswith("127."):
                return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)
    return None


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None if it has none, or not on Linux."""
    if sys.platform != "linux":
        return None
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)[20:24])
    return None


@contextlib.contextmanager
def closing(world: World) -> Iterator[World]:
    """Destroys the process group of `world` at the end of the context.

    After an exception on GPUs, the group stays until the process ends: destroying it waits for all ranks, and one of
    them may be waiting for this rank, so that the exception would not be reported.
    """
    try:
        yield world
    except BaseException:
        if world.device.type != "cuda":
            close_world(world)
        raise
    close_world(world)


def close_world(world: World) -> None:
    if world.mesh is not None and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def naming_missing_ranks(world: World) -> Iterator[None]:
    """If a collective fails, names the rank that hangs or has ended; torch names at most an address."""
    try:
        yield
    except RuntimeError as error:
        of_a_collective = isinstance(error, dist.DistError) or "gloo" in str(error).lower()  # gloo has no class for it
        if is_out_of_memory(error) or not of_a_collective:  # this rank's own error
            raise
        missing = world.missing(min(DIAGNOSIS_S, world.timeout_s))
        if not missing:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{missing} hangs or has ended; torchrun --max-restarts starts it again ({reason})") from error
