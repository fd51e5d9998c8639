"""Draws docs/results/sizes.svg from sizes.json: perplexity over megabytes, with the frontiers of dense and n:m weights.

    python -m benchmarks.sizes_figure

The points are also in the description of the file, by which a test compares it with the results: what matplotlib draws
differs between versions. It needs the extra `report`.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from benchmarks.render import RESULTS

Point = tuple[float, float, str]
"""Megabytes, perplexity, and the name of the recipe."""

WAYS = ("perplexity", "scales trained after rounding")
"""The columns of the ways to train the rounding; a recipe counts with the better one."""


def frontiers(results: Path) -> dict[str, list[Point]]:
    """By side, the recipes that no other of this side beats in both bytes and perplexity, from the smallest on.

    Args:
        results: the file of results, sizes.json.
    """
    found = json.loads(results.read_text(encoding="utf-8"))["smollm2"]
    columns = [column["name"] for column in found["columns"]]
    rows = [dict(zip(columns, row)) for row in found["rows"]]
    points = []
    for row in rows:
        if found_by := [row[way] for way in WAYS if row.get(way) is not None]:
            points.append((row["MB"], min(found_by), row["recipe"]))
    sides: dict[str, list[Point]] = {"dense": [], "n:m": []}
    for point in sorted(points):
        side = sides["dense" if point[2].startswith("dense") else "n:m"]
        if not side or point[1] < side[-1][1]:
            side.append(point)
    return sides


def described(figure: str) -> Any:
    """The points in the description of a figure's SVG."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", figure, re.S)
    assert found is not None
    return json.loads(unescape(found[1]))


def draw(sides: dict[str, list[Point]], file: Path) -> None:
    """Writes the figure as SVG; equal points give equal bytes with one version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    matplotlib.rcParams["svg.hashsalt"] = "sizes"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (side, points), marker, below in zip(sides.items(), "os", (True, False)):
        axes.plot([p[0] for p in points], [p[1] for p in points], f"-{marker}", label=side)
        for megabytes, perplexity, name in points:
            # slanted, so that the names of neighbours do not meet
            offset, align = ((-3, -5), ("right", "top")) if below else ((3, 5), ("left", "bottom"))
            words = name.removeprefix("dense ").removesuffix(" head")
            look: Any = {"fontsize": 8, "rotation": 30, **dict(zip(("ha", "va"), align))}
            axes.annotate(words, (megabytes, perplexity), offset, textcoords="offset points", **look)
    axes.set(xscale="log", yscale="log", xlabel="MB of the packed folder", ylabel="perplexity", xlim=(42, 320))
    axes.set_xticks([50, 58, 65, 72, 85, 100, 135, 200, 269])
    axes.set_yticks([20, 25, 30, 35, 40])
    axes.set_ylim(16.5, 46)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None, "Description": json.dumps(sides)})


if __name__ == "__main__":
    draw(frontiers(RESULTS / "sizes.json"), RESULTS / "sizes.svg")
