"""How the time and the memory of a training step grow: with the model, the sequence, the batch and the ranks.

    python -m benchmarks.growth [--axis NAME ...] [--json OUT] [--plot OUT.png]

Each point is a process of its own that goes through castlm's loop (`benchmarks.memory`): the peak of a step over a
baseline, and the median of three steps. The exponent is the slope of the logarithms: over all points, of the last two.
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


def _llama(hidden: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32}
    return {"family": "llama", "over": {**MEDIUM, **sizes, **heads, "vocab_size": 4096}}


SMALL_BATCH = {**DEFAULTS, "seq_len": 256, "micro_batch": 2}
AXES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "parameters": [
        (f"{h} x {d}", {**SMALL_BATCH, **_llama(h, d)}) for h, d in ((128, 4), (256, 6), (512, 8), (1024, 8))
    ],
    "tokens a sequence": [
        (str(length), {**DEFAULTS, **LLAMA, "micro_batch": 1, "seq_len": length}) for length in (128, 256, 512, 1024)
    ],
    "sequences a batch": [
        (str(rows), {**DEFAULTS, **LLAMA, "micro_batch": rows, "seq_len": 128}) for rows in (1, 2, 4, 8)
    ],
    "ranks": [
        (str(ranks), {**DEFAULTS, **LLAMA, "micro_batch": 4 // ranks, "seq_len": 128, "world_size": ranks})
        for ranks in (1, 2, 4)
    ],
}
"""What grows, and its points; ranks share a batch of four sequences on one machine."""


def exponents(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slopes of log y against log x: least squares over all points, and between the last two."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    overall = statistics.linear_regression(log_x, log_y).slope
    return overall, (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])


def measure_axis(name: str) -> dict[str, Any]:
    """The points of an axis with their size, seconds and bytes, and the exponents of both."""
    points = []
    for label, case in AXES[name]:
        size = num_parameters(case) if name == "parameters" else int(label)
        point = {"label": label, "x": size, **measure_in_child(case)}
        points.append(point)
        print(f"{name:20} {size:>12,} {point['seconds']:9.3f} s {point['peak'] / MIB:9.0f} MiB", flush=True)
    x = [point["x"] for point in points]
    slopes = {key: exponents(x, [point[key] for point in points]) for key in ("seconds", "peak")}
    for key, (overall, last) in slopes.items():
        print(f"{name:20} exponent of {key}: {overall:.2f}, between the last two {last:.2f}", flush=True)
    return {"points": points, "exponents": slopes}


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
            place.loglog(x, [point[key] / scale for point in axis["points"]], marker="o")
            place.set_title(f"exponent {axis['exponents'][key][0]:.2f}", fontsize=9)
            place.set_xticks(x, [point["label"] for point in axis["points"]], fontsize=8)
            place.minorticks_off()
            place.set_xlabel(name)
            place.set_ylabel(label if column == 0 else "")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--plot", metavar="OUT.png", type=Path)
    args = parser.parse_args()
    axes = {name: measure_axis(name) for name in args.axis}
    write_json(args.json, {"machine": machine(), "axes": axes})
    if args.plot:
        draw(axes, args.plot)


if __name__ == "__main__":
    main()
