"""Charts of pages and result folders, drawn by matplotlib as SVG (lines with bands, heat maps), and their pages.

matplotlib is in the extra `report`. `Picture.inline` puts a chart into a page, where it follows the page's colours.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from castlm.packages import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEEDS_MATPLOTLIB = "Charts need matplotlib: pip install '.[report]' in the clone of castlm."

HALF, WHOLE = 560, 1150
"""Widths of half-page and full-page charts in pixels, so that all text has the same size."""
DPI = 96
LONGEST_NAME = 40

LIGHT = {"ink": "#1d1d1b", "muted": "#6a6963", "line": "#e3e2dc", "paper": "#fcfcfa", "card": "#ffffff"}
DARK = {"ink": "#eceae4", "muted": "#a19f97", "line": "#35342f", "paper": "#191917", "card": "#21211e"}
LIGHT_SERIES = ("#2a78d6", "#e0662f", "#159a6a", "#b98100", "#c84f86", "#6a5bd0", "#5d7a1f", "#d2413f")
DARK_SERIES = ("#5b9df0", "#f08a57", "#3fbf8d", "#dba83a", "#e58ab1", "#a396f2", "#9cba5a", "#ee7a77")
LIGHT |= {f"c{i}": value for i, value in enumerate(LIGHT_SERIES)}
DARK |= {f"c{i}": value for i, value in enumerate(DARK_SERIES)}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


PAGE_COLOURS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
)
"""CSS variables of ink, paper, cards, lines and the colours of series, for light and dark pages."""

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # no math: a file name may contain $
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": LIGHT["line"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "castlm",  # the same figures give the same file
}


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    """Thin and pale: single values behind a smoothed line. It is not in the legend."""
    marks: bool = False
    """A dot at every point."""
    spread: Sequence[float] = ()
    """Half the height of a band around each point, such as the standard deviation over seeds."""


@dataclass(frozen=True)
class Picture:
    """A chart with its heading and its caption."""

    title: str
    svg: str
    """A whole SVG file, in the light colours."""
    caption: str
    wide: bool = False
    """Whether the chart spans the whole page."""

    @property
    def inline(self) -> str:
        """The chart as an element of a page, in the page's colours."""
        svg = self.svg[self.svg.index("<svg") :].replace("<svg", '<svg class="chart" role="img"', 1)
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # an id may be in a page only once
        for name, value in LIGHT.items():
            svg = svg.replace(value, f"var(--{name})")
        return svg


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return not missing("matplotlib")


def short(value: float, digits: int = 3) -> str:
    """A number of at most `digits` digits as an axis shows it: 0.05, 12, 3.5k, 1.2M, 1e-06."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.{digits}g}{unit}"
    if value == 0:
        return "0"
    return f"{value:.{digits}g}" if size >= 1e-3 else f"{value:.{digits - 3}e}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers as `short`, with as many digits as it takes to tell them apart.

    >>> tick_labels([0.9995, 0.9998, 1.0])
    ['0.9995', '0.9998', '1']
    """
    for digits in range(3, 10):
        labels = [short(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def clipped(name: str) -> str:
    """A name that leaves room for the chart beside it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] = MappingProxyType({}),
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    width: int = HALF,
    height: int = 270,
) -> str:
    """Lines over a common x axis, as an SVG file. Points that are not finite are left out.

    Args:
        y_label: stands above the axis, so that it reads horizontally.
        levels: dotted horizontal lines across the chart, by name.
        from_zero: whether a linear y axis includes 0.
    """

    def draw(axes: Axes) -> None:
        for line in series:
            spreads = line.spread or [0.0] * len(line.points)
            finite = [(x, y, half) for (x, y), half in zip(line.points, spreads) if math.isfinite(y)]
            if not finite:
                continue
            x, y, half = zip(*finite)
            colour = LIGHT_SERIES[line.colour % len(LIGHT_SERIES)]
            axes.plot(
                x,
                y,
                color=colour,
                linestyle="-" if line.colour < len(LIGHT_SERIES) else "--",  # from here on, colours repeat
                linewidth=0.8 if line.faint else 1.5,
                alpha=0.35 if line.faint else 1.0,
                marker="o" if line.marks or len(finite) == 1 else "",
                markersize=5,
                zorder=2 if line.faint else 3,
                label=None if line.faint else clipped(line.name),
            )
            if any(half):
                low, high = ([b + sign * h for b, h in zip(y, half)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for name, value in levels.items():
            axes.axhline(value, color=LIGHT["muted"], linestyle=":", linewidth=1.2)
            axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center")
        _scale(axes, "x", log_x)
        _scale(axes, "y", log_y)
        if from_zero and not log_y:
            bottom, top = axes.get_ylim()
            axes.set_ylim(min(bottom, 0.0), max(top, 0.0))
        axes.set_xlabel(x_label, loc="right")
        axes.set_title(y_label, loc="left", fontsize=9, color=LIGHT["muted"])
        named = len(axes.get_legend_handles_labels()[1])
        if 1 < named <= 3:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=named, borderaxespad=0.2)
        elif named > 3:
            axes.legend(loc="upper left", bbox_to_anchor=(1.12 if levels else 1.01, 1))

    return _svg(draw, width, height)


def heat_map(
    values: Sequence[Sequence[float | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    cell_height: int = 26,
    width: int = HALF,
) -> str:
    """A table of cells whose colour grows with the value, as an SVG file. Wide enough cells show their value.

    Args:
        values: (rows, columns); None leaves a cell empty.
        row_labels, column_labels: empty strings leave a tick without a label.
    """
    found = [value for row in values for value in row if value is not None]
    low = min(found, default=0.0)
    span = max(found, default=0.0) - low or 1.0
    cell = (width - 20 - 7 * max(map(len, row_labels), default=0)) / max(1, len(column_labels))  # pixels, about

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        for number, row in enumerate(values):
            for column, value in enumerate(row):
                if value is None:
                    continue
                share = (value - low) / span
                face = (LIGHT_SERIES[0], 0.06 + 0.94 * share)
                axes.add_patch(Rectangle((column - 0.48, number - 0.46), 0.96, 0.92, facecolor=face, linewidth=0))
                text = f"{value:.2g}"
                if cell > 7.5 * len(text):
                    ink = LIGHT["paper" if share > 0.5 else "ink"]
                    axes.text(column, number, text, ha="center", va="center", color=ink, fontsize=8)
        every = max(1, math.ceil(8 * max(map(len, column_labels), default=1) / max(cell, 0.1)))
        shown = range(0, len(column_labels), every)
        axes.set_xticks(shown, [column_labels[column] for column in shown])
        axes.set_yticks(range(len(row_labels)), [clipped(label) for label in row_labels])
        axes.set_xlim(-0.5, len(column_labels) - 0.5)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(x_label, loc="right")
        axes.set_title(f"{y_label}, {low:.2g} to {low + span:.2g}", loc="left", fontsize=9, color=LIGHT["muted"])

    return _svg(draw, width, 66 + cell_height * len(values))


def _scale(axes: Axes, which: str, log: bool) -> None:
    """Gives an axis its scale and round numbers as ticks."""
    from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

    class Labels(Formatter):
        def format_ticks(self, values: Any) -> list[str]:
            return tick_labels([float(value) for value in values])

    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        axes.set(**{f"{which}scale": "log"})
        low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Labels())


def _svg(draw: Any, width: float, height: float) -> str:
    """The SVG file of a figure of `width` x `height` pixels; `draw` draws into its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure = Figure(figsize=(width / DPI, height / DPI), layout="constrained")
        draw(figure.add_subplot())
        without_date = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=without_date, facecolor=LIGHT["card"])
        return file.getvalue()


def render(**content: Any) -> str:
    """Renders the page of a run, which loads no other files; escapes everything in `content` except charts."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("castlm.lab.report", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    no_charts = "" if can_draw() else NEEDS_MATPLOTLIB
    return environment.get_template("run.html.jinja").render(colours=PAGE_COLOURS, no_charts=no_charts, **content)
