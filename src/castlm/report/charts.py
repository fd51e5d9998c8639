"""Charts as inline SVG: lines, dots and heat maps. Colours are CSS variables, so that one file fits light and dark.

No global state, no drawing library, nothing fetched: a chart is a string, the same for the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from castlm.report.scales import Scale, short

NUM_COLOURS = 8
HALF, WHOLE = 560, 1150
"""Widths of a chart that takes half of the page or all of it, in pixels, so that all text has the same size."""
LIGHT = ("#2a78d6", "#e0662f", "#159a6a", "#b98100", "#c84f86", "#6a5bd0", "#5d7a1f", "#d2413f")
DARK = ("#5b9df0", "#f08a57", "#3fbf8d", "#dba83a", "#e58ab1", "#a396f2", "#9cba5a", "#ee7a77")

_VARIABLES = "--ink:{ink};--muted:{muted};--line:{line};--paper:{paper};" + "".join(
    f"--c{i}:{{colours[{i}]}};" for i in range(NUM_COLOURS)
)
COLOURS = (
    ":root{color-scheme:light dark;"
    + _VARIABLES.format(ink="#1d1d1b", muted="#6a6963", line="#e3e2dc", paper="#fcfcfa", colours=LIGHT)
    + "}@media (prefers-color-scheme:dark){:root{"
    + _VARIABLES.format(ink="#eceae4", muted="#a19f97", line="#35342f", paper="#191917", colours=DARK)
    + "}}"
)
"""CSS variables of ink, paper, lines and the colours of series, for light and dark."""

CHART_CSS = (
    "svg.chart{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;display:block;width:100%;"
    "height:auto;overflow:visible}svg.chart text{fill:var(--muted)}svg.chart .name{fill:var(--ink)}"
    "svg.chart .grid{stroke:var(--line);stroke-width:1}svg.chart .axis{stroke:var(--muted);stroke-width:1}"
    "svg.chart .series{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    "svg.chart .faint{stroke-width:1;opacity:.35}svg.chart .mark{stroke:var(--paper);stroke-width:1.5}"
    "svg.chart .dashed{stroke-dasharray:2 4}"
)


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    """Thin and pale: single values behind a smoothed line. It is not in the legend."""
    marks: bool = False
    """A dot at every point, with its values as a tooltip."""


@dataclass(frozen=True)
class Level:
    """A horizontal line across a chart."""

    name: str
    value: float


def colour(index: int) -> str:
    """The CSS colour of series number `index`."""
    return f"var(--c{index % NUM_COLOURS})"


def standalone(svg: str) -> str:
    """A chart as an SVG file of its own, with its style inside."""
    head, rest = svg.split(">", 1)
    background = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{COLOURS}{CHART_CSS}</style>{background}{rest}'


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    width: int = HALF,
    height: int = 270,
) -> str:
    """Lines over a common x axis.

    Args:
        y_label: stands above the axis, so that it reads horizontally.
        levels: horizontal lines, each labelled at its right end.
        from_zero: whether a linear y axis includes 0.
    """
    shown = [s for s in series if s.points]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points] + [level.value for level in levels] + [0.0] * (from_zero and not log_y)
    left, right, top, bottom = 52, 96 if levels else 14, 46, height - 38
    x = Scale.of(xs, left, width - right, log=log_x, pad=0.02 if log_x else 0.0)
    y = Scale.of(ys, bottom, top, log=log_y)
    parts = [*_axes(x, y, x_label, y_label), *_levels(levels, y, left, width - right)]
    for line in sorted(shown, key=lambda s: not s.faint):
        parts.append(_line(line, x, y))
    parts.append(_legend([s for s in shown if not s.faint], left))
    return _svg(width, height, parts)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<text x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text x="{x.end}" y="{y.start + 33}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text x="0" y="12">{escape(y_label)}</text>')
    return parts


def _levels(levels: Sequence[Level], y: Scale, left: float, right: float) -> list[str]:
    parts, last = [], math.inf
    for level in sorted(levels, key=lambda one: one.value):
        at = y.at(level.value)
        last = text_at = min(at + 4, last - 14)  # labels do not overlap
        parts.append(f'<line class="axis dashed" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="name" x="{right + 6}" y="{text_at:.1f}">{escape(level.name)}</text>')
    return parts


def _line(line: Series, x: Scale, y: Scale) -> str:
    points = [(a, b) for a, b in line.points if math.isfinite(b)]
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    kind = "series" + " faint" * line.faint
    parts = [f'<polyline class="{kind}" stroke="{colour(line.colour)}" points="{path}"/>']
    if line.marks or len(points) == 1:
        for a, b in points:
            title = f"<title>{escape(line.name)}: {b:.5g} at {a:,.6g}</title>"
            at = f'cx="{x.at(a):.1f}" cy="{y.at(b):.1f}"'
            parts.append(f'<circle class="mark" {at} r="4" fill="{colour(line.colour)}">{title}</circle>')
    return "".join(parts)


def _legend(series: Sequence[Series], left: float) -> str:
    parts, at = [], left
    for line in series if len(series) > 1 else ():
        parts.append(f'<line class="series" stroke="{colour(line.colour)}" x1="{at}" x2="{at + 18}" y1="30" y2="30"/>')
        parts.append(f'<text class="name" x="{at + 24}" y="34">{escape(line.name)}</text>')
        at += 40 + 6.6 * len(line.name)
    return "".join(parts)


def dot_chart(rows: Sequence[tuple[str, Sequence[float], int]], *, x_label: str, log_x: bool = False) -> str:
    """A row per label with a dot for each value and a bar at their mean.

    Args:
        rows: (label, values, colour), the first row on top.
    """
    width, left, step = WHOLE, min(300, 20 + 7 * max(len(label) for label, _, _ in rows)), 30
    height = 26 + step * len(rows) + 36
    x = Scale.of([v for _, values, _ in rows for v in values], left, width - 70, log=log_x)
    bottom = 14 + step * len(rows)
    parts = []
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{short(tick)}</text>')
    for number, (label, values, index) in enumerate(rows):
        y, mean = 20 + step * number, math.fsum(values) / len(values)
        parts.append(f'<text class="name" x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        at = x.at(mean)
        parts.append(
            f'<line stroke="{colour(index)}" stroke-width="3" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 9}" y2="{y + 9}"/>'
        )
        for value in values:
            title = f"<title>{escape(label)}: {value:.5g}</title>"
            parts.append(
                f'<circle class="mark" cx="{x.at(value):.1f}" cy="{y}" r="5" fill="{colour(index)}" '
                f'fill-opacity=".75">{title}</circle>'
            )
        parts.append(f'<text x="{x.at(max(values)) + 12:.1f}" y="{y + 4}">{mean:.4g}</text>')
    parts.append(f'<text x="{x.end}" y="{bottom + 33}" text-anchor="end">{escape(x_label)}</text>')
    return _svg(width, height, parts)


def heat_map(
    values: Sequence[Sequence[float | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    form: str = ".2g",
    in_cells: bool = False,
    from_zero: bool = True,
    power: float = 1.0,
    cell_height: int = 26,
    width: int = HALF,
) -> str:
    """A table of cells whose colour grows with the value; each cell has its value as a tooltip.

    Args:
        values: (rows, columns); None leaves a cell empty.
        row_labels, column_labels: empty strings leave a tick without a label.
        form: format of the values.
        in_cells: whether the values are written into the cells, if these are wide enough.
        from_zero: whether the colour scale begins at 0; else at the smallest value.
        power: exponent of the colour scale; 0.5 makes small values more visible.
    """
    left, top = 20 + 7 * max(map(len, row_labels), default=0), 26
    cell = (width - left - 4) / max(1, len(column_labels))
    gap = 2 if cell > 12 and cell_height > 12 else 0
    found = [v for row in values for v in row if v is not None]
    low = 0.0 if from_zero else min(found, default=0.0)
    span = max(found, default=0.0) - low or 1.0
    parts = [f'<text x="0" y="12">{escape(y_label)}</text>', _heat_legend(low, low + span, form, width)]
    for number, (row, label) in enumerate(zip(values, row_labels)):
        y = top + number * cell_height
        middle = y + cell_height / 2 + 4
        parts.append(f'<text class="name" x="{left - 8}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for column, value in enumerate(row):
            if value is None:
                continue
            share, x = (max(0.0, value - low) / span) ** power, left + column * cell
            title = f"<title>{escape(label)} {escape(column_labels[column])}: {value:{form}}</title>"
            parts.append(
                f'<rect x="{x + gap / 2:.2f}" y="{y + gap / 2:g}" width="{max(cell - gap, 0.5):.2f}" '
                f'height="{cell_height - gap}" rx="{gap}" fill="var(--c0)" fill-opacity="{0.06 + 0.94 * share:.3f}">'
                f"{title}</rect>"
            )
            text = format(value, form)
            if in_cells and cell > 7.5 * len(text):
                ink = ' style="fill:var(--paper)"' if share > 0.5 else ' class="name"'
                at = f'x="{x + cell / 2:.1f}" y="{middle:.1f}" text-anchor="middle" font-size="11"'
                parts.append(f"<text {at}{ink}>{text}</text>")
    bottom = top + len(values) * cell_height
    every = max(1, math.ceil(max(map(len, column_labels), default=1) * 8 / max(cell, 0.1)))
    for column, label in enumerate(column_labels):
        if column % every == 0:
            x = left + (column + 0.5) * cell
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<text x="{width - 4}" y="{bottom + 32}" text-anchor="end">{escape(x_label)}</text>')
    return _svg(width, bottom + 40, parts)


def _heat_legend(low: float, high: float, form: str, width: int) -> str:
    boxes = [
        f'<rect x="{width - 110 + i * 10}" y="4" width="10" height="9" fill="var(--c0)" '
        f'fill-opacity="{0.06 + 0.94 * i / 5:.2f}"/>'
        for i in range(6)
    ]
    first = f'<text x="{width - 116}" y="12" text-anchor="end">{low:{form}}</text>'
    return first + "".join(boxes) + f'<text x="{width - 44}" y="12">{high:{form}}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'
