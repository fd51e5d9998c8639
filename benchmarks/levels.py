"""The CPU kernels of each instruction set against each other, and many rows of x against the library's GEMM.

    python -m benchmarks.levels [--quick] [--clock wall|cpu] [--json OUT]

One thread. With few rows of x the weight is 512 x 1024, which stays in the second-level cache, and the figure is the
speed of a level in units of the one before it. With 1,024 rows it is the speed in units of unpacking the weight to fp32
and the library's GEMM. Medians of rounds in turns in one process, which keeps freed memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.machine import machine, write_json
from benchmarks.rows import CLOCKS, interleaved
from castlm.core.nm import nm_mask
from castlm.dtypes import FLOATS
from castlm.hardware import keep_freed_memory
from castlm.packed import native
from castlm.packed.layers import multiply_by_gemm
from castlm.packed.tensor import pack, pack_integers
from castlm_runtime.formats import FORMATS

KINDS = [(values, n, m) for values in ("bf16", "fp16", "int8", "int4") for n, m in ((2, 4), (32, 64), (0, 0))]
FEW_ROWS, MANY_ROWS = (1, 2, 4, 8, 16, 32, 128), 1024
CACHED, SHAPES = (512, 1024), ((2048, 2048), (1536, 576))
PRODUCTS = 1 << 27
"""Least seconds of a contestant in a round."""

Runs = Mapping[str, tuple[str, Callable[[], object]]]
"""Contestants by name: the level, and what to do under it."""


def random_buffer(values: str, n: int, m: int, shape: tuple[int, int]) -> Tensor:
    """A random n:m weight (out, in), or a dense one for `m` = 0, as the kernels of the level in use read it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, n, m) if n else torch.ones_like(weight, dtype=torch.bool)
    if values in FLOATS:
        weight = weight.masked_fill(~mask, 0).to(FLOATS[values])
        packed = pack(weight, n, m)
    else:
        most, groups = int(FORMATS[values].largest), FORMATS[values].num_scales(shape[1])
        codes = (weight / weight.abs().max() * most).round().to(torch.int8)
        scales = torch.ones(shape[0], groups)
        packed = pack_integers(codes * mask, scales, values, n, m, mask if n else None)
    buffer = native.allocate(native.packed_bytes(values, n, m, *shape))
    packed.repack_(buffer)
    return buffer


def seconds(runs: Runs, products: int, repeats: int, clock: str) -> dict[str, float]:
    """The median of each contestant, whose every call does `products` multiplications."""

    def repeated(level: str, run: Callable[[], object]) -> None:
        native.use_level(level)
        for _ in range(max(1, PRODUCTS // products)):
            run()

    contestants = {name: functools.partial(repeated, *run) for name, run in runs.items()}
    return {name: statistics.median(found) for name, found in interleaved(contestants, repeats, clock).items()}


def buffers_of_levels(values: str, n: int, m: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """One weight as each vector level reads it."""
    buffers = {}
    for level in VECTORS:
        native.use_level(level)
        buffers[level] = random_buffer(values, n, m, shape)
    return buffers


def against_the_level_before(values: str, n: int, m: int, rows: int, repeats: int, clock: str) -> dict[str, float]:
    """The speed of each vector level with `rows` rows of x, in units of the one before it."""
    out_features, in_features = CACHED
    buffers, x = buffers_of_levels(values, n, m, CACHED), torch.randn(rows, in_features)
    runs: Runs = {
        level: (level, functools.partial(native.multiply, x, buffer, out_features)) for level, buffer in buffers.items()
    }
    found = seconds(runs, rows * out_features * in_features, repeats, clock)
    return {f"{after} / {before}": found[before] / found[after] for before, after in itertools.pairwise(VECTORS)}


def against_the_gemm(
    values: str, n: int, m: int, shape: tuple[int, int], rows: int, repeats: int, clock: str
) -> dict[str, float]:
    """The speed of each vector level with many rows of x, in units of the library's GEMM over the unpacked weight."""
    buffers, x = buffers_of_levels(values, n, m, shape), torch.randn(rows, shape[1])

    def by_kernels(buffer: Tensor) -> None:
        for part in x.split(512):
            native.multiply(part, buffer, shape[0])

    runs: Runs = {
        **{level: (level, functools.partial(by_kernels, buffer)) for level, buffer in buffers.items()},
        "gemm": (VECTORS[-1], lambda: multiply_by_gemm(x, buffers[VECTORS[-1]], shape[0])),
    }
    found = seconds(runs, rows * shape[0] * shape[1], repeats, clock)
    return {f"{level} / GEMM": found["gemm"] / found[level] for level in VECTORS}


VECTORS = native.levels()[1:]
"""All levels of this processor but the plain one, which reads no panels."""


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, few repeats: whether it runs, no figures")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    if not VECTORS:
        parser.error("this processor has no vector kernels, or they were not built")
    torch.set_num_threads(1)
    keep_freed_memory()
    repeats, few_rows, shapes, many_rows = (
        (1, (1, 16), ((64, 128),), 160) if args.quick else (9, FEW_ROWS, SHAPES, MANY_ROWS)
    )
    table = []
    for values, n, m in KINDS:
        found = [(CACHED, rows, against_the_level_before(values, n, m, rows, repeats, args.clock)) for rows in few_rows]
        found += [
            (shape, many_rows, against_the_gemm(values, n, m, shape, many_rows, repeats, args.clock))
            for shape in shapes
        ]
        for shape, rows, ratios in found:
            weights = f"{n}:{m} {values}" if m else f"dense {values}"
            table.append({"weights": weights, "shape": shape, "rows": rows, **ratios})
            text = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"{weights:10}  {shape[0]} x {shape[1]}, {rows:5,} rows  {text}", flush=True)
    write_json(args.json, {"machine": machine(), "rows": table})


if __name__ == "__main__":
    main()
