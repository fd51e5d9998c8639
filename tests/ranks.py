"""Runs a function on N gloo ranks, or a command. Each process is forked from one server that has imported everything
already: torch and transformers take longer to import than a tiny model to train.
"""

import logging
import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
import traceback
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from tqdm import tqdm

from castlm.core.adams import AdamS
from castlm.core.shards import whole
from castlm.core.sparsify import prune_
from castlm.oneshot.options import EFFORTS, Effort
from castlm.patterns import parse_pattern
from castlm.training.config import TrainConfig
from tests import efforts, runs

PATIENCE_S = 240  # on a machine that does other things too
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preload"])


def start_server() -> None:
    """Makes a fork of this process the server, so that nothing is imported twice.

    No test may have run yet: threads that a test starts, such as those of autograd, do not exist in a fork.
    """
    import_module("tests.preload")
    sys.stdout.flush()
    resource_tracker.ensure_running()  # a new process, as otherwise the server would be
    with unittest.mock.patch("multiprocessing.util.spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(executable: str, arguments: list[str], descriptors: list[int]) -> int:
    """Forks a process that does what `python -c` would; the last of `arguments` is its code."""
    if process := os.fork():
        return process
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in {*map(int, os.listdir("/dev/fd"))} - {0, 1, 2, nowhere, *descriptors}:
            os.dup2(nowhere, descriptor)  # not closed: an object of pytest may still write to that number
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                if type(handler) is logging.StreamHandler:  # made while pytest captured the output
                    handler.setStream(sys.stderr)
        exec(arguments[-1])
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Starts `function(*args)` on `size` ranks, as `torchrun` would; each writes what it says to `log`.<rank>."""
    port = free_port()
    ranks = []
    for rank in range(size):
        variables = {
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})},
        }
        here = {name: str(value) for name, value in variables.items()}
        target = (function, args, here, None if log is None else f"{log}.{rank}", EFFORTS["best"])
        ranks.append(_FORKS.Process(target=_rank, args=target, daemon=True))
        ranks[-1].start()
    return ranks


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, folder: Path, timeout: float = PATIENCE_S, **over: Any
) -> None:
    """Runs `function(*args)` on `size` ranks to its end. Raises AssertionError with what a failed rank said."""
    log = folder / f"log-{time.monotonic_ns()}"
    ranks = start_ranks(function, size, *args, log=log, **over)
    codes = wait_ranks(ranks, timeout)
    assert codes == [0] * size, f"exit codes {codes}, None after {timeout:.0f} s: {said(log, size)}"


def start_process(function: Callable[..., Any], *args: Any, log: Path) -> BaseProcess:
    """Starts `function(*args)` in a process that is no rank; what it says goes to `log`."""
    process = _FORKS.Process(target=_rank, args=(function, args, {}, str(log), EFFORTS["best"]), daemon=True)
    process.start()
    return process


def start_command(module: str, *arguments: str, log: Path) -> BaseProcess:
    """Starts `python -m module arguments`; what it says goes to `log`."""
    return start_process(_run_module, module, *arguments, log=log)


def _run_module(module: str, *arguments: str) -> None:
    sys.argv = [module, *arguments]
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # that of a test which imports it
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait_for(condition: Callable[[], bool], ranks: list[BaseProcess]) -> bool:
    """False when the ranks have ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the moment did not come"
        if not any(rank.is_alive() for rank in ranks):
            return False
        time.sleep(0.002)
    return True


def wait_ranks(ranks: list[BaseProcess], timeout: float = PATIENCE_S) -> list[int | None]:
    """The exit codes, None for a rank that had to be killed after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
    return codes


def said(log: Path, size: int) -> str:
    """The output of the ranks."""
    return "\n".join(Path(f"{log}.{rank}").read_text() for rank in range(size) if Path(f"{log}.{rank}").is_file())


def small(model: str, dataset: str, output_dir: Path, ranks: int, **over: Any) -> TrainConfig:
    """A small run of 12 sequences a step, whatever the number of ranks; of 3 a pass, but on 3 ranks."""
    rows, micro_batches = {1: (3, 4), 2: (3, 2), 3: (2, 2), 4: (3, 1)}[ranks]
    fields = {
        "max_steps": 6,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": micro_batches,
        "eval_tokens": 500,
        "eval_steps": 3,
        "mask_interval": 2,
        "decay_end": 0.5,
        "device": "cpu",
    }
    return runs.small(model, dataset, output_dir, **{**fields, **over})


def masks_after_steps(
    plain: nn.Module, sharded: nn.Module, optimizers: Sequence[AdamS], mesh: DeviceMesh, num_steps: int
) -> list[dict[Tensor, Tensor]]:
    """Steps a model and its row shards with the same gradients.

    Returns:
        The masks of both, which are the same.
    """
    for step in range(num_steps):
        torch.manual_seed(step)
        for p, q in zip(plain.parameters(), sharded.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    one, other = (optimizer.masks() for optimizer in optimizers)
    assert len(one) == len(other)
    for mask, shard in zip(one.values(), other.values()):
        assert torch.equal(whole(shard), mask)
    return [one, other]


def assert_pruned_alike(
    plain: nn.Module, sharded: nn.Module, masks: Sequence[dict[Tensor, Tensor]], pattern: str = "2:4"
) -> None:
    for model, of_model in zip((plain, sharded), masks):
        prune_(model, parse_pattern(pattern), masks=of_model)
    for p, q in zip(plain.parameters(), sharded.parameters()):
        assert torch.equal(whole(q), p)


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], log: str | None, effort: Effort
) -> None:
    os.environ.update(environment)
    efforts.use(effort)
    descriptor = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which `os._exit` leaves behind
    torch.set_num_threads(1)  # makes torch's pool again after the fork, before threads of the loader would race for it
    try:
        code = function(*args)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code if isinstance(code, int) else 0)  # no atexit: a forked rank has its parent's handlers
