"""The device at hand: which record it has, and what its layers take, measured."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.masks import pack_mask
from castlm.core.pattern import nm_mask
from castlm.inference import native
from castlm.inference.cuda_backends import backend_for
from castlm.inference.devices import DEVICES, Device, device_of
from castlm.inference.format import INT4_GROUP
from castlm.inference.op import packed_linear
from castlm.inference.roofline import Format, torch_product
from castlm.inference.semi_structured import race_variants

_COLD_BYTES = 48 << 20  # more than most last caches: each call finds its weight in memory, as in a model
_ROUNDS = 11


def this_gpu() -> Device | None:
    """The record of the CUDA device at hand; None where there is none.

    Raises:
        InputError: a device without a record.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    record = device_of(name)
    if record is None:
        raise InputError(f"there is no record of {name}: pass --device with the nearest of {', '.join(DEVICES)}")
    return record


class GpuTimer:
    """Times layers on the CUDA device at hand, each shape once, dense against every sparse variant.

    Layers are in the dtype asked for, and in bf16 for fp8, which takes no other.
    """

    def __init__(self, dtype: str) -> None:
        """`formats`: dense and 2:4 in `dtype`, 2:4 int8, and 2:4 fp8 where torchao and the device have it.

        Raises:
            InputError: another dtype than bf16 and fp16.
        """
        if dtype not in ("bf16", "fp16"):
            raise InputError(f"--measure times bf16 and fp16 on a GPU, not {dtype}: leave it out for a roofline")
        self._device, self._dtype = torch.device("cuda"), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self._found: dict[tuple[tuple[int, int], int, str], dict[str, float]] = {}
        self.formats = [Format(dtype, 16, dtype), Format(f"2:4 {dtype}", 9, dtype, sparse=True)]
        self.formats.append(Format("2:4 int8", 5, "int8", sparse=True, changes_weights=True))
        with contextlib.suppress(InputError):
            backend_for("fp8", self._device)
            self.formats.append(Format("2:4 fp8", 5, "fp8", sparse=True, changes_weights=True))

    @torch.no_grad()
    def seconds(self, form: Format, shape: tuple[int, int], tokens: int) -> float:
        """The fastest variant of `form`, or the dense layer; a layer that cannot be converted counts as dense."""
        kind = form.compute if form.changes_weights else "same"
        key = (shape, tokens, kind)
        if key not in self._found:
            dtype = torch.bfloat16 if kind == "fp8" else self._dtype
            layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=self._device, dtype=dtype)
            if shape[1] % 4 == 0:
                layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
            x = torch.randn(tokens, shape[1], device=self._device, dtype=dtype)
            backend = backend_for(kind, self._device)
            can = shape[1] % 4 == 0 and backend.why_not(layer) is None
            self._found[key] = race_variants(layer, x, backend).seconds if can else backend.race({"dense": layer}, x)
        found = self._found[key]
        sparse_only = [value for name, value in found.items() if name != "dense"]
        return min(sparse_only, default=found["dense"]) if form.sparse else found["dense"]


def this_cpu(tokens: int = 1) -> Device:
    """A record of the CPU at hand, with the threads that torch uses: bytes and operations per second, measured.

    Args:
        tokens: rows of the layers' inputs; torch's 16-bit products are measured with 256 rows where there are more
            than 16, else with 16.
    """
    buffer = native.allocate(_COLD_BYTES * 4).view(torch.float32).fill_(1)
    square = torch.ones(1024, 1024)
    read, multiplied = _best(lambda: buffer.sum()), _best(lambda: square @ square)
    peak = dict.fromkeys(("fp32", "bf16", "fp16", "int8", "int4"), 2 * 1024**3 / multiplied)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):  # by units for them, or without
        x, weight = torch.ones(16 if tokens <= 16 else 256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        linear = _best(lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
        peak[torch_product(name)] = 2 * len(x) * 1024**2 / linear
    name = next((line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")), "this CPU")
    source = f"{name}, {torch.get_num_threads()} threads, measured"
    return Device(name, "cpu", buffer.nbytes / read, peak, peak, source, level=_level())


def _level() -> str:
    """As `Device.level` has it."""
    return "avx512 intel" if native.level() == "avx512" and native.is_intel() else native.level()


def _cpu_info() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else [f"model name: {platform.machine()}"]


def _best(work: Callable[[], object]) -> float:
    """The least seconds of some calls, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


class CpuTimer:
    """Times layers on this CPU: the kernels of castlm and torch's, all formats of a shape in turns, weights cold."""

    def __init__(self, formats: list[Format]) -> None:
        self.formats = formats
        self._found: dict[tuple[tuple[int, int], int], dict[str, float]] = {}
        self._weights: tuple[tuple[int, int], dict[str, list[Callable[[Tensor], Tensor]]]] | None = None

    @torch.no_grad()
    def seconds(self, form: Format, shape: tuple[int, int], tokens: int) -> float:
        """The least seconds of one call of `form` among some rounds."""
        key = (shape, tokens)
        if key not in self._found:
            if self._weights is None or self._weights[0] != shape:
                fits = [f for f in self.formats if not f.sparse or shape[1] % 4 == 0]
                self._weights = shape, {f.name: _cold_weights(f, shape) for f in fits}
            self._found[key] = _race(self._weights[1], torch.randn(tokens, shape[1]))
        return self._found[key][form.name]


def _race(weights: dict[str, list[Callable[[Tensor], Tensor]]], x: Tensor) -> dict[str, float]:
    """The least seconds of one multiplication by each, A B A B; every call by another copy of the weight."""
    times: dict[str, list[float]] = {name: [] for name in weights}
    for number in range(_ROUNDS):
        for name, copies in weights.items():
            count = max(2, math.ceil(len(copies) / len(x) / 2))  # fewer where the multiplications take longer
            chosen = [copies[(number * count + i) % len(copies)] for i in range(count)]
            started = time.perf_counter()
            for multiply in chosen:
                multiply(x)
            times[name].append((time.perf_counter() - started) / count)
    return {name: min(found) for name, found in times.items()}


def _cold_weights(form: Format, shape: tuple[int, int]) -> list[Callable[[Tensor], Tensor]]:
    """Functions of x (tokens, in) that multiply it by a random weight of one format: as many copies as fill caches."""
    rows, columns = shape
    copies = max(2, math.ceil(_COLD_BYTES / (rows * columns * form.bits / 8)))
    weight = torch.randn(rows, columns)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(form.compute)
    if form.kernel == "torch":
        stored = [weight.to(dtype, copy=True) for _ in range(copies)]
        return [lambda x, weight=one: F.linear(x.to(dtype), weight) for one in stored]  # type: ignore[misc]
    n, m = (2, 4) if form.sparse else (0, 0)
    mask = nm_mask(weight) if form.sparse else None
    kept = weight if mask is None else weight[mask].view(rows, -1)
    scales = None
    if form.compute == "int8":
        kept, scales = kept.clamp(-1, 1).mul(127).round().to(torch.int8), torch.ones(rows, 1)
    elif form.compute == "int4":
        kept = torch.zeros(rows, math.ceil(kept.shape[1] / 2), dtype=torch.uint8)
        scales = torch.ones(rows, math.ceil(columns / INT4_GROUP))
    size = native.packed_bytes(form.compute, n, m, rows, columns)
    size += -size % 64
    buffers = native.allocate(size * copies).view(copies, size)
    stored_mask = None if mask is None else pack_mask(mask)
    native.repack_(
        buffers[0], kept if dtype is None else kept.to(dtype), stored_mask, scales, form.compute, n, m, columns
    )
    buffers[1:] = buffers[0]
    return [lambda x, buffer=one: packed_linear(x, buffer, rows) for one in buffers]  # type: ignore[misc]
