"""Reads a run's metrics.jsonl, which `castlm.training.telemetry` writes and which planning reads without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import read_text, user_path

HISTOGRAM_EDGES = tuple(10 ** (quarter / 4) for quarter in range(-48, 5))
"""Edges of the bins of a `masked_histogram`: 1e-12 to 10, four bins to a decade."""


_NUMBERS = {"step", "tokens", "loss", "perplexity", "prune_now_ppl", "dense_ppl", "alpha"}
"""What readers compute with."""


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`, in file order. Figures that were not finite, which are null there, are inf.

    Args:
        run: the folder of the run, or the file. A last line cut short by a kill is dropped.

    Raises:
        InputError: the file cannot be read, or another line is malformed (with its number).
    """
    path = user_path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = read_text(path).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            reason = getattr(error, "msg", "nested too deeply")
            raise InputError(f"{path}, line {number}: not a JSON object ({reason})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object was expected, found {type(row).__name__}")
        for name in {"step"} | _NUMBERS & row.keys():
            value = row.get(name)
            is_unknown = value is None and name != "step"  # a figure that was not finite
            if not is_unknown and (type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63)):
                shown = repr(value)[:40]
                raise InputError(f"{path}, line {number}: {name} is {shown}, a number was expected")
        rows.append({name: math.inf if value is None else value for name, value in row.items()})
    return rows


def read_series(run: str | Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have `key`; empty where the run has no metrics.jsonl.

    Raises:
        InputError: as `read_metrics`.
    """
    if not (Path(run) / "metrics.jsonl").is_file():
        return []
    return [(row["step"], row[key]) for row in read_metrics(run) if key in row]
