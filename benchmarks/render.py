"""Renders the tables of README and docs from the results in docs/results/*.json, so that a figure has one source.

`castlm advise` reads a copy of sizes.json in the package, which is written with them.

    python -m benchmarks.render            # writes the tables into the pages
    python -m benchmarks.render --check    # names the pages whose tables differ, and exits with 1

A page shows a table between two marks, here the table `formats` of docs/results/frontier.json:

    <!-- results: frontier formats -->
    ...
    <!-- end -->

A third word names a view: some of the rows and columns. A file of results is an object of tables:

    {"formats": {
        "columns": [{"name": "format"}, {"name": "perplexity", "digits": 2}],
        "views": {"short": {"columns": ["format"], "rows": ["dense int4"]}},
        "rows": [["dense int4", 23.05]]}}

A cell is a text, a number, a list of numbers (one for each seed) or null. Columns with `digits` hold numbers. Rows are
named by their first cell.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
TABLE = re.compile(
    r"(?P<begin><!-- results: (?P<file>[\w-]+) (?P<table>[\w-]+)(?: (?P<view>[\w-]+))? -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.S,
)


def packaged() -> tuple[Path, Path]:
    """The results that the package holds a copy of, and the copy."""
    return RESULTS / "sizes.json", ROOT / "src" / "castlm" / "lab" / "advice" / "sizes.json"


def pages() -> list[Path]:
    """The pages that may show results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def cell(value: Any, digits: int | None) -> str:
    """A cell as it is shown: 1402 -> "1,402", [7.1, 7.3] with two digits -> "7.10, 7.30"."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(cell(number, digits) for number in value)
    if isinstance(value, str):
        return value
    return f"{value:,.{digits}f}"


def table(found: dict[str, Any], view: str | None = None) -> str:
    """A table of results in Markdown."""
    columns: list[dict[str, Any]] = found["columns"]
    shown = {"columns": [column["name"] for column in columns]} if view is None else found["views"][view]
    names = [column["name"] for column in columns]
    places = [names.index(name) for name in shown["columns"]]
    rows = {row[0]: row for row in found["rows"]}
    chosen = [rows[name] for name in shown["rows"]] if "rows" in shown else found["rows"]
    assert all(len(row) == len(columns) for row in chosen)
    assert len({*names}) == len(names), f"two columns of one name: {names}"
    lines = [
        [names[place] for place in places],
        ["---:" if "digits" in columns[place] else "---" for place in places],
        *([cell(row[place], columns[place].get("digits")) for place in places] for row in chosen),
    ]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text)


def render(page: str) -> str:
    """A page with its tables as the results have them."""

    def replaced(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match['file']}.json").read_text(encoding="utf-8"))
        return f"{match['begin']}\n{table(results[match['table']], match['view'])}\n\n{match['end']}"

    return TABLE.sub(replaced, page)


def main(arguments: list[str]) -> int:
    """Writes the pages and the copy, or with `--check` names those that differ."""
    differ = []
    results, copy = packaged()
    written = {page: render(page.read_text(encoding="utf-8")) for page in pages()}
    written[copy] = results.read_text(encoding="utf-8")
    for page, rendered in written.items():
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if rendered != text:
            differ.append(page.relative_to(ROOT))
            if "--check" not in arguments:
                page.write_text(rendered, encoding="utf-8")
    print(*differ, sep="\n", end="\n" if differ else "")
    return int("--check" in arguments and bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
