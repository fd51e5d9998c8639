"""Compares finished results: perplexity from their records, bytes and decoding speed measured here.

`castlm advise MODEL --results RUN ...` uses it to recommend a pattern at equal perplexity. All models run in bf16 on
castlm's CPU kernels (dense layers on the kernels for those), so that only the pattern differs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.export.folder import recorded_pattern
from castlm.files.reading import read_json_object
from castlm.hardware import in_own_process
from castlm.models.io import load_model
from castlm.names import aligned
from castlm.runtime.decode import TokenTimes, greedy
from castlm.runtime.layers import pack_model_
from castlm.training.record import MEASURED_ALIKE, final_perplexity

ROUNDS = 2
"""Rounds for each model, each in a new process."""
REPEATS = 2
"""Repetitions of the decoding in a process."""
PROMPT, NEW_TOKENS = 32, 32
SAME = 0.01
"""Relative difference up to which perplexities count as equal: the spread between two seeds of a short run."""

DENSE = "dense"
"""Name of the dense model's row."""


class Candidate(NamedTuple):
    """A model to measure."""

    name: str
    folder: str
    pattern: Pattern | None
    """None for a dense model."""
    perplexity: float
    left_dense: frozenset[str] = frozenset()
    """Layers that are not n:m."""


def candidates(model: str, results: Sequence[str]) -> list[Candidate]:
    """The dense model and finished results of `castlm train` or `castlm finetune`, from the records of the results.

    Raises `InputError` for a folder without a perplexity, or perplexities that cannot be compared.
    """
    found: list[Candidate] = []
    harness: dict[str, Any] = {}
    dense: float | None = None
    for folder in dict.fromkeys(results):
        file = Path(folder) / "castlm.json"
        record = read_json_object(file) if file.is_file() else {}
        perplexities = record.get("perplexity") or {}
        value, own = final_perplexity(perplexities), perplexities.get("dense", dense)
        if value is None or own is None:
            raise InputError(f"{folder}: no castlm.json with its perplexity and the dense model's: name a finished run")
        measured = {key: record.get("measured", {}).get(key) for key in MEASURED_ALIKE}
        harness, dense = harness or measured, own if dense is None else dense
        unlike = [f"{key} {mine}, not {harness[key]}" for key, mine in measured.items() if mine != harness[key]]
        of = str(record.get("base_model", model))
        if of != model and os.path.isdir(model) and os.path.realpath(of) != os.path.realpath(model):
            unlike.append(f"base_model {of}, not {model}")
        if abs(own - dense) > SAME * dense:
            unlike.append(f"a dense model of perplexity {own:.4g}, not {dense:.4g}")
        if unlike:
            raise InputError(f"{file}: has {'; '.join(unlike)}: compare results of one model, text and context")
        run = Path(folder).resolve()
        run = run.parent if run.name == "model" else run
        name = str(run) if run.name in (DENSE, *(other.name for other in found)) else run.name
        left_dense = frozenset(record.get("left_dense") or ())
        found.append(Candidate(name, folder, recorded_pattern(record), float(value), left_dense))
    assert dense is not None
    return [Candidate(DENSE, model, None, float(dense)), *found]


def measure(chosen: Sequence[Candidate], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures the candidates in turns, each time in a new process; returns a row of the report for each.

    `num_bytes` are the bytes of all weights in memory while decoding, `tokens_per_second` the median speed of greedy
    decoding of one sequence.
    """
    speeds: dict[str, list[float]] = {candidate.folder: [] for candidate in chosen}
    sizes: dict[str, int] = {}
    turns = [candidate for _ in range(ROUNDS) for candidate in chosen]
    say(f"decoding {NEW_TOKENS} tokens with {len(chosen)} models, {ROUNDS} turns each")
    started = time.monotonic()
    for done, candidate in enumerate(turns, 1):
        sizes[candidate.folder], found = in_own_process(decode, candidate)
        speeds[candidate.folder] += found
        if done == 1:
            say(f"about {(time.monotonic() - started) * (len(turns) - 1):.0f} s to go")
    return [
        {
            "name": candidate.name,
            "pattern": str(candidate.pattern or DENSE),
            "perplexity": candidate.perplexity,
            "num_bytes": sizes[candidate.folder],
            "tokens_per_second": statistics.median(speeds[candidate.folder]),
        }
        for candidate in chosen
    ]


@torch.inference_mode()
def decode(candidate: Candidate) -> tuple[int, list[float]]:
    """Returns the bytes of the weights on castlm's kernels, and the tokens per second of each repetition, without the
    prompt.
    """
    model = load_model(candidate.folder).model
    nm = candidate.pattern.nm if candidate.pattern else None
    n, m = (nm.n, nm.m) if nm else (0, 0)
    pack_model_(model, n, m, left_dense=candidate.left_dense)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    ids = torch.arange(1, PROMPT + 1)[None] % model.config.get_text_config().vocab_size

    def tokens_per_second() -> float:
        came = TokenTimes()
        greedy(model, ids, NEW_TOKENS + 1, came)
        return came.tokens_per_second

    tokens_per_second()  # warms up
    return sum(tensors.values()), [tokens_per_second() for _ in range(REPEATS)]


def as_dict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of `--json`, best perplexity first.

    Each row names the fastest and the smallest result whose perplexity is at most the row's, within `SAME`.
    """
    found = []
    for row in sorted(rows, key=lambda row: row["perplexity"]):
        as_good = [other for other in rows if other["perplexity"] <= row["perplexity"] * (1 + SAME)]
        fastest = max(as_good, key=lambda other: other["tokens_per_second"])
        smallest = min(as_good, key=lambda other: other["num_bytes"])
        found.append(row | {"fastest": fastest["name"], "smallest": smallest["name"]})
    return {
        "rounds": ROUNDS,
        "repeats": REPEATS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "results": found,
    }


def text(report: Mapping[str, Any]) -> str:
    """The report as text."""
    rows = report["results"]
    dense = next(row for row in rows if row["name"] == DENSE)
    table = [["result", "pattern", "perplexity", "MB", "tokens/s", "of dense", "use it?"]]
    for row in rows:
        speed = row["tokens_per_second"]
        names = {"fastest": row["fastest"], "smallest": row["smallest"]}
        best = " and ".join(what for what, name in names.items() if name == row["name"])
        use = f"yes, the {best} at this perplexity" if best else f"no, use {row['fastest']}"
        figures = [f"{row['perplexity']:.3f}", f"{row['num_bytes'] / 1e6:.1f}", f"{speed:.1f}"]
        table.append([row["name"], row["pattern"], *figures, f"{speed / dense['tokens_per_second']:.2f}x", use])
    return "\n".join(aligned(table))
