"""The HTML page of a run: its verdict in one sentence, then the charts, a sample of text and the settings."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.files.atomic_file import atomic_write_text
from castlm.files.output import record_file
from castlm.files.reading import read_bytes
from castlm.methods.table import METHODS, is_control
from castlm.report import run_charts
from castlm.report.charts import can_draw, render, short
from castlm.report.run_charts import RunData
from castlm.training.config import TrainConfig
from castlm.training.record import CLOSE_FACTOR, final_perplexity, problem, verdict

REFRESH_SECONDS = 10
_MARKS = b'<meta name="generator" content="castlm">', b'<div class="eyebrow">castlm '
"""Markers of pages that castlm wrote: each has one of these."""
GLOSSARY = (
    ("Perplexity", "exp of the mean cross-entropy per token on the held-out text. Lower is better."),
    ("Before the prune", "The model during training: masked weights may still be nonzero."),
    ("After the prune", "Every masked weight is set to zero, as in the written model."),
    ("Gap to the dense model", "ln(perplexity / perplexity of the dense model) in nats per token. 0 means no loss."),
    ("One-shot start", "The pruned model before step 0: what pruning gives without training."),
    ("Recovered", "The share of the gap between the one-shot start and the dense model that training closed."),
    ("Kept, masked", "The two states of a weight. An n:m mask keeps n of every m consecutive weights."),
    ("Flip", "An entry of a mask that a refresh changes, from kept to masked or back."),
    (
        "KL to the teacher",
        "Distance of the predictions from the predictions of the dense model, which is the teacher.",
    ),
)


def run_page(run: RunData, sample: dict[str, Any] | None = None, *, refresh: bool = False) -> str:
    """The page of a run as HTML.

    Args:
        sample: as `castlm.report.sample.write_sample` returns it.
        refresh: whether a browser loads the page again every few seconds until the run ends.
    """
    config, total = run.config, int(run.config.get("max_steps", 0))
    changed, defaults = _settings(config)
    return render(
        "run.html.jinja",
        title=f"{_short_name(config.get('model'))}, {_pattern(run)}",
        eyebrow=_eyebrow(run),
        verdict=_verdict(run),
        progress=None if run.is_finished or not total else run.step / total,
        refresh=REFRESH_SECONDS if refresh and not run.is_finished else None,
        tiles=_tiles(run),
        sections=_sections(run) if can_draw() else [],
        sample=sample,
        changed=changed,
        defaults=defaults,
        measured=_measured(run),
        glossary=GLOSSARY,
    )


def _sections(run: RunData) -> list[dict[str, Any]]:
    """The charts under their headings; a section without charts is left out of the page."""
    return [
        {"title": "Quality", "pictures": run_charts.perplexity(run) + run_charts.loss(run)},
        {"title": "Masks", "pictures": run_charts.masks(run), "text": _masks_text(run)},
        {"title": "Layers", "pictures": run_charts.layers(run)},
    ]


def write_run_page(run: RunData, sample: dict[str, Any] | None = None, *, refresh: bool = False) -> Path:
    """Writes report.html into the folder of the run and returns its path.

    Raises:
        InputError: the files of the run hold values that castlm does not write, castlm did not write report.html, or
            the disk is full.
    """
    file = run.folder / "report.html"
    if file.exists() and not any(mark in read_bytes(file) for mark in _MARKS):
        raise InputError(f"{file} is not a page of castlm: move it away")
    try:
        page = run_page(run, sample, refresh=refresh)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"the files of {run.folder} hold values that castlm does not write ({reason})") from error
    atomic_write_text(file, page.encode("utf-8", "backslashreplace").decode())
    record_file(file)
    return file


def _short_name(model: Any) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def _pattern(run: RunData) -> str:
    return "the dense control" if is_control(run.config.get("method")) else f"{run.config.get('pattern')} sparse"


def _eyebrow(run: RunData) -> str:
    record = run.record or {}
    parts = ["castlm train", f"method {run.config.get('method')}", _start(run.config)]
    parts += [
        f"{name} {version}" for name, version in (record.get("versions") or {}).items() if name in ("castlm", "torch")
    ]
    return " · ".join(part for part in parts if part)


def _start(config: dict[str, Any]) -> str:
    start, method = config.get("init_from"), METHODS.get(str(config.get("method")))
    return f"start {_short_name(start)}" if start and not (method and method.starts_dense) else ""


def _verdict(run: RunData) -> dict[str, str]:
    known = run.perplexity
    if not known:
        return {"kind": "running", "badge": "running", "sentence": "The first evaluation is not done yet."}
    found = (run.record or {}).get("verdict") or verdict(known)
    if not run.is_finished:
        sentence = f"Step {run.step:,} of {run.config.get('max_steps', 0):,}. So far: {_sentence(run, found)}"
        return {"kind": "running" if found["ok"] else "bad", "badge": "running", "sentence": sentence}
    kind = "bad" if not found["ok"] else "good" if _is_close(known) else "done"
    return {"kind": kind, "badge": problem(found) or "done", "sentence": _sentence(run, found)}


def _is_close(known: Mapping[str, float]) -> bool:
    """Whether the result is close to the dense model, or there is no dense model to compare with."""
    final, dense = final_perplexity(known), known.get("dense")
    return dense is None or (final is not None and final <= CLOSE_FACTOR * dense)


def _sentence(run: RunData, found: dict[str, Any]) -> str:
    known = run.perplexity
    final, dense, one_shot = final_perplexity(known), known.get("dense"), known.get("one_shot")
    if not found["ok"] or final is None or dense is None:
        return f"{found['reason']}."
    if is_control(run.config.get("method")):
        return f"Perplexity {final:.3f} after the same training without sparsity; {dense:.3f} before."
    pattern = run.config.get("pattern")
    sentence = f"Perplexity {final:.3f} at {pattern}, {final / dense:.2f} times the dense model's {dense:.3f}"
    recovered = _recovered(final, dense, one_shot)
    if recovered is not None:
        sentence += f"; training recovered {recovered:.0%} of what one-shot pruning lost"
    return f"{sentence}."


def _recovered(final: float, dense: float, one_shot: float | None) -> float | None:
    """The share of the logarithmic gap between the one-shot start and the dense model that training closed."""
    if one_shot is None or one_shot <= dense:
        return None
    return math.log(one_shot / final) / math.log(one_shot / dense)


def _tiles(run: RunData) -> list[dict[str, str]]:
    known, record = run.perplexity, run.record or {}
    final, dense, one_shot = final_perplexity(known), known.get("dense"), known.get("one_shot")
    tokens = record.get("train_tokens") or (run.rows[-1].get("tokens", 0) if run.rows else 0)
    speeds = [value for _, value in run.series("tokens_per_s")]
    memory = record.get("peak_memory_bytes") or max((v for _, v in run.series("peak_memory_bytes")), default=None)
    seconds = record.get("train_seconds")
    gap = math.log(final / dense) if final and dense and math.isfinite(final) else None
    tiles = [
        ("perplexity after the prune" if "trained" not in known else "perplexity", final, "{:,.3f}"),
        ("dense model", dense, "{:,.3f}"),
        ("one-shot start", one_shot, "{:,.3f}"),
        ("before fine-tuning", known.get("start"), "{:,.3f}"),
        ("gap to dense, nats per token", gap, "{:+.3f}"),
        ("training tokens", short(tokens) if tokens else None, "{}"),
        ("tokens per second, median", statistics.median(speeds) if speeds else None, "{:,.0f}"),
        ("training time", None if seconds is None else _duration(seconds), "{}"),
        ("peak memory", None if memory is None else memory / 2**30, "{:.2f} GiB"),
    ]
    return [{"label": label, "value": form.format(value)} for label, value, form in tiles if value is not None]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _masks_text(run: RunData) -> str:
    """A note instead of the chart of flips if the masks never changed."""
    flips = [value for key in ("flip_rate", "initial_flip_rate") for _, value in run.series(key)]
    return "The masks did not change during this run." if flips and not any(flips) else ""


def _settings(config: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names and values of the settings that differ from the defaults, then of the others."""
    defaults: dict[str, Any] = {}
    for field in (field for section in TrainConfig.sections().values() for field in dataclasses.fields(section)):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    changed: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    for name, value in config.items():
        is_default = name in defaults and _plain(defaults[name]) == _plain(value)
        (same if is_default else changed).append((name, _text(value)))
    return changed, same


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Pattern) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(_plain(value))


def _measured(run: RunData) -> list[tuple[str, str]]:
    record = run.record or {}
    found = {**(record.get("measured") or {}), "machine": record.get("machine"), "ranks": record.get("world_size")}
    found |= {f"version of {name}": version for name, version in (record.get("versions") or {}).items()}
    proof = record.get("proof") or {}
    if proof:
        found["groups counted"] = f"{proof['groups']:,}, {proof['violations']} violations"
    return [(name, _text(value)) for name, value in found.items() if value is not None]
