"""Time and memory of a training step as they grow with the model, the sequence, the batch and the ranks.

    python -m benchmarks.growth [--quick] [--axis NAME ...] [--json OUT] [--plot OUT.png]

Each point goes through castlm's loop in a process of its own (`benchmarks.memory`): the peak of a step over a baseline,
and the median of three steps. The exponent is the slope of the logarithms: over all points, of the last two. What is
there at any size, as the weights are for every batch, pulls both down: p of y = c + a x^p, through the last three
points, leaves it out.

`--quick` has small models, in processes that share their points, and ends within a minute: it says whether everything
runs, and is no measurement.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.memory import DEFAULTS, LLAMA, MEDIUM, MIB, measure_in_child

Axes = dict[str, list[tuple[str, dict[str, Any]]]]
"""The axes of growth, and the points on each: label and case."""


def llama(hidden: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32}
    return {"family": "llama", "over": {**MEDIUM, **sizes, **heads, "vocab_size": 4096}}


def make_axes(
    base: dict[str, Any],
    widths: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
) -> Axes:
    """The axes over `base`, a case of `benchmarks.memory`; `ranks` share a batch of four sequences on one machine."""
    case = {**DEFAULTS, **base}
    small_batch = {**DEFAULTS, "seq_len": 256, "micro_batch": 2}
    return {
        "parameters": [(f"{hidden} x {depth}", {**small_batch, **llama(hidden, depth)}) for hidden, depth in widths],
        "tokens a sequence": [(str(length), {**case, "micro_batch": 1, "seq_len": length}) for length in lengths],
        "sequences a batch": [(str(n), {**case, "micro_batch": n, "seq_len": lengths[0]}) for n in rows],
        "ranks": [(str(n), {**case, "micro_batch": 4 // n, "seq_len": lengths[0], "world_size": n}) for n in ranks],
    }


FULL = make_axes(
    LLAMA, ((128, 4), (256, 6), (512, 8), (1024, 8)), (128, 256, 512, 1024), rows=(1, 2, 4, 8), ranks=(1, 2, 4)
)
QUICK = make_axes(llama(128, 3), ((128, 3), (192, 3), (256, 3)), (256, 512, 1024), rows=(1, 2, 4), ranks=(1, 2))


def exponents(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Slopes of log y against log x: least squares over all points, and between the last two; and `beyond_constant`,
    p of y = c + a x^p through the last three points, None where there are fewer or no p in (0, 4) fits."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    overall = statistics.linear_regression(log_x, log_y).slope
    last = (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])
    return {"overall": overall, "last": last, "beyond_constant": _beyond_constant(x[-3:], y[-3:])}


def _beyond_constant(x: Sequence[float], y: Sequence[float]) -> float | None:
    if len(x) < 3 or y[1] == y[0]:
        return None
    wanted = (y[2] - y[1]) / (y[1] - y[0])

    def ratio(p: float) -> float:  # of the two steps of x^p, which grows with p
        return (x[2] ** p - x[1] ** p) / (x[1] ** p - x[0] ** p)

    low, high = 1e-3, 4.0
    if not ratio(low) <= wanted <= ratio(high):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < wanted else (low, middle)
    return low


def measure_axes(axes: Axes, *, together: bool = False) -> dict[str, dict[str, Any]]:
    """The points of each axis with their size, seconds and bytes, and the exponents of both.

    Args:
        together: the points of all axes in one process for each number of ranks.
    """
    points = [(name, label, case) for name, axis in axes.items() for label, case in axis]
    lots = [[point] for point in points]
    if together:
        ranks = dict.fromkeys(case["world_size"] for _, _, case in points)
        lots = [[point for point in points if point[2]["world_size"] == n] for n in ranks]
    found: dict[str, dict[str, Any]] = {name: {"points": []} for name in axes}
    print(f"{'axis':20} {'size':>12} {'a step':>11} {'at the peak':>13}")
    for lot in lots:
        for (name, label, case), measured in zip(lot, measure_in_child([case for _, _, case in lot])):
            size = num_parameters(case) if name == "parameters" else int(label)
            found[name]["points"].append({"label": label, "x": size, **measured})
            print(f"{name:20} {size:>12,} {measured['seconds']:9.3f} s {measured['peak'] / MIB:9.1f} MiB", flush=True)
    for name, axis in found.items():
        x = [point["x"] for point in axis["points"]]
        axis["exponents"] = {key: exponents(x, [point[key] for point in axis["points"]]) for key in ("seconds", "peak")}
        for key, slopes in axis["exponents"].items():
            beyond = slopes["beyond_constant"]
            print(
                f"{name:20} exponent of {key}: {slopes['overall']:.2f}, between the last two {slopes['last']:.2f}, "
                f"beyond a constant {'-' if beyond is None else format(beyond, '.2f')}"
            )
    return found


def num_parameters(case: dict[str, Any]) -> int:
    import torch
    from tests.tiny import tiny_model

    with torch.device("meta"):
        return sum(p.numel() for p in tiny_model(case["family"], **case["over"]).parameters())


def draw(axes: dict[str, dict[str, Any]], file: Path) -> None:
    """Seconds and MiB of each axis, on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 5), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, (name, axis) in enumerate(axes.items()):
        x = [point["x"] for point in axis["points"]]
        for row, (key, scale, label) in enumerate((("seconds", 1, "s a step"), ("peak", MIB, "MiB at the peak"))):
            place = grid[row][column]
            y = [point[key] / scale for point in axis["points"]]
            place.loglog(x, y, marker="o")
            place.set_title(f"exponent {axis['exponents'][key]['overall']:.2f}", fontsize=9)
            place.set_xticks(x, [point["label"] for point in axis["points"]], fontsize=8)
            place.set_yticks(y, [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in y], fontsize=8)
            place.minorticks_off()
            place.set_xlabel(name)
            place.set_ylabel(label if column == 0 else "")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--axis", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--plot", metavar="OUT.png", type=Path)
    args = parser.parse_args()
    chosen = QUICK if args.quick else FULL
    axes = measure_axes({name: chosen[name] for name in args.axis}, together=args.quick)
    write_json(args.json, {"machine": machine(), "axes": axes})
    if args.plot:
        draw(axes, args.plot)


if __name__ == "__main__":
    main()
