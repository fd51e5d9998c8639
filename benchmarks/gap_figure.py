"""Draws the gaps to the dense control that a table of docs/results states, so that figure and table say the same.

    python -m benchmarks.gap_figure PAGE.md --tokens-per-step N --plot O.svg

The table has a column `variant` and one for each number of steps, `100 steps`, whose cells end in the gap in brackets:
`10.324 ± 0.251 (+0.570)`. A row with gaps at two numbers of steps or more becomes a line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_text
from castlm.lab.compare.plots import gap_chart
from castlm.lab.report.charts import Series

_STEPS = re.compile(r"([\d,]+) steps")
_GAP = re.compile(r"\(([+-]\d\.\d+)\)$")


def read_gaps(page: str) -> dict[str, dict[int, float]]:
    """The gaps of the first such table in a Markdown text, by number of steps, of the variants that become lines.

    Raises:
        InputError: there is no such table, or no variant has gaps at two numbers of steps.
    """
    lines = iter(page.splitlines())
    header = next((cells for line in lines if (cells := _cells(line))[:1] == ["variant"]), [])
    steps = [int(found[1].replace(",", "")) if (found := _STEPS.fullmatch(cell)) else None for cell in header]
    gaps: dict[str, dict[int, float]] = {}
    for line in lines:
        cells = _cells(line)
        if not cells:
            break
        row = {at: float(found[1]) for at, cell in zip(steps, cells) if at and (found := _GAP.search(cell))}
        if len(row) > 1:
            gaps[cells[0]] = row
    if not gaps:
        raise InputError("the page has no table with a column `variant`, columns of steps, and two gaps as (+0.570)")
    return gaps


def _cells(line: str) -> list[str]:
    """The cells of a row of a table, without bold and code marks; empty where the line is none."""
    return [cell.strip().replace("**", "").replace("`", "") for cell in line.strip().split("|")[1:-1]]


def draw(gaps: dict[str, dict[int, float]], tokens_per_step: int) -> str:
    """An SVG file: the gap over training tokens, a line for each variant. A comment in it holds the gaps as JSON."""
    lines = [
        Series(name, [(steps * tokens_per_step, gap) for steps, gap in sorted(row.items())], index, marks=True)
        for index, (name, row) in enumerate(gaps.items())
    ]
    head, svg = gap_chart(lines).split("<svg", 1)
    return f"{head}<!-- {json.dumps(gaps)} -->\n<svg{svg}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gap_figure", description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, help="Markdown page with the table")
    parser.add_argument("--tokens-per-step", type=int, required=True)
    parser.add_argument("--plot", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args(arguments)
    try:
        gaps = read_gaps(options.page.read_text(encoding="utf-8"))
        atomic_write_text(options.plot, draw(gaps, options.tokens_per_step))
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
