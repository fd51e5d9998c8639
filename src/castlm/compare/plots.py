"""The plots of `castlm compare`, each a function from its rows and runs to an SVG that stands inside the HTML."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from castlm.training.metrics_file import read_series

if TYPE_CHECKING:
    from castlm.compare.results import Result

matplotlib.rcParams["svg.hashsalt"] = "castlm"  # the same plot is the same file
_COLOURS = [c["color"] for c in matplotlib.rcParams["axes.prop_cycle"]]


class Picture(NamedTuple):
    title: str
    svg: str
    caption: str


Plot = Callable[[list[dict[str, Any]], "list[Result]"], "Picture | None"]


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    names = dict.fromkeys(row["variant"] for row in rows)
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def gaps(rows: list[dict[str, Any]], results: list[Result]) -> Picture | None:
    """The gap to the dense control: a mark for each seed, a line for the mean, the best on top."""
    shown = sorted((row for row in rows if row["gap"] and row["method"] != "dense"), key=lambda row: -row["gap"].mean)
    if not shown:
        return None
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(shown)))
    axes = figure.subplots()
    for place, row in enumerate(shown):
        axes.plot(row["gap"].values, [place] * len(row["gap"].values), "o", color="tab:blue", alpha=0.6)
        axes.plot([row["gap"].mean] * 2, [place - 0.3, place + 0.3], color="black")
    axes.set_yticks(range(len(shown)), [_label(row, shown) for row in shown])
    axes.set_xlabel("ln(perplexity, pruned / dense control)")
    if max(row["gap"].mean for row in shown) > 10 * min(max(row["gap"].mean, 1e-4) for row in shown):
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    return Picture(
        "Gap to the dense control", _svg(figure), "A dot for each seed, a bar at their mean; left is better."
    )


def _label(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    several = len({r["tokens"] for r in rows if r["tokens"]}) > 1
    return f"{row['variant']}, {row['tokens']:,} tokens" if several and row["tokens"] else row["variant"]


def time(rows: list[dict[str, Any]], results: list[Result]) -> Picture | None:
    """Flips and sparse-weight ratio over the run, a line for each seed."""
    shown = [r for r in results if r.run.tokens and r.run.config["method"] != "dense"]
    if not any(read_series(r.folder, "sparse_weight_ratio") for r in shown):
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours, named = _colours(rows), set()
    for result in shown:
        name = result.run.variant
        style = {"color": colours[name], "alpha": 0.8, "label": None if name in named else name}
        named.add(name)
        every = 1 if result.run.config["method"] in ("ste", "srste") else result.run.config["mask_interval"]
        flips = [(step, value / every) for step, value in read_series(result.folder, "flip_rate") if step]
        left.plot(*zip(*flips), **style)
        middle.plot(*zip(*read_series(result.folder, "initial_flip_rate")), **style)
        right.plot(*zip(*read_series(result.folder, "sparse_weight_ratio")), **style)
    left.set_yscale("symlog", linthresh=1e-6)
    for axes, title in ((left, "flip rate, a step"), (middle, "flips since step 0"), (right, "sparse-weight ratio")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    caption = (
        "Flip rate: share of the mask entries that the newest refresh changed, over the steps since the one before it. "
        "Sparse-weight ratio: |kept| / |all| in the sparse layers, 1 when nothing is left to prune."
    )
    return Picture("Over time", _svg(figure), caption)


def histograms(rows: list[dict[str, Any]], results: list[Result]) -> Picture | None:
    """Masked magnitudes just before the prune, all seeds of a variant together."""
    totals: dict[str, list[int]] = {}
    edges: list[float] = []
    for result in results:
        histogram = result.record.get("masked_histogram")
        if histogram:
            edges = histogram["edges"]
            counts = [histogram["zeros"], *histogram["counts"]]
            old = totals.get(result.run.variant, [0] * len(counts))
            totals[result.run.variant] = [a + b for a, b in zip(old, counts)]
    if not totals:
        return None
    figure = Figure(figsize=(7, 1.6 * len(totals)), layout="constrained")
    colours, captions = _colours(rows), []
    for axes, (name, (zeros, *counts)) in zip(
        figure.subplots(len(totals), sharex=True, squeeze=False)[:, 0], totals.items()
    ):
        whole = zeros + sum(counts)
        axes.stairs([c / whole for c in counts], edges, fill=True, color=colours[name], label=name)
        axes.set_xscale("log")
        axes.legend(loc="upper left", fontsize=8)
        axes.set_ylabel("share")
        median = _median(zeros, counts, edges)
        captions.append(f"{name}: {zeros / whole:.1%} exactly zero, median {median:.1e}")
    axes.set_xlabel("|masked weight| before the prune")
    return Picture("Where masked weights end", _svg(figure), "; ".join(captions) + ".")


def _median(zeros: int, counts: list[int], edges: list[float]) -> float:
    """The lower edge of the bin that holds it; 0 when it is an exact zero."""
    seen, half = zeros, (zeros + sum(counts)) / 2
    if seen >= half:
        return 0.0
    for count, edge in zip(counts, edges):
        seen += count
        if seen >= half:
            return edge
    return edges[-1]


def budgets(rows: list[dict[str, Any]], results: list[Result]) -> Picture | None:
    """The gap to the control of the same budget against the budget, a curve for each method."""
    figure = Figure(figsize=(7, 4))
    axes, colours = figure.subplots(), _colours(rows)
    names = dict.fromkeys(r["variant"] for r in rows if r["gap"] and r["tokens"] and r["method"] != "dense")
    if not names:
        return None
    for name in names:
        of_name = [r for r in rows if r["variant"] == name and r["gap"]]
        tokens, means = [r["tokens"] for r in of_name], [r["gap"].mean for r in of_name]
        axes.errorbar(tokens, means, [r["gap"].std or 0 for r in of_name], color=colours[name], marker="o", label=name)
    for row in rows:
        if row["gap"] and not row["tokens"]:
            axes.axhline(row["gap"].mean, color=colours[row["variant"]], linestyle=":", label=row["variant"])
    axes.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="ln(perplexity, pruned / dense control)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    caption = "Mean and standard deviation over seeds; dotted: one-shot, against the control of the largest budget."
    return Picture("Gap over budgets", _svg(figure), caption)


PLOTS: dict[str, Plot] = {"gaps": gaps, "time": time, "histograms": histograms, "budgets": budgets}
