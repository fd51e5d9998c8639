"""The rows of metrics.jsonl and the verdict on a run, which reports and planning read without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.facts import Perplexities, Verdict
from castlm.files.reading import read_text, user_path

HISTOGRAM_EDGES = tuple(10 ** (quarter / 4) for quarter in range(-48, 5))
"""Edges of the bins of a `masked_histogram`: 1e-12 to 10, four bins to a decade."""


_FIGURES = ("tokens", "loss", "perplexity", "prune_now_ppl", "dense_ppl", "alpha")
"""The figures that readers compute with."""


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`, in file order. Null, which stands for a figure that was not finite, is inf.

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
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            row = None
        figures: list[Any] = [None]
        if isinstance(row, dict):
            figures = [row.get("step"), *(row[name] for name in _FIGURES if row.get(name) is not None)]
        if not all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in figures):
            raise InputError(f"{path}, line {number} is not a row that castlm writes: {line[:60]!r}")
        rows.append({name: math.inf if value is None else value for name, value in row.items()})
    return rows


def read_series(run: str | Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have `key`; empty where the run has no metrics.jsonl."""
    if not (Path(run) / "metrics.jsonl").is_file():
        return []
    return [(row["step"], row[key]) for row in read_metrics(run) if key in row]


FAR_FACTOR = 10.0
"""A result whose perplexity is more than this many times the dense model's fell short, even if it improved."""
CLOSE_FACTOR = 2.0
"""A result within this many times the dense model's perplexity is shown as good, in green."""
RISE_FACTOR = 2.0
"""A result that fell short without having had a sparse start diverged if it is above this many times the run's own
lowest perplexity."""

_DIVERGED = {"problem": "DIVERGED", "remedy": "lower learning_rate"}
_FELL_SHORT = {"problem": "FELL SHORT", "remedy": "train for more steps"}

MEASURED_ALIKE = ("seq_len", "stride", "text_sha256", "num_tokens", "tokens")
"""The attributes of `Conditions` that must agree before two perplexities may be compared."""


def verdict(perplexities: Perplexities, earlier: Iterable[float] = ()) -> Verdict:
    """Whether training improved the model, and why.

    Args:
        perplexities: those of a run: `pruned` (`trained` for the dense control), `dense` and `one_shot` if they were
            measured, and `start` for a fine-tuning run.
        earlier: perplexities since the model became sparse, for a run that becomes sparse during training.

    Returns:
        The verdict. `ok` is False if the run diverged (its perplexity is not finite, or above its start: the one-shot
        start, or the model before fine-tuning), or if it ended above ten times the perplexity of the dense model. Then
        `problem` and `remedy` name the problem and the help. A run without a start that ended far from the dense model
        diverged if it is the dense control, or above twice the lowest of `earlier`; otherwise it fell short.

    Examples:
        >>> verdict(Perplexities(dense=6.0, one_shot=14.0, pruned=8.0)).reason
        'perplexity 8.000, below the one-shot start (14.000), 1.33 times the dense model (6.000)'
        >>> verdict(Perplexities(dense=6.0, one_shot=14.0, pruned=15.0)).ok
        False
    """
    found = perplexities.final
    dense, one_shot = perplexities.dense, perplexities.one_shot
    if found is None or not math.isfinite(found):
        return Verdict(ok=False, reason=f"the perplexity is {found}", **_DIVERGED)
    parts, ok = [f"perplexity {found:,.3f}"], True
    if (start := perplexities.start) is not None:
        ok = found <= start
        parts.append(f"{'below' if ok else 'ABOVE'} the model before fine-tuning ({start:,.3f})")
    if one_shot is not None:
        ok = found <= one_shot
        parts.append(f"{'below' if ok else 'ABOVE'} the one-shot start ({one_shot:,.3f})")
    problem = {} if ok else _DIVERGED
    if dense is not None:
        parts.append(f"{found / dense:.2f} times the dense model ({dense:,.3f})")
        if ok and found > FAR_FACTOR * dense:
            lowest = min(filter(math.isfinite, earlier), default=math.inf)
            ok, problem = False, _FELL_SHORT if perplexities.trained is None else _DIVERGED
            if found > RISE_FACTOR * lowest:
                parts.append(f"{found / lowest:.2f} times the lowest that it had reached ({lowest:,.3f})")
                problem = _DIVERGED
    return Verdict(ok=ok, reason=", ".join(parts), **problem)
