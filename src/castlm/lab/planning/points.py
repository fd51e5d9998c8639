"""Reads the points of a scaling law: from finished runs, `compare` results, or a CSV of any figures.

All three become the same `Point`, and an error names the file and the line.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.facts import Facts
from castlm.fields import build
from castlm.files.record import command_of
from castlm.progress import note
from castlm_runtime.reading import parse_json, read_text, user_path

_OF_COLUMNS = {"train_tokens": "tokens", "num_params": "params", "dense_perplexity": "dense"}
"""Fields of a point by further names that a column may have."""
OF_TABLE = ("seed", "key")
"""Entries that a comparison adds to castlm.json of a run in its table.json."""

MEASURED_ALIKE = ("seq_len", "stride", "text_sha256", "num_tokens", "tokens")
"""The attributes of `Conditions` that must agree before two perplexities may be compared."""


@dataclass(frozen=True)
class Point:
    """One finished run: its token budget and the perplexity of its pruned model."""

    tokens: float
    """Training tokens (positive)."""
    perplexity: float
    """Perplexity after the final prune (above 1)."""
    params: float | None = None
    """Parameters of the model, if known; a law holds for one size."""
    seed: int | None = None
    method: str | None = None
    harness: str = ""
    """Context length, stride, text and tokens of the evaluation, if known; only equal ones can be compared."""
    pattern: str = ""
    """Sparsity pattern, if known; a law holds for one."""
    base_model: str = ""
    """Name or folder of the dense model that the run started from, if known; a law holds for one."""
    dense: float | None = None
    """Perplexity of that model on the same text, if known: it distinguishes models of the same name."""
    source: str = ""
    """File (and line) it was read from; errors name it."""

    def is_of_the_model_of(self, other: Point) -> bool:
        """Whether both runs started from the same dense model, even under different paths."""
        same_name = self.base_model == other.base_model
        if self.dense is None or other.dense is None:
            return same_name
        return abs(math.log(self.dense / other.dense)) < (1e-2 if same_name else 1e-3)  # bf16 or fp32; rounding


def read_points(paths: Iterable[str | Path], method: str | None = None) -> list[Point]:
    """Reads every point in `paths`, in order. Runs that diverged are left out, with a note for each.

    Args:
        paths: each a run folder, a folder of run folders or of `castlm compare`, a compare result (`.json`: a list of
            records, or an object that has one in `results`; a record is a run's castlm.json or the columns of the CSV)
            or a `.csv` with the columns `tokens,perplexity[,params][,seed][,method]`, and `pattern`, `base_model`
            and `dense_perplexity` to tell what does not mix (others are ignored, and lines that start with `#`).
        method: keep only the points of this method.

    Raises:
        InputError: a path is missing or unreadable, a path or run is given twice, a field is missing or not a number
            (the message names file and line), or no point is left.
    """
    points: list[Point] = []
    given: dict[str, int] = {}
    runs: dict[str, str] = {}
    for number, path in enumerate(paths):
        folder, files = user_path(path), [user_path(path)]
        if folder.is_dir():
            tables = [file for file in sorted(folder.glob("**/table.json")) if command_of(file.parent) == "compare"]
            compared = {file.parent for file in tables}  # their tables omit trials of learning rates
            runs_in = [file for file in sorted(folder.glob("**/castlm.json")) if compared.isdisjoint(file.parents)]
            files = runs_in + tables
        for file in files:
            if given.setdefault(os.path.realpath(file), number) != number:
                raise InputError(f"{file} is given twice, and would count as two runs: name it once")
            points += _read_csv(file) if file.suffix == ".csv" else _read_json(file, runs)
    found = sorted({point.method or "(none)" for point in points})
    points = [point for point in points if method in (None, point.method)]
    if not points:
        of_method = f" of method {method} (found: {', '.join(found)})" if found else ""
        raise InputError(
            f"no points{of_method} to fit: name folders of finished runs (with castlm.json) that did not diverge, "
            "compare results (.json), or a CSV with tokens,perplexity"
        )
    return points


def _read_json(path: Path, runs: dict[str, str]) -> Iterator[Point]:
    """The points of a file of records; adds its runs to `runs`, the sources by `run_id`."""
    content = parse_json(read_text(path), path)
    records = content.get("results", [content]) if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: a run's castlm.json or a list of results was expected")
    for number, record in enumerate(records, 1):
        source = str(path) if len(records) == 1 else f"{path}, result {number}"
        if "schema_version" not in record:
            yield _point(record, source)  # the columns of the CSV
            continue
        facts = Facts.from_json({name: value for name, value in record.items() if name not in OF_TABLE}, source)
        if (run := facts.run_id) is not None and (other := runs.setdefault(run, source)) != source:
            raise InputError(f"{source} is the same run as {other}, and would count as two: name it once")
        if facts.verdict is not None and facts.verdict.outcome == "diverged":
            note(f"{source} is left out of the law, because the run diverged: {facts.verdict.reason}")
            continue
        yield _point(_columns_of(facts), source)


def _columns_of(facts: Facts) -> dict[str, Any]:
    """The facts of a run by the names of the CSV."""
    known = {name: getattr(facts.measured, name, None) for name in MEASURED_ALIKE}
    return {
        "tokens": facts.train_tokens,
        "perplexity": facts.perplexity.final,
        "params": facts.num_params,
        "seed": (facts.config or {}).get("seed", 0),
        "method": facts.method,
        "harness": ", ".join(f"{name} {str(value)[:12]}" for name, value in known.items() if value is not None),
        "pattern": facts.pattern,
        "base_model": facts.base_model,
        "dense": facts.perplexity.dense,
    }


def _read_csv(path: Path) -> Iterator[Point]:
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    lines = [(number, line) for number, line in lines if not line.startswith("#")]
    rows = csv.DictReader((line for _, line in lines), skipinitialspace=True)
    columns = [name.strip() for name in rows.fieldnames or ()]
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        raise InputError(f"{path} has the column {twice[0]} twice: rename one")
    for (number, _), row in zip(lines[1:], rows):
        source = f"{path}, line {number}"
        if None in row or None in row.values():  # a decimal comma would pass as two cells
            raise InputError(f"{source}: its number of cells is not the header's: write decimal points, not commas")
        yield _point({name.strip(): value for name, value in row.items()}, source)


def _point(record: dict[str, Any], source: str) -> Point:
    named = {_OF_COLUMNS.get(name, name): value for name, value in record.items()}
    known = {field.name for field in fields(Point)} - {"source"}
    values = {name: value for name, value in named.items() if name in known and value not in (None, "")}
    return build(Point, {**values, "source": source}, source)
