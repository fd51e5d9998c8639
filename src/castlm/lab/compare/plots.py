"""The chart of `castlm compare`: the gaps to the dense control, by row, or by token budget where there are several."""

from __future__ import annotations

from castlm.lab.compare.rows import Row, Spread
from castlm.lab.report.charts import WHOLE, Picture, Series, dot_chart, line_chart

Rows = list[Row]
GAP = "ln(perplexity / dense control)"


def _colours(rows: Rows) -> dict[str, int]:
    names = dict.fromkeys(row.variant for row in rows)
    return {name: number for number, name in enumerate(names)}


def _with_gaps(rows: Rows) -> list[tuple[Row, Spread]]:
    """The rows that are drawn, with their gaps."""
    return [(row, row.ranked_gap) for row in rows if row.ranked_gap is not None]


def chart(rows: Rows) -> Picture | None:
    """The gaps over token budgets if a variant has several, else the gap of each row; None without a control."""
    tokens: dict[str, set[int]] = {}
    for row, _ in _with_gaps(rows):
        tokens.setdefault(row.variant, set()).add(row.tokens)
    if not tokens:
        return None
    return _budgets(rows) if any(len(found) > 1 for found in tokens.values()) else _gaps(rows)


def _gaps(rows: Rows) -> Picture:
    """The gap to the dense control: a dot for each seed, a bar at their mean and a band of a standard deviation."""
    shown = sorted(_with_gaps(rows), key=lambda each: each[1].mean)
    means, colours = [gap.mean for _, gap in shown], _colours(rows)
    dots = [(row.variant, gap.values, colours[row.variant]) for row, gap in shown]
    svg = dot_chart(dots, x_label=GAP, log_x=min(means) > 0 and max(means) > 10 * min(means))
    return Picture(
        "Gap to the dense control",
        svg,
        "A dot for each seed, a bar at their mean, a band of one standard deviation over the seeds. Left is better. A "
        'seed moves all rows together, so bands may overlap where every seed agrees: the column "behind the best" '
        "compares seed by seed.",
        wide=True,
    )


def _budgets(rows: Rows) -> Picture:
    """The gap to the control of the same token budget against the budget, a line per variant."""
    colours = _colours(rows)
    shown = _with_gaps(rows)
    names = dict.fromkeys(row.variant for row, _ in shown if row.tokens)
    lines = []
    for name in names:
        of_name = [(row.tokens, gap) for row, gap in shown if row.variant == name]
        points = [(tokens, gap.mean) for tokens, gap in of_name]
        lines.append(Series(name, points, colours[name], marks=True, spread=[gap.std or 0.0 for _, gap in of_name]))
    levels = {row.variant: gap.mean for row, gap in shown if not row.tokens}
    values = [y for line in lines for _, y in line.points] + [*levels.values()]
    svg = line_chart(
        lines,
        x_label="training tokens",
        y_label=GAP,
        levels=levels,
        log_x=True,
        log_y=min(values) > 0,
        width=WHOLE,
        height=360,
    )
    caption = (
        "Means over seeds, with a band of one standard deviation. Dotted: one-shot methods, against the control of the "
        "largest budget."
    )
    return Picture("Gap over token budgets", svg, caption, wide=True)
