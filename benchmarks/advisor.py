"""How often `castlm advise` is right, on the cells that others published and on cells measured on this processor.

    python -m benchmarks.advisor [--fit]

A cell is a layer, a number of tokens and two formats. It counts where they differ by more than 5 %; the advice is right
where it names the faster one. `--fit` fits the constants of `roofline.KERNELS` again (scipy): those of GPUs to
published.csv, those of CPUs to what is measured here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from benchmarks.rows import Row
from castlm.inference.devices import Device, find_device
from castlm.inference.published import KernelTime, kernel_times
from castlm.inference.roofline import KERNELS, MANY_ROWS, Format, Kernel, cpu_formats, gpu_formats, layer_seconds
from castlm.inference.this_device import CpuTimer, this_cpu

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))
TOKENS = (1, 4, 16, 256)
PAIRS = (("bf16", "2:4 bf16"), ("int8", "2:4 int8"), ("int4", "2:4 int4"), ("int8", "2:4 bf16"), ("torch bf16", "bf16"))
"""Choices that a user has on a CPU; each is a cell by shape and tokens."""

GOAL = ">= 0.9"
NOTICEABLE = math.log(1.05)


def predicted(cell: KernelTime, sparse: bool, kernel: Kernel | None = None) -> float:
    """Microseconds of a published cell by the roofline."""
    device, form = find_device(cell.device), gpu_formats(cell.dtype)[sparse]
    return 1e6 * sum(layer_seconds(device, form, shape, cell.tokens, kernel) for shape in cell.shapes)


def right(pairs: Iterable[tuple[float, float]]) -> Row:
    """Of (true speed-up, advised speed-up), the share whose sides of 1 agree, among those with a noticeable truth."""
    counted = [(true, advised) for true, advised in pairs if abs(math.log(true)) > NOTICEABLE]
    share = sum((true > 1) == (advised > 1) for true, advised in counted) / len(counted)
    return Row(f"advice, dense or 2:4, {len(counted)} cells", "", share, share, share, GOAL)


def published_row(cells: Sequence[KernelTime] | None = None) -> Row:
    """The roofline on the published cells, which its constants are fitted to."""
    cells = kernel_times() if cells is None else cells
    row = right((cell.speedup, predicted(cell, False) / predicted(cell, True)) for cell in cells)
    return replace(row, against="published kernel times")


Cells = dict[tuple[tuple[int, int], int], dict[str, float]]
"""Seconds by format, by shape and tokens."""


def measured_cells(shapes: Sequence[tuple[int, int]] = SHAPES) -> Cells:
    """Every format of a layer on this CPU, the weights cold."""
    formats = cpu_formats("bf16")
    timer = CpuTimer(formats)
    return {
        (shape, tokens): {form.name: timer.seconds(form, shape, tokens) for form in formats}
        for shape in shapes
        for tokens in TOKENS
    }


def measured_row(cells: Cells | None = None, device: Device | None = None) -> Row:
    """The roofline of this CPU against what its kernels take."""
    cells = measured_cells() if cells is None else cells
    devices = {tokens: device or this_cpu(tokens) for _, tokens in cells}
    forms = {form.name: form for form in cpu_formats("bf16")}
    pairs = []
    for (shape, tokens), seconds in cells.items():
        advised = {name: layer_seconds(devices[tokens], form, shape, tokens) for name, form in forms.items()}
        pairs += [(seconds[a] / seconds[b], advised[a] / advised[b]) for a, b in PAIRS]
    return replace(right(pairs), part=f"advice, one of two formats, {len(pairs)} cells", against="timed on this CPU")


def rows(quick: bool = False) -> list[Row]:
    return [published_row(), measured_row(measured_cells(SHAPES[:1] if quick else SHAPES))]


def kernels_fitted() -> Iterator[tuple[tuple[str, str, bool], Kernel, float]]:
    """The constants of each kernel that fit its times best, with the mean error of the logarithm."""
    for key in sorted(k for k in KERNELS if k[0] != "cpu"):
        family, dtype, sparse = key
        cells = [c for c in kernel_times() if (find_device(c.device).family, c.dtype) == (family, dtype)]
        times = [cell.sparse_us if sparse else cell.dense_us for cell in cells]

        def at(kernel: Kernel, cells: Sequence[KernelTime] = cells, sparse: bool = sparse) -> list[float]:
            return [predicted(cell, sparse, kernel) for cell in cells]

        yield key, *best_kernel(at, times)
    device = this_cpu()
    most = MANY_ROWS[device.level].more_than if device.level in MANY_ROWS else max(TOKENS)
    measured = {cell: seconds for cell, seconds in measured_cells().items() if cell[1] <= most}
    for form in cpu_formats("bf16"):
        times = [seconds[form.name] for seconds in measured.values()]

        def on_cpu(kernel: Kernel, form: Format = form) -> list[float]:
            return [layer_seconds(device, form, shape, tokens, kernel) for shape, tokens in measured]

        yield ("cpu", form.name.removeprefix("2:4 "), form.sparse), *best_kernel(on_cpu, times)


def best_kernel(times_at: Callable[[Kernel], list[float]], times: Sequence[float]) -> tuple[Kernel, float]:
    """The kernel with the least mean absolute error of the logarithm of its times, and that error."""
    from scipy.optimize import minimize

    def error(logs: Sequence[float]) -> float:
        found = times_at(Kernel(*map(math.exp, logs)))
        return sum(abs(math.log(mine / theirs)) for mine, theirs in zip(found, times)) / len(times)

    starts = [(launch, serial, 0.7, 0.5) for launch in (2e-6, 6e-6) for serial in (5e-10, 3e-9)]
    found = [minimize(error, [*map(math.log, start)], method="Nelder-Mead", tol=1e-6) for start in starts]
    best = min(found, key=lambda result: float(result.fun))
    return Kernel(*map(math.exp, best.x)), float(best.fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    if parser.parse_args().fit:
        for key, kernel, error in kernels_fitted():
            launch, serial = kernel.launch * 1e6, kernel.serial * 1e9
            print(f"{key}: {launch:.3g}, {serial:.3g}, {kernel.bandwidth:.3f}, {kernel.peak:.3f}  error {error:.3f}")
    for row in rows():
        print(f"{row.part}, {row.against}: {row.value:.3f} (goal {row.goal})")


if __name__ == "__main__":
    main()
