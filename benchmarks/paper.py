"""Writes the tables of docs/paper.md into docs/results/paper.json, from `castlm compare`, with the options of each row.

    python -m benchmarks.paper budgets FOLDER    # FOLDER: the --output-dir of the command on the page

A test resolves the commands of the page and compares their rows and options with those in the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.render import RESULTS
from castlm.training.config import TrainConfig, names_of

FILE = RESULTS / "paper.json"
OPTIONS = (
    *(
        name
        for title in ("method", "start", "teacher", "optimizer")
        for name in names_of(TrainConfig.sections()[title])
    ),
    *("pattern", "seq_len", "cross_document_attention", "precision"),
)
"""The options that a row records: those that can change its figures. The budget is `max_steps`."""

Row = Mapping[str, Any]
Results = list[Mapping[str, Any]]


def figure(row: Row, name: str, digits: int, factor: float = 1.0) -> str | None:
    """A column of `castlm compare`: mean and standard deviation over the seeds."""
    return None if row.get(name) is None else spread([factor * value for value in row[name]["values"]], digits)


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def share_below(results: Results, limit: float) -> str | None:
    """The share of masked weights below `limit` before the prune, over all seeds."""
    below = total = 0
    for found in (result["masked_histogram"] for result in results if result.get("masked_histogram")):
        counts = dict(zip(found["edges"][1:], found["counts"]))
        below += found["zeros"] + sum(count for edge, count in counts.items() if edge <= limit * (1 + 1e-9))
        total += found["zeros"] + sum(found["counts"])
    return f"{100 * below / total:.2f} %" if total else None


def largest(results: Results) -> str | None:
    values = [result["mask"]["largest_masked"] for result in results if result.get("masked_histogram")]
    return spread(values, 2) if values else None


BEFORE: dict[str, Callable[[Row, Results], str | None]] = {
    "before the prune": lambda row, results: None if row["variant"] == "dense" else figure(row, "before_prune", 2),
    "pruned": lambda row, results: figure(row, "pruned", 2),
}
FLIPS: dict[str, Callable[[Row, Results], str | None]] = {
    "flips since step 0, %": lambda row, results: figure(row, "initial_flip_rate", 2, 100),
    "sparse-weight ratio": lambda row, results: figure(row, "sparse_weight_ratio", 4),
}
COLUMNS: dict[str, dict[str, Callable[[Row, Results], str | None]]] = {
    "oscillation": {**BEFORE, "flip rate at the end": lambda row, results: figure(row, "flip_rate", 5), **FLIPS},
    "decay": {
        **BEFORE,
        **FLIPS,
        "masked weights below 1e-4": lambda row, results: share_below(results, 1e-4),
        "largest masked weight": lambda row, results: largest(results),
    },
    "parts": BEFORE,
}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded options of a run."""
    found = {name: config[name] for name in OPTIONS if name != "max_steps"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def table_of(preset: str, folder: Path) -> dict[str, Any]:
    """A table of the page from a finished comparison."""
    found = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    rows: dict[str, list[Any]] = {}
    budgets = sorted({row["budget"] for row in found["rows"]})
    for row in found["rows"]:
        cells = rows.setdefault(row["variant"], [row["variant"]])
        if preset == "budgets":
            cells.append(figure(row, "pruned", 2))
        else:
            results = [result for result in found["results"] if result["method"] == row["variant"]]
            cells += [show(row, results) for show in COLUMNS[preset].values()]
    columns = [f"{budget:,} tokens" for budget in budgets] if preset == "budgets" else list(COLUMNS[preset])
    options = {}
    for result in found["results"]:
        file = next((folder / "runs").glob(f"*-{result['key']}.yaml"))  # the key is a hash of the options
        options[result["method"]] = options_of(yaml.safe_load(file.read_text(encoding="utf-8")))
    common = options[next(iter(rows))]
    own = {name: {key: value for key, value in options[name].items() if value != common[key]} for name in rows}
    return {
        "columns": [{"name": "row"}, *({"name": name} for name in columns)],
        "rows": list(rows.values()),
        "options": {"all": common, **own},
    }


def text_of(tables: Mapping[str, Any]) -> str:
    """The tables as JSON with a line for each column, row and set of options."""

    def lines(items: list[str], indent: str) -> str:
        return ",\n".join(f"{indent}{item}" for item in items)

    parts = []
    for name, table in tables.items():
        fields = []
        for key, value in table.items():
            if isinstance(value, list):
                inside = lines([json.dumps(each, ensure_ascii=False) for each in value], " " * 6)
                fields.append(f'"{key}": [\n{inside}\n    ]')
            else:
                of_each = [f'"{row}": {json.dumps(each, ensure_ascii=False)}' for row, each in value.items()]
                fields.append(f'"{key}": {{\n{lines(of_each, " " * 6)}\n    }}')
        parts.append(f'"{name}": {{\n{lines(fields, " " * 4)}\n  }}')
    return f"{{\n{lines(parts, '  ')}\n}}\n"


def main(arguments: list[str] | None = None) -> int:
    preset, folder = sys.argv[1:] if arguments is None else arguments
    tables = json.loads(FILE.read_text(encoding="utf-8"))
    tables[preset] = table_of(preset, Path(folder))
    FILE.write_text(text_of(tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
