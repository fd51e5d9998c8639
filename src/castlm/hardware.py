"""Chooses device, compute type and optimizer for this machine, and describes them, its memory and its versions."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import multiprocessing
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from castlm import __version__
from castlm.core.errors import InputError
from castlm.core.native import NOT_BUILT, kernels

T = TypeVar("T")

# Below this width the casts of bf16 autocast cost more than its matmuls save on a CPU.
SMALLEST_BF16_WIDTH = 256
# Below this number of parameters, torch.compile takes longer than it saves in a usual run.
SMALLEST_COMPILED = 10_000_000
_CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def choose_device(wanted: str) -> str:
    """Resolves the option `device` to "cpu" or "cuda"; "auto" is CUDA if there is a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees no GPU: install a CUDA build of torch, or use device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def choose_precision(wanted: str, device: torch.device, model_config: Any) -> str:
    """Resolves `precision` to "fp32" or "bf16"; "auto" is bf16 if the hardware multiplies it faster and the model is
    not tiny.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not has_bf16:
            raise InputError(f"{torch.cuda.get_device_name(device)} has no bf16: use precision fp32")
    else:
        wide = getattr(model_config.get_text_config(), "hidden_size", 0) >= SMALLEST_BF16_WIDTH
        has_bf16 = wide and has_fast_bf16()
    return ("bf16" if has_bf16 else "fp32") if wanted == "auto" else wanted


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def why_slow(precision: str, device: torch.device) -> str:
    """A warning if `precision` is slow on `device`; otherwise empty."""
    if precision == "bf16" and device.type == "cpu" and not has_fast_bf16():
        return "slow: this CPU has no bf16 units, and may multiply bf16 many times slower than fp32: use precision fp32"
    return ""


def check_compile(wanted: bool, device: torch.device) -> None:
    """Raises `InputError` if `torch_compile` is requested and not available on `device`."""
    if not wanted:
        return
    if device.type != "cuda":
        raise InputError("torch_compile is on, but this run is on a CPU, and it is for a GPU: leave it out")
    if reason := _why_not_compile(device):
        raise InputError(f"torch_compile is on, but {reason}")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of forward passes in `precision`, which keeps no copy of a weight after its layer.

    torch would keep copies of all weights in bf16 to the end of the pass, for layers that share one.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`step` on a GPU as a CUDA graph: a call launches all of its kernels at once; on other devices `step` itself.

    Args:
        step: works in place on tensors that stay where they are, and does not wait for the GPU. It is called once more,
            before it is recorded.
    """
    if device.type != "cuda":
        return step
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):  # libraries allocate their workspace in a first call
        step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's, may talk to the GPU meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def choose_fused(device: torch.device, num_params: int) -> tuple[bool, str]:
    """Whether AdamS runs fused, by C++ kernels on a CPU and torch.compile on a GPU, and a description of the choice."""
    if device.type != "cuda":
        return (True, "fused in C++") if kernels() else (False, f"not fused ({NOT_BUILT})")
    if num_params < SMALLEST_COMPILED:
        return False, "not fused (the model is small)"
    if reason := _why_not_compile(device):
        return False, f"not fused ({reason})"
    return True, "fused by torch.compile"


@functools.cache
def _why_not_compile(device: torch.device) -> str:
    """Compiles one addition to test torch.compile; returns the error, or nothing if it works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, Triton or Python header each raises another type
        reason = str(error).strip() or type(error).__name__
        return f"torch.compile does not work here: {reason.splitlines()[0]}"
    return ""


@functools.cache
def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for the rest of this process; returns whether it could (glibc).

    By default malloc returns large buffers, such as a weight's gradient, to the system, so every step maps and zeroes
    their pages again.
    """
    return _set_malloc(mmap_threshold=2**30, trim_threshold=-1)  # -1: never


@functools.cache
def return_freed_memory() -> bool:
    """Makes malloc return freed memory to the system at once, for the rest of this process; returns whether it could
    (glibc).

    By default it keeps smaller buffers, below a threshold that rises with every freed one, up to 32 MiB.
    """
    return _set_malloc(mmap_threshold=2**20, trim_threshold=2**20)


def _set_malloc(mmap_threshold: int, trim_threshold: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(m_mmap_threshold, mmap_threshold) and mallopt(m_trim_threshold, trim_threshold))


def describe(device: torch.device, num_ranks: int, precision: str, optimizer: str) -> str:
    """Describes device, precision and optimizer of a run in one line."""
    if device.type == "cuda":
        where = f"{num_ranks} x {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        where = f"{num_ranks} x {platform.machine()} CPU, {threads} thread{'' if threads == 1 else 's'}"
    return f"{where}, {precision} compute on fp32 weights, optimizer {optimizer}"


def arithmetic(device: torch.device) -> dict[str, str | int]:
    """The properties of torch and the machine that determine the order of sums, and so the last bits of a result."""
    found: dict[str, str | int] = {"torch": torch.__version__}
    if device.type == "cuda":
        return found | {"GPU": torch.cuda.get_device_name(device)}
    return found | {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """Runs `function(*args)` in a new process, with its own peak of memory and nothing of earlier work in it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def available_memory(device: str = "cpu") -> float:
    """Bytes that this process can still allocate without swapping: the least of the machine, its control group and, for
    "cuda", the GPU.

    Infinity if the system does not tell.
    """
    free = [torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit, usage in _CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # no such version of control groups, or no limit ("max")
            free.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return min(free)


def resident_memory() -> int:
    """Bytes of this process in memory now; 0 if the system does not tell."""
    return _own_memory("VmRSS")


def _own_memory(entry: str) -> int:
    """The bytes of an entry in Linux's account of this process; 0 on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), 0)


def collect_garbage(device: str) -> None:
    """Frees objects in reference cycles, such as an optimizer or a whole run, and returns their memory."""
    gc.collect()
    trim_memory()
    if device == "cuda":
        torch.cuda.empty_cache()


def trim_memory() -> None:
    """Returns the freed memory that malloc has kept so far to the system (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: str) -> int:
    """Peak bytes of this process: allocated by torch on a GPU, resident otherwise."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if peak := _own_memory("VmHWM"):  # not ru_maxrss first: on Linux a new process starts from its parent's peak
        return peak
    import resource  # missing on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The model name of this processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def library_versions(*packages: str) -> dict[str, str]:
    """Versions of castlm, Python and the installed `packages`, by name, as every record holds them."""
    installed = {package: version(package) for package in packages}
    return {"castlm": __version__, "python": platform.python_version(), **installed}


def model_versions() -> dict[str, str]:
    """Versions of the libraries that write a model, for its castlm.json."""
    return library_versions("torch", "transformers", "safetensors")
