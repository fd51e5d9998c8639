"""The folder of a run, finished or not, and its charts: config.yaml, metrics.jsonl and the result's castlm.json."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import read_json_object
from castlm.files.yaml_file import read_yaml_mapping
from castlm.report.charts import WHOLE, Level, Picture, Series, heat_map, line_chart
from castlm.training.config import without_sections
from castlm.training.record import read_metrics


@dataclass(frozen=True)
class RunData:
    """The content of a run's files."""

    folder: Path
    config: dict[str, Any]
    """The fields of TrainConfig."""
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    record: dict[str, Any] | None
    """The content of castlm.json; None while the run is not finished."""

    @property
    def is_finished(self) -> bool:
        return self.record is not None

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
    def perplexity(self) -> dict[str, float]:
        """The known perplexities among `dense`, `one_shot`, `before_prune` and `pruned`, as in `castlm.json`."""
        if self.record is not None:
            return dict(self.record["perplexity"])
        if not self.evaluations:
            return {}
        first, last = self.evaluations[0], self.evaluations[-1]
        if self.config.get("init_from") == self.config.get("model"):
            found = {"start": first.get("prune_now_ppl"), "pruned": last.get("prune_now_ppl")}
            return {name: value for name, value in found.items() if value is not None}
        found = {
            "dense": first.get("dense_ppl", first["perplexity"]),
            "one_shot": first.get("prune_now_ppl"),
            "before_prune": last["perplexity"],
            "pruned": last.get("prune_now_ppl"),
        }
        return {name: value for name, value in found.items() if value is not None}

    def series(self, key: str) -> list[tuple[float, float]]:
        """(tokens, value) of all rows that have `key`."""
        return [(row["tokens"], row[key]) for row in self.rows if key in row and "tokens" in row]

    def smoothed(self, key: str) -> list[tuple[float, float]]:
        """`series`, averaged over consecutive rows so that about 40 points are left."""
        found = self.series(key)
        size = max(1, round(len(found) / 40))
        parts = [found[i : i + size] for i in range(0, len(found), size)]
        return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]

    @property
    def layer_errors(self) -> tuple[dict[str, float], str]:
        """An error per sparse layer, by name, and the kind of error. Empty if the run has none.

        The error of the layer outputs after the start if recorded, otherwise the share of the squared weights that the
        first masks remove.
        """
        start = (self.record or {}).get("start") or {}
        errors = start.get("layer_errors") or {}
        if errors:
            return errors, "error"
        shares: dict[str, float] = next((row["masked_share"] for row in self.rows if "masked_share" in row), {})
        return (shares, "share") if any(shares.values()) else ({}, "")


def read_run(path: str | Path) -> RunData:
    """Reads the folder of a run of `castlm train`, or its `model` folder.

    Raises:
        InputError: the folder holds no run, or a file in it cannot be read.
    """
    folder = Path(path)
    if not (folder / "metrics.jsonl").is_file() and (folder.parent / "metrics.jsonl").is_file():
        folder = folder.parent
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise InputError(f"{path} holds no run: give the output_dir of castlm train")
    file = folder / "model" / "castlm.json"
    record = read_json_object(file) if file.exists() else None
    config = without_sections(read_yaml_mapping(folder / "config.yaml"), str(folder / "config.yaml"))
    return RunData(folder, config, read_metrics(folder), record)


def perplexity(run: RunData) -> list[Picture]:
    """Perplexity before and after the prune, and of the dense model."""
    known, evaluations = run.perplexity, run.evaluations
    if len(evaluations) < 2:
        return []
    before, pruned = run.series("perplexity"), run.series("prune_now_ppl")
    levels = [Level(f"dense {known['dense']:.4g}", known["dense"])] if "dense" in known else []
    series = [Series("after the prune", pruned, 0, marks=True)] if pruned else []
    if not pruned or any(abs(a - b) > 1e-6 * b for (_, a), (_, b) in zip(before, pruned)):
        series.append(Series("before the prune" if pruned else "trained", before, 1, marks=True))
    high = max((value for line in series for _, value in line.points if math.isfinite(value)), default=None)
    if high is None:
        return []
    svg = line_chart(
        series,
        x_label="training tokens",
        y_label="perplexity",
        levels=levels,
        log_y=high > 4 * min([level.value for level in levels] or [high]),
        width=WHOLE,
        height=300,
    )
    caption = (
        "Perplexity of the held-out text as the forward pass computes it, and with every masked weight set to zero. "
        "The two lines meet when nothing is left to prune."
        if len(series) > 1
        else "Perplexity of the held-out text. The forward pass uses no masked weight, so the prune changes nothing."
        if pruned
        else "Perplexity of the held-out text."
    )
    return [Picture("Perplexity", svg, caption, wide=True)]


def loss(run: RunData) -> list[Picture]:
    """The training loss with its parts, smoothed over the single steps."""
    if len(run.steps) < 2:
        return []
    names = {"loss": "loss", "ce": "cross-entropy", "kl": "KL to the teacher", "hidden": "distance of hidden states"}
    parts = [key for key in names if any(row.get(key) for row in run.steps)]
    keys = parts if "kl" in parts else ["loss"]
    raw = [Series("loss of a step", run.series("loss"), 0, faint=True)]
    smooth = [Series(names[key], run.smoothed(key), number) for number, key in enumerate(keys)]
    svg = line_chart([*raw, *smooth], x_label="training tokens", y_label="loss")
    caption = (
        "On the training text, averaged over consecutive steps; the pale line is the loss of every step. Cross-entropy "
        "and KL are in nats per token; the distance of hidden states is relative, and weighted in the loss."
    )
    return [Picture("Training loss", svg, caption)]


def masks(run: RunData) -> list[Picture]:
    """Flips of the masks and the share of kept weight."""
    pictures = []
    flips, initial = run.series("flip_rate"), run.series("initial_flip_rate")
    if any(value for _, value in (*flips, *initial)):
        lines = [
            Series("since step 0", initial, 0, marks=True),
            Series("at the last refresh", flips[1:], 1, marks=True),
        ]
        svg = line_chart(lines, x_label="training tokens", y_label="share of all mask entries", from_zero=True)
        caption = "Mask entries that differ from the masks of step 0, and those that the last refresh changed."
        pictures.append(Picture("Mask flips", svg, caption))
    share = run.series("sparse_weight_ratio")
    if any(value < 1 for _, value in share):
        svg = line_chart(
            [Series("share", share, 0, marks=True)], x_label="training tokens", y_label="sum |kept| / sum |all|"
        )
        caption = "The share of the weight of the sparse layers that is kept. At 1 every masked weight is zero."
        pictures.append(Picture("Share of kept weight", svg, caption))
    return pictures


def layers(run: RunData) -> list[Picture]:
    """A heat map of the transformer blocks against the layers in each."""
    figures, kind = run.layer_errors
    cells: dict[str, dict[int, float]] = {}
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
        y_label="relative error",
        form=".2g",
        in_cells=True,
        from_zero=False,
        cell_height=30 if len(cells) < 10 else 20,
        width=WHOLE,
    )
    caption = {
        "error": "Squared error of the outputs of each layer after the start, relative to the dense outputs, on the "
        "first 256 calibration tokens.",
        "share": "The share of the squared weights of each layer that the masks of step 0 remove.",
    }[kind]
    return [Picture("Error by layer", svg, caption, wide=True)]
