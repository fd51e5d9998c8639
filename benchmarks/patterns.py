"""The CPU kernels of every pattern against dense ones, castlm's and torch's, for one row of x and for many.

    python -m benchmarks.patterns [--quick] [--shape OUT IN] [--rows 1 8 16 64 512] [--clock wall|cpu] [--json OUT]

One thread, one process, contestants in turns, medians of rounds; the figures are speeds in units of torch's fp32 GEMM.
With up to 16 rows, weights are read from many copies in turn, together larger than the last-level cache, as those of a
model are.

Peers: `torch._int_mm` multiplies int8 by int8 and applies no scale; dynamic int8 is torch's quantized linear layer,
which has one scale for the activations of a call.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.levels import random_buffer
from benchmarks.machine import machine, write_json
from benchmarks.rows import CLOCKS, interleaved
from castlm.hardware import keep_freed_memory
from castlm.packed import native

COPIES_BYTES = 96 << 20
KINDS = [
    (values, n, m)
    for values in ("int8", "int4", "bf16", "fp16", "fp32")
    for n, m in ((2, 4), (8, 16), (32, 64), (0, 0))
]
ENGINES = ("x86", "fbgemm", "onednn")


def in_turn(run: Callable[[Any], object], of: Sequence[Any]) -> Callable[[], object]:
    """Runs with the next of some things at each call."""
    turn = itertools.cycle(of)
    return lambda: run(next(turn))


def copies_of(num_bytes: int, rows: int) -> int:
    return max(2, COPIES_BYTES // num_bytes) if rows <= 16 else 1


def torch_peers(x: Tensor, shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    in_int8 = shape[0] * shape[1]
    weights = [torch.randn(shape) for _ in range(copies_of(4 * in_int8, len(x)))]
    peers: dict[str, Callable[[], object]] = {"torch fp32": in_turn(lambda weight: F.linear(x, weight), weights)}
    if len(x) > 16:  # it takes no fewer
        codes = torch.randint(-127, 128, x.shape, dtype=torch.int8)
        transposed = torch.randint(-127, 128, shape, dtype=torch.int8).T
        peers["torch._int_mm"] = lambda: torch._int_mm(codes, transposed)
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            layers = [dynamic_layer(shape) for _ in range(copies_of(in_int8, len(x)))]
            peers[f"torch dynamic int8, {engine}"] = in_turn(lambda layer: layer(x), layers)
    return peers


def dynamic_layer(shape: tuple[int, int]) -> nn.Module:
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    with warnings.catch_warnings(action="ignore"):
        made: nn.Module = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    return made


def speeds(shape: tuple[int, int], rows: int, repeats: int, products: int, clock: str) -> dict[str, float]:
    """The speed of every contestant with `rows` rows of x in units of torch's fp32."""
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0))
    contestants = torch_peers(x, shape)
    for values, n, m in KINDS:
        buffer = random_buffer(values, n, m, shape)
        others = range(copies_of(len(buffer), rows) - 1)
        of_kind = [buffer, *(native.allocate(len(buffer)).copy_(buffer) for _ in others)]
        name = f"{n}:{m} {values}" if m else f"dense {values}"
        contestants[name] = in_turn(lambda weight: native.multiply(x, weight, shape[0]), of_kind)
    calls = max(8, products // (rows * shape[0] * shape[1]))  # the first of them may wait for fresh pages

    def repeated(run: Callable[[], object]) -> Callable[[], None]:
        return lambda: [run() for _ in range(calls)] and None

    times = interleaved({name: repeated(run) for name, run in contestants.items()}, repeats, clock)
    base = statistics.median(times["torch fp32"])
    return {name: base / statistics.median(found) for name, found in times.items()}


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, one round: whether it runs, no figures")
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 576), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    shape, repeats, products = ((256, 1024), 1, 1) if args.quick else (tuple(args.shape), args.repeats, 1 << 26)
    table = {rows: speeds(shape, rows, repeats, products, args.clock) for rows in args.rows}
    names = dict.fromkeys(name for found in table.values() for name in found)
    print(f"speed in units of torch's fp32, {shape[0]} x {shape[1]}, level {native.level()}")
    print(f"{'rows of x':24}" + "".join(f"{rows:8,}" for rows in table))
    for name in names:
        print(f"{name:24}" + "".join(f"{found[name]:8.2f}" if name in found else " " * 8 for found in table.values()))
    write_json(args.json, {"machine": machine(), "shape": shape, "level": native.level(), "speeds": table})


if __name__ == "__main__":
    main()
