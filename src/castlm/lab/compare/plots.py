"""The charts of `castlm compare`: each function draws rows and runs as pictures, keyed by file stem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from castlm.lab.compare.rows import Row, Spread, spread
from castlm.lab.compare.runs import Result
from castlm.lab.report.charts import WHOLE, Picture, Series, dot_chart, heat_map, line_chart
from castlm.methods.table import METHODS, is_control
from castlm.training.record import read_series

Rows = list[Row]
Plot = Callable[[Rows, list[Result]], dict[str, Picture]]
GAP = "ln(perplexity / dense control)"

MASK_CHARTS = {
    "flip_rate": (
        "Mask flips",
        "flip rate per step",
        "The share of the mask entries that the last refresh changed, divided by the steps between, mean over seeds.",
    ),
    "initial_flip_rate": (
        "Mask flips since step 0",
        "flips since step 0",
        "The share of the mask entries that differ from the masks of step 0, mean over seeds.",
    ),
    "sparse_weight_ratio": (
        "Kept share",
        "kept share",
        "sum |kept| / sum |all| in the sparse layers, mean over seeds; 1 means that nothing is left to prune.",
    ),
}
"""Title, label and caption by the name of a logged figure."""


def _colours(rows: Rows) -> dict[str, int]:
    names = dict.fromkeys(row.variant for row in rows)
    return {name: number for number, name in enumerate(names)}


def _with_gaps(rows: Rows) -> list[tuple[Row, Spread]]:
    """The rows that are drawn, with their gaps."""
    return [(row, row.ranked_gap) for row in rows if row.ranked_gap is not None]


def gaps(rows: Rows, results: list[Result]) -> dict[str, Picture]:
    """The gap to the dense control: a dot for each seed, a bar at their mean and a band of a standard deviation."""
    shown = sorted(_with_gaps(rows), key=lambda each: each[1].mean)
    if not shown:
        return {}
    means, colours = [gap.mean for _, gap in shown], _colours(rows)
    several = len({row.tokens for row, _ in shown if row.tokens}) > 1
    dots = []
    for row, gap in shown:
        label = f"{row.variant}, {row.tokens:,} tokens" if several and row.tokens else row.variant
        dots.append((label, gap.values, colours[row.variant]))
    svg = dot_chart(dots, x_label=GAP, log_x=min(means) > 0 and max(means) > 10 * min(means))
    picture = Picture(
        "Gap to the dense control",
        svg,
        "A dot for each seed, a bar at their mean, a band of one standard deviation over the seeds. Left is better. A "
        'seed moves all rows together, so bands may overlap where every seed agrees: the column "behind the best" '
        "compares seed by seed.",
        wide=True,
    )
    return {"gaps": picture}


def losses(rows: Rows, results: list[Result]) -> dict[str, Picture]:
    """Perplexity after the prune over training tokens: one line per variant, with a band over its seeds."""
    largest = max((r.run.budget for r in results), default=0)
    runs = [r for r in results if r.run.budget == largest and largest]
    lines = []
    for name, index in _colours(rows).items():
        of_name = [r for r in runs if r.run.variant == name]
        if not of_name:
            continue
        run = of_name[0].run
        found = _over_seeds(of_name, "perplexity" if is_control(run.config["method"]) else "prune_now_ppl")
        points = [(step * (run.tokens // run.config["max_steps"]), mean) for step, mean, _ in found]
        if len(points) > 1:
            lines.append(Series(name, points, index, marks=True, spread=[std for _, _, std in found]))
    if not lines:
        return {}
    values = [y for line in lines for _, y in line.points]
    are_controls = all(is_control(r.run.config["method"]) for r in runs)
    svg = line_chart(
        lines,
        x_label="training tokens",
        y_label="perplexity" if are_controls else "perplexity after the prune",
        log_y=max(values) > 4 * min(values),
        width=WHOLE,
        height=340,
    )
    caption = (
        "Perplexity of the evaluation text at the largest token budget: mean over seeds, with a band of one standard "
        "deviation."
    )
    title = f"Learning curve of {lines[0].name}" if len(lines) == 1 else "Learning curves"  # one line has no legend
    return {"losses": Picture(title, svg, caption, wide=True)}


def _over_seeds(results: list[Result], key: str) -> list[tuple[float, float, float]]:
    """(step, mean over the runs, sample standard deviation or 0) at the steps that all of them have."""
    series = [dict(read_series(r.folder, key)) for r in results]
    if not series:
        return []
    steps = sorted(set.intersection(*(set(one) for one in series)))
    values = {step: [one[step] for one in series] for step in steps}
    points = []
    for step, found in values.items():
        over = spread(found)
        assert over is not None
        points.append((step, over.mean, over.std or 0.0))
    return points


def masks(rows: Rows, results: list[Result]) -> dict[str, Picture]:
    """Flips per step, flips since step 0 and the kept share over the run, with a band over the seeds."""
    shown = [r for r in results if r.run.tokens and not is_control(r.run.config["method"])]
    pictures = {}
    for key, (title, label, caption) in MASK_CHARTS.items():
        lines = []
        for name, index in _colours(rows).items():
            of_name = [r for r in shown if r.run.variant == name]
            found = _over_seeds(of_name, key)
            if key == "flip_rate" and found:
                config = of_name[0].run.config
                every = config["mask_interval"] if "mask_interval" in METHODS[config["method"]].options else 1
                found = [(step, mean / every, std / every) for step, mean, std in found if step]
            if found:
                points = [(step, mean) for step, mean, _ in found]
                lines.append(Series(name, points, index, spread=[std for _, _, std in found]))
        if any(value for line in lines for _, value in line.points):
            svg = line_chart(lines, x_label="step", y_label=label, width=WHOLE, height=220)
            pictures[key] = Picture(title, svg, caption, wide=True)
    return pictures


def histograms(rows: Rows, results: list[Result]) -> dict[str, Picture]:
    """Magnitudes of masked weights just before the prune: a row per variant, all seeds together."""
    totals: dict[str, list[int]] = {}
    edges: list[float] = []
    for result in results:
        histogram = result.facts.masked_histogram
        if histogram is not None:
            edges = histogram.edges
            counts = [histogram.zeros, *histogram.counts]
            old = totals.get(result.run.variant, [0] * len(counts))
            totals[result.run.variant] = [a + b for a, b in zip(old, counts)]
    if not totals:
        return {}
    used = [0, *(i for i in range(1, len(edges)) if any(counts[i] / sum(counts) > 1e-3 for counts in totals.values()))]
    used = [0, *range(used[1], used[-1] + 1)] if len(used) > 1 else used
    labels = [f"{edges[i - 1]:.0e}" if (i - 1) % 4 == 0 else "" for i in used]  # one for each decade
    labels[0] = "zero"
    svg = heat_map(
        [[counts[i] / sum(counts) for i in used] for counts in totals.values()],
        list(totals),
        labels,
        x_label="|masked weight| before the prune",
        y_label="share of the masked weights",
        form=".0%",
        power=0.5,
        width=WHOLE,
    )
    parts = []
    for name, counts in totals.items():
        half, cumulative = sum(counts) / 2, itertools.accumulate(counts)
        at = next(number for number, seen in enumerate(cumulative) if seen >= half)  # the bin of the median; 0: zeros
        median = 0.0 if at == 0 else edges[at - 1]
        parts.append(f"{name}: {counts[0] / sum(counts):.1%} exactly zero, median {median:.1e}")
    return {"histograms": Picture("Where masked weights end", svg, "; ".join(parts) + ".", wide=True)}


def budgets(rows: Rows, results: list[Result]) -> dict[str, Picture]:
    """The gap to the control of the same token budget against the budget, a line per variant."""
    colours = _colours(rows)
    shown = _with_gaps(rows)
    names = dict.fromkeys(row.variant for row, _ in shown if row.tokens)
    if not names:
        return {}
    lines = []
    for name in names:
        of_name = [(row.tokens, gap) for row, gap in shown if row.variant == name]
        points = [(tokens, gap.mean) for tokens, gap in of_name]
        lines.append(Series(name, points, colours[name], marks=True, spread=[gap.std or 0.0 for _, gap in of_name]))
    levels = {row.variant: gap.mean for row, gap in shown if not row.tokens}
    svg = gap_chart(lines, levels)
    caption = (
        "Means over seeds, with a band of one standard deviation. Dotted: one-shot methods, against the control of the "
        "largest budget."
    )
    return {"budgets": Picture("Gap over token budgets", svg, caption, wide=True)}


def gap_chart(lines: Sequence[Series], levels: Mapping[str, float] = MappingProxyType({})) -> str:
    """Gaps to the dense control over training tokens, on a logarithmic axis where all of them are above 0."""
    values = [y for line in lines for _, y in line.points] + [*levels.values()]
    return line_chart(
        lines,
        x_label="training tokens",
        y_label=GAP,
        levels=levels,
        log_x=True,
        log_y=min(values) > 0,
        width=WHOLE,
        height=360,
    )


PLOTS: dict[str, Plot] = {"gaps": gaps, "losses": losses, "masks": masks, "histograms": histograms, "budgets": budgets}
