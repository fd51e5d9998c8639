"""The HTML page of a run, finished or not: its verdict in one sentence, the charts, a sample of text and the settings.

It reads the folder of the run: config.yaml, metrics.jsonl and the result's castlm.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError, one_line
from castlm.core.nm import Pattern
from castlm.facts import Facts, Perplexities, Verdict
from castlm.fields import default_of, is_required
from castlm.files.atomic_file import atomic_write_text
from castlm.files.output import record_file
from castlm.files.record import RESULT
from castlm.files.yaml_file import read_yaml_mapping
from castlm.lab.report.charts import HALF, WHOLE, Picture, Series, can_draw, heat_map, line_chart, render, short
from castlm.names import duration
from castlm.training.config import TrainConfig
from castlm.training.telemetry import read_metrics
from castlm.training.verdict import verdict
from castlm_runtime.reading import read_bytes

REFRESH_SECONDS = 10
_MARK = b'<meta name="generator" content="castlm">'
"""A marker in each page that castlm writes."""


@dataclass(frozen=True)
class RunData:
    """The content of a run's files."""

    folder: Path
    config: TrainConfig
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    facts: Facts | None
    """The content of castlm.json; None while the run is not finished."""

    @property
    def is_finished(self) -> bool:
        return self.facts is not None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations, the first of them before step 1."""
        return [row for row in self.rows if "perplexity" in row]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of optimizer steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def step(self) -> int:
        """The last step that was written."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def perplexity(self) -> Perplexities:
        """The perplexities in castlm.json; of a run that is not finished, by its evaluations so far."""
        if self.facts is not None:
            return self.facts.perplexity
        if not self.evaluations:
            return Perplexities()
        first, last = self.evaluations[0], self.evaluations[-1]
        if self.config.is_finetuning:
            return Perplexities(start=first.get("prune_now_ppl"), pruned=last.get("prune_now_ppl"))
        return Perplexities(
            dense=first.get("dense_ppl", first["perplexity"]),
            one_shot=first.get("prune_now_ppl"),
            before_prune=last["perplexity"],
            pruned=last.get("prune_now_ppl"),
        )

    def series(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of all rows that have `key`."""
        return [(row["tokens"], row[key]) for row in self.rows if key in row and "tokens" in row]


def read_run(path: str | Path) -> RunData:
    """Reads the folder of a run of `castlm train`, or its `model` folder. Raises `InputError` if it holds no run."""
    folder = Path(path)
    if not (folder / "metrics.jsonl").is_file() and (folder.parent / "metrics.jsonl").is_file():
        folder = folder.parent
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise InputError(f"{path} holds no run: give the output_dir of castlm train")
    model = folder / "model"
    facts = Facts.read(model) if (model / RESULT).exists() else None
    config = TrainConfig.from_mapping(read_yaml_mapping(folder / "config.yaml"), str(folder / "config.yaml"))
    return RunData(folder, config, read_metrics(folder), facts)


def run_page(run: RunData, sample: dict[str, Any] | None = None, *, refresh: bool = False) -> str:
    """The page of a run as HTML, with a `sample` that `castlm.lab.report.sample.write_sample` made.

    With `refresh`, a browser loads the page again every few seconds until the run ends.
    """
    facts, method, pattern = run.facts, run.config.method, run.config.model.pattern
    eyebrow = ["castlm train", f"method {method.method}"]
    if method.row.step0 != "dense":
        eyebrow.append(f"start {_short_name(run.config.start.init_from)}")
    versions = (facts.versions if facts else None) or {}
    eyebrow += [f"{name} {version}" for name, version in versions.items() if name in ("castlm", "torch")]
    flips = [value for key in ("flip_rate", "initial_flip_rate") for _, value in run.series(key)]
    never_changed = "The masks did not change during this run." if flips and not any(flips) else ""
    sections = []  # one without charts is left out of the page
    if can_draw():
        sections = [
            {"title": "Quality", "pictures": _perplexity(run) + _loss(run)},
            {"title": "Masks", "pictures": _masks(run), "text": never_changed},
            {"title": "Layers", "pictures": _layers(run)},
        ]
    measured: dict[str, Any] = {}
    if facts is not None:
        measured = vars(facts.measured) if facts.measured else {}
        measured = measured | {"machine": facts.machine, "ranks": facts.world_size}
        if proof := facts.proof:
            measured["groups counted"] = f"{proof.groups:,}, {proof.violations} violations"
    measured |= {f"version of {name}": version for name, version in versions.items()}
    options = [field for section in run.config.sections().values() for field in dataclasses.fields(section)]
    changed, defaults = _settings(run.config.given, options)
    return render(
        title=f"{_short_name(run.config.model.model)}, "
        + (f"{pattern} sparse" if method.row.is_sparse else "the dense control"),
        eyebrow=" · ".join(eyebrow),
        verdict=_verdict(run),
        progress=None if run.is_finished else run.step / run.config.optimizer.max_steps,
        refresh=REFRESH_SECONDS if refresh and not run.is_finished else None,
        headline=_headline(run),
        sections=sections,
        sample=sample,
        changed=changed,
        defaults=defaults,
        measured=[(name, _text(value)) for name, value in measured.items() if value is not None],
    )


def write_run_page(run: RunData, sample: dict[str, Any] | None = None, *, refresh: bool = False) -> Path:
    """Writes report.html into the folder of the run and returns its path.

    Raises `InputError` if castlm did not write report.html, or not the values in the files of the run.
    """
    file = run.folder / "report.html"
    if file.exists() and _MARK not in read_bytes(file):
        raise InputError(f"{file} is not a page of castlm: move it away")
    try:
        page = run_page(run, sample, refresh=refresh)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"the files of {run.folder} hold values that castlm does not write ({reason})") from error
    atomic_write_text(file, page.encode("utf-8", "backslashreplace").decode())
    record_file(file)
    return file


def _short_name(model: Any) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def _verdict(run: RunData) -> dict[str, str]:
    known = run.perplexity
    if not known.known():
        return {"kind": "running", "badge": "running", "sentence": "The first evaluation is not done yet."}
    judged = (run.facts.verdict if run.facts else None) or verdict(known)
    if not run.is_finished:
        sentence = f"Step {run.step:,} of {run.config.optimizer.max_steps:,}. So far: {_sentence(run, judged)}"
        return {"kind": "running" if judged.ok else "bad", "badge": "running", "sentence": sentence}
    return {
        "kind": "good" if judged.ok else "bad",
        "badge": judged.outcome or "done",
        "sentence": _sentence(run, judged),
    }


def _sentence(run: RunData, judged: Verdict) -> str:
    """The reason of a verdict, and the share of the logarithmic gap to the dense model that training closed."""
    known, sentence = run.perplexity, judged.reason
    final, dense, one_shot = known.final, known.dense, known.one_shot
    if judged.ok and final and dense and one_shot and one_shot > dense:
        recovered = math.log(one_shot / final) / math.log(one_shot / dense)
        sentence += f"; training recovered {recovered:.0%} of what one-shot pruning lost"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _headline(run: RunData) -> list[dict[str, str]]:
    known, facts = run.perplexity, run.facts
    final, dense = known.final, known.dense
    tokens = (facts.train_tokens if facts else None) or (run.rows[-1].get("tokens", 0) if run.rows else 0)
    speeds = [value for _, value in run.series("tokens_per_s")]
    memory: float | None = max((v for _, v in run.series("peak_memory_bytes")), default=None)
    if facts is not None and facts.peak_memory_bytes is not None:
        memory = facts.peak_memory_bytes
    seconds = None if facts is None else facts.train_seconds
    general = (facts and facts.general_figures) or []
    gap = math.log(final / dense) if final and dense and math.isfinite(final) else None
    figures = [
        ("perplexity after the prune" if known.trained is None else "perplexity", final, "{:,.3f}"),
        ("dense model", dense, "{:,.3f}"),
        ("one-shot start", known.one_shot, "{:,.3f}"),
        ("before fine-tuning", known.start, "{:,.3f}"),
        *((f"{row.name}, on {_short_name(row.text)}", row.perplexity, "{:,.3f}") for row in general),
        ("gap to dense, nats per token", gap, "{:+.3f}"),
        ("training tokens", short(tokens) if tokens else None, "{}"),
        ("tokens per second, median", statistics.median(speeds) if speeds else None, "{:,.0f}"),
        ("training time", None if seconds is None else duration(seconds), "{}"),
        ("peak memory", None if memory is None else memory / 2**30, "{:.2f} GiB"),
    ]
    return [{"label": label, "value": form.format(value)} for label, value, form in figures if value is not None]


def _settings(
    given: Mapping[str, Any], options: Sequence[dataclasses.Field[Any]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names and values of the given settings that differ from the defaults, then of the others."""
    defaults = {field.name: default_of(field) for field in options if not is_required(field)}
    changed: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    for name, value in given.items():
        is_default = name in defaults and defaults[name] == value
        (same if is_default else changed).append((name, _text(value)))
    return changed, same


def _text(value: Any) -> str:
    if value is None or isinstance(value, str | Path | Pattern):
        return str(value or "")
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _perplexity(run: RunData) -> list[Picture]:
    """Perplexity before and after the prune, and of the dense model."""
    known, evaluations = run.perplexity, run.evaluations
    if len(evaluations) < 2:
        return []
    before, pruned = run.series("perplexity"), run.series("prune_now_ppl")
    levels = {} if known.dense is None else {f"dense {known.dense:.4g}": known.dense}
    series = [Series("after the prune", pruned, 0, marks=True)] if pruned else []
    if not pruned or any(abs(a - b) > 1e-6 * b for (_, a), (_, b) in zip(before, pruned)):
        series.append(Series("before the prune" if pruned else "trained", before, 1, marks=True))
    finite = [value for _, value in (*before, *pruned) if math.isfinite(value)]
    if not finite:
        return []
    high = max(finite)
    svg = line_chart(
        series,
        x_label="training tokens",
        y_label="perplexity",
        levels=levels,
        log_y=high > 4 * min(levels.values(), default=high),
        width=WHOLE,
        height=300,
    )
    caption = "Perplexity of the held-out text."
    if len(series) > 1:
        caption = (
            "Perplexity of the held-out text as the forward pass computes it, and with every masked weight set to "
            "zero. The two lines meet when nothing is left to prune."
        )
    elif pruned:
        caption += " The forward pass uses no masked weight, so the prune changes nothing."
    return [Picture("Perplexity", svg, caption, wide=True)]


def _loss(run: RunData) -> list[Picture]:
    """The training loss with its parts, smoothed over the single steps."""
    if len(run.steps) < 2:
        return []
    names = {"loss": "loss", "ce": "cross-entropy", "kl": "KL to the teacher", "hidden": "distance of hidden states"}
    parts = [key for key in names if any(row.get(key) for row in run.steps)]
    keys = parts if "kl" in parts else ["loss"]
    raw = [Series("loss of a step", run.series("loss"), 0, faint=True)]
    smooth = []
    for number, key in enumerate(keys):  # averaged over consecutive rows, so that about 40 points are left
        found = run.series(key)
        size = max(1, round(len(found) / 40))
        rows = [found[at : at + size] for at in range(0, len(found), size)]
        points = [(row[-1][0], statistics.fmean(value for _, value in row)) for row in rows]
        smooth.append(Series(names[key], points, number))
    svg = line_chart([*raw, *smooth], x_label="training tokens", y_label="loss", width=WHOLE)
    caption = "On the training text, averaged over consecutive steps; the pale line is the loss of every step."
    if "kl" in keys:
        caption += " Cross-entropy and KL are in nats per token."
    if "hidden" in keys:
        caption += " The distance of hidden states is relative, and weighted in the loss."
    return [Picture("Training loss", svg, caption, wide=True)]


def _masks(run: RunData) -> list[Picture]:
    """Flips of the masks and the share of kept weight: side by side, or one over the whole page."""
    flips, initial = run.series("flip_rate"), run.series("initial_flip_rate")
    share = run.series("sparse_weight_ratio")
    has_flips = any(value for _, value in (*flips, *initial))
    has_share = any(value < 1 for _, value in share)
    is_alone = not (has_flips and has_share)
    width = WHOLE if is_alone else HALF
    pictures = []
    if has_flips:
        lines = [
            Series("since step 0", initial, 0, marks=True),
            Series("at the last refresh", flips[1:], 1, marks=True),
        ]
        label = "share of all mask entries"
        svg = line_chart(lines, x_label="training tokens", y_label=label, from_zero=True, width=width)
        caption = "Mask entries that differ from the masks of step 0, and those that the last refresh changed."
        pictures.append(Picture("Mask flips", svg, caption, wide=is_alone))
    if has_share:
        lines = [Series("share", share, 0, marks=True)]
        svg = line_chart(lines, x_label="training tokens", y_label="sum |kept| / sum |all|", width=width)
        caption = "The share of the weight of the sparse layers that is kept. At 1 every masked weight is zero."
        pictures.append(Picture("Share of kept weight", svg, caption, wide=is_alone))
    return pictures


def _layers(run: RunData) -> list[Picture]:
    """A heat map of the transformer blocks against the layers in each.

    Its figures are the errors of the layer outputs after the start if recorded, otherwise the shares of the squared
    weights that the first masks remove.
    """
    label = "relative error"
    caption = (
        "Squared error of the outputs of each layer after the start, relative to the dense outputs, on the first 256 "
        "calibration tokens."
    )
    figures: dict[str, float | None] = (run.facts.start.layer_errors if run.facts else None) or {}
    if not figures:
        label = "share removed"
        caption = "The share of the squared weights of each layer that the masks of step 0 remove."
        shares: dict[str, float | None] = next((row["masked_share"] for row in run.rows if "masked_share" in row), {})
        figures = shares if any(shares.values()) else {}
    cells: dict[str, dict[int, float | None]] = {}
    for name, value in figures.items():
        found = re.search(r"\.(\d+)\.(.+)$", name)
        if found:
            cells.setdefault(found[2], {})[int(found[1])] = value
    if not cells:
        return []
    blocks = sorted({index for row in cells.values() for index in row})
    svg = heat_map(
        [[row.get(block) for block in blocks] for row in cells.values()],
        list(cells),
        [str(block) for block in blocks],
        x_label="transformer block",
        y_label=label,
        cell_height=30 if len(cells) < 10 else 20,
        width=WHOLE,
    )
    return [Picture("Error by layer", svg, caption, wide=True)]
