"""Counts how often `castlm advise` is right about a GPU, on published measurements.

    python -m benchmarks.advisor [--fit]

A cell is a layer, a number of tokens and two formats. It counts where they differ by more than 5 %; the advice is right
where it names the faster one. `--fit` fits the constants of `roofline.KERNELS` again (scipy) to published.csv.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.rows import Row
from castlm.devices import find_device
from castlm.lab.advice.cpu import Shape
from castlm.lab.advice.roofline import KERNELS, Kernel, gpu_formats, layer_seconds

GOAL = ">= 0.9"
NOTICEABLE = math.log(1.05)


@dataclass(frozen=True)
class KernelTime:
    """One published cell: a linear layer, or several as a sum, dense and 2:4, in microseconds."""

    device: str
    dtype: str
    shapes: tuple[Shape, ...]
    tokens: int
    dense_us: float
    sparse_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us


@functools.cache
def kernel_times() -> tuple[KernelTime, ...]:
    """The rows of published.csv; `roofline.KERNEL_SOURCE` is their source."""

    def layers(text: str) -> tuple[Shape, ...]:  # "4096x4096+11008x4096"
        pairs = (layer.split("x") for layer in text.split("+"))
        return tuple((int(out_features), int(in_features)) for out_features, in_features in pairs)

    text = Path(__file__).with_name("published.csv").read_text(encoding="utf-8")
    return tuple(
        KernelTime(
            *(row["device"], row["dtype"], layers(row["layers"]), int(row["tokens"])),
            *(float(row["dense_us"]), float(row["sparse_us"])),
        )
        for row in csv.DictReader(text.splitlines())
    )


def predicted(cell: KernelTime, sparse: bool, kernel: Kernel | None = None) -> float:
    """Microseconds of a published cell by the roofline."""
    device, form = find_device(cell.device), gpu_formats(cell.dtype)[sparse]
    return 1e6 * sum(layer_seconds(device, form, shape, cell.tokens, kernel) for shape in cell.shapes)


def right(pairs: Iterable[tuple[float, float]]) -> Row:
    """The share of (true, advised) speed-ups on the same side of 1, among noticeable true ones."""
    counted = [(true, advised) for true, advised in pairs if abs(math.log(true)) > NOTICEABLE]
    share = sum((true > 1) == (advised > 1) for true, advised in counted) / len(counted)
    return Row(f"advice, dense or 2:4, {len(counted)} cells", "", share, share, share, GOAL)


def published_row(cells: Sequence[KernelTime] | None = None) -> Row:
    """The roofline on the published cells, which its constants are fitted to."""
    cells = kernel_times() if cells is None else cells
    row = right((cell.speedup, predicted(cell, False) / predicted(cell, True)) for cell in cells)
    return replace(row, against="published kernel times")


def rows(quick: bool = False) -> list[Row]:
    return [published_row()]


def kernels_fitted() -> Iterator[tuple[tuple[str, str, bool], Kernel, float]]:
    """The constants of each kernel that fit its times best, with the mean error of the logarithm."""
    for key in sorted(KERNELS):
        family, dtype, sparse = key
        cells = [c for c in kernel_times() if (find_device(c.device).family, c.dtype) == (family, dtype)]
        times = [cell.sparse_us if sparse else cell.dense_us for cell in cells]

        def at(kernel: Kernel, cells: Sequence[KernelTime] = cells, sparse: bool = sparse) -> list[float]:
            return [predicted(cell, sparse, kernel) for cell in cells]

        yield key, *best_kernel(at, times)


def best_kernel(times_at: Callable[[Kernel], list[float]], times: Sequence[float]) -> tuple[Kernel, float]:
    """The kernel with the least mean absolute error of the logarithm of its times, and that error."""
    from scipy.optimize import minimize

    def error(logs: Sequence[float]) -> float:
        found = times_at(Kernel(*map(math.exp, logs)))
        return sum(abs(math.log(mine / theirs)) for mine, theirs in zip(found, times)) / len(times)

    starts = [(launch, serial, 0.7, 0.5) for launch in (2.0, 6.0) for serial in (0.5, 3.0)]
    found = [minimize(error, [*map(math.log, start)], method="Nelder-Mead", tol=1e-6) for start in starts]
    best = min(found, key=lambda result: float(result.fun))
    return Kernel(*map(math.exp, best.x)), float(best.fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    if parser.parse_args().fit:
        for key, kernel, error in kernels_fitted():
            shares = f"{kernel.bandwidth:.3f}, {kernel.peak:.3f}"
            print(f"{key}: {kernel.launch:.3g}, {kernel.serial:.3g}, {shares}  error {error:.3f}")
    for row in rows():
        print(f"{row.part}, {row.against}: {row.value:.3f} (goal {row.goal})")


if __name__ == "__main__":
    main()
