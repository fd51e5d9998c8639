"""Reads the points of a scaling law: from finished runs, `compare` results, or a CSV of any figures.

All three become the same `Point`, and an error names the file and the line.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import parse_json, read_text, user_path
from castlm.files.record import command_of
from castlm.progress import note
from castlm.training.record import MEASURED_ALIKE, final_perplexity, problem

# The first name of each pair is a CSV column's, the second what a run's castlm.json calls the same thing.
_TOKENS = ("tokens", "train_tokens")
_PARAMS = ("params", "num_params")
_COLUMNS = ("tokens", "perplexity", "params", "seed", "method", "pattern", "base_model", "dense_perplexity")
"""Columns of a CSV that are read; others are ignored."""

MAX_POINTS = 2_000
"""More rows are refused: the bootstrap refits every point 200 times, and nobody has that many runs."""


@dataclass(frozen=True)
class Point:
    """One finished run: its token budget and the perplexity of its pruned model."""

    tokens: float
    """Training tokens (positive)."""
    perplexity: float
    """Perplexity after the final prune (above 1)."""
    params: float | None = None
    """Parameters of the model; only the joint form needs it."""
    seed: int | None = None
    method: str | None = None
    harness: str = ""
    """Context length, stride, text and tokens of the evaluation, if known; only equal ones can be compared."""
    pattern: str = ""
    """Sparsity pattern, if known; a law holds for one."""
    base_model: str = ""
    """Name or folder of the dense model that the run started from, if known; a law holds for one."""
    dense: float | None = None
    """Perplexity of that model on the same text, if known: it tells models of one name apart."""
    source: str = ""
    """File (and line) it was read from; errors name it."""

    def is_of_the_model_of(self, other: Point) -> bool:
        """Whether both runs started from the same dense model, even under different paths."""
        same_name = self.base_model == other.base_model
        if self.dense is None or other.dense is None:
            return same_name
        return abs(math.log(self.dense / other.dense)) < (1e-2 if same_name else 1e-3)  # bf16 or fp32; rounding


def read_points(paths: Iterable[str | Path], method: str | None = None) -> list[Point]:
    """Read every point in `paths`, in order. Runs that diverged are left out, with a note for each.

    Args:
        paths: each a run folder, a folder of run folders or of `castlm compare`, a compare result (`.json`: a list of
            records, or an object that has one in `results`; a record is a run's castlm.json or the columns of the CSV)
            or a `.csv` with the columns `tokens,perplexity[,params][,seed][,method]`, and `pattern`, `base_model`
            and `dense_perplexity` to tell what does not mix (others are ignored, and lines that start with `#`).
        method: keep only the points of this method.

    Raises:
        InputError: a path is missing or unreadable, a path or run is given twice, a field is missing or not a positive
            number (the message names file and line), there are more than `MAX_POINTS` points, or none is left.
    """
    points: list[Point] = []
    given: dict[str, int] = {}
    runs: dict[str, str] = {}
    for number, path in enumerate(paths):
        for file in _files(user_path(path)):
            if given.setdefault(os.path.realpath(file), number) != number:
                raise InputError(f"{file} is given twice, and would count as two runs: name it once")
            points += _read_csv(file) if file.suffix == ".csv" else _read_json(file, runs)
    if method is not None:
        found = sorted({point.method or "(none)" for point in points})
        points = [point for point in points if point.method == method]
        if not points:
            raise InputError(f"no point has method {method!r}; found: {', '.join(found) or 'no points at all'}")
    _check_count(len(points), "the files")
    if not points:
        raise InputError(
            "no points to fit: name run folders or compare results (.json) with runs that did not diverge, or a CSV "
            "with tokens,perplexity"
        )
    return points


def _check_count(count: int, source: object) -> None:
    if count > MAX_POINTS:
        raise InputError(f"{source} hold {count:,} points, and a law is fitted to at most {MAX_POINTS:,}: give fewer")


def _files(path: Path) -> list[Path]:
    """The files with points at a path."""
    if path.is_dir():
        return _finished_runs(path)
    if path.suffix in (".csv", ".json"):
        return [path]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give run folders, compare results (.json) or a .csv")
    raise InputError(f"{path}: neither a run folder, nor a .json, nor a .csv")


def _finished_runs(folder: Path) -> list[Path]:
    tables = [file for file in sorted(folder.glob("**/table.json")) if command_of(file.parent) == "compare"]
    compared = {file.parent for file in tables}  # their tables omit trials of learning rates
    finished = [file for file in sorted(folder.glob("**/castlm.json")) if compared.isdisjoint(file.parents)] + tables
    if not finished and (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder}: an unfinished run (no castlm.json): resume it")
    if not finished:
        raise InputError(f"{folder}: no finished run in it (no castlm.json)")
    return finished


def _read_json(path: Path, runs: dict[str, str]) -> list[Point]:
    """The points of a file of records.

    Args:
        runs: the sources of the runs read so far, by `run_id`; adds this file's.
    """
    content = parse_json(read_text(path), path)
    if isinstance(content, dict):
        content = content.get("results", [content])
    if content == []:
        raise InputError(f"{path}: no run of this comparison is finished")
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{path}: a run's castlm.json or a list of results was expected")
    _check_count(len(content), path)
    points = []
    for number, record in enumerate(content, 1):
        source = str(path) if len(content) == 1 else f"{path}, result {number}"
        if (run := record.get("run_id")) is not None and (other := runs.setdefault(str(run), source)) != source:
            raise InputError(f"{source} is the same run as {other}, and would count as two: name it once")
        found = record.get("verdict")
        if isinstance(found, dict) and problem(found) == "diverged":
            note(f"{source} is left out of the law, because the run diverged: {found.get('reason')}")
        else:
            points.append(_point(_flat(record), source))
    return points


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a record of `castlm train` to the names of the CSV, with the perplexity of the pruned model."""
    flat = {key: value for key, value in record.items() if value is not None}
    if isinstance(flat.get("config"), dict):
        flat.setdefault("seed", flat["config"].get("seed", 0))
    if isinstance(flat.get("measured"), dict):
        flat["harness"] = ", ".join(f"{key} {str(flat['measured'].get(key))[:12]}" for key in MEASURED_ALIKE)
    if isinstance(ppl := flat.get("perplexity"), dict):  # the dense control is not pruned and has `trained` instead
        flat |= {"perplexity": final_perplexity(ppl), "dense_perplexity": ppl.get("dense")}
    return {key: value for key, value in flat.items() if value is not None}


def _read_csv(path: Path) -> list[Point]:
    lines = read_text(path).splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    _check_count(len(numbered) - 1, path)
    if not numbered:
        raise InputError(f"{path}: empty; a header `tokens,perplexity[,params][,seed][,method]` was expected")
    header = _cells(*numbered[0], path)
    if missing := [name for name in ("tokens", "perplexity") if name not in header]:
        raise InputError(f"{path}, line {numbered[0][0]}: no column {' or '.join(missing)} in {','.join(header)}")
    if twice := next((name for name in _COLUMNS if header.count(name) > 1), None):
        raise InputError(f"{path}, line {numbered[0][0]}: column {twice} appears more than once: keep one of them")
    points = []
    for number, line in numbered[1:]:
        cells = _cells(number, line, path)
        if len(cells) != len(header):
            raise InputError(f"{path}, line {number}: {len(cells)} cells where the header has {len(header)}")
        points.append(_point({k: v for k, v in zip(header, cells) if v}, f"{path}, line {number}"))
    return points


def _cells(number: int, line: str, path: Path) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))]
    except csv.Error as error:
        raise InputError(f"{path}, line {number}: not CSV ({error})") from error


def _point(record: Mapping[str, Any], source: str) -> Point:
    tokens, perplexity = _number(record, _TOKENS, source), _number(record, ("perplexity",), source)
    if tokens is None or perplexity is None:
        name = "tokens" if tokens is None else "perplexity"
        raise InputError(f"{source}: no {name} in it; is it the result of a finished run?")
    if perplexity <= 1:
        raise InputError(f"{source}: perplexity {perplexity:g} is not above 1: is it a perplexity?")
    seed = _number(record, ("seed",), source, positive=False)
    method = record.get("method")
    return Point(
        tokens=tokens,
        perplexity=perplexity,
        params=_number(record, _PARAMS, source),
        seed=None if seed is None else int(seed),
        method=None if method is None else str(method),
        harness=str(record.get("harness", "")),
        pattern=str(record.get("pattern", "")),
        base_model=str(record.get("base_model", "")),
        dense=_number(record, ("dense_perplexity",), source),
        source=source,
    )


def _number(record: Mapping[str, Any], names: tuple[str, ...], source: str, positive: bool = True) -> float | None:
    name = next((name for name in names if name in record), None)
    if name is None:
        return None
    try:
        value = math.nan if isinstance(record[name], bool) else float(record[name])
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{source}: {name} is {record[name]!r}, a number was expected") from None
    if not math.isfinite(value) or (positive and value <= 0):
        raise InputError(
            f"{source}: {name} is {value:g}, a {'positive ' if positive else ''}finite number was expected"
        )
    return value
