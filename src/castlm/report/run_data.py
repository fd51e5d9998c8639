"""Reads the folder of a run, finished or not: config.yaml, metrics.jsonl and the result's castlm.json."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import read_json_object
from castlm.files.yaml_file import read_yaml_mapping
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

    def series(self, key: str, over: str = "tokens") -> list[tuple[float, float]]:
        """(tokens, value) of all rows that have `key`."""
        return [(row[over], row[key]) for row in self.rows if key in row and over in row]

    def smoothed(self, key: str, points: int = 40) -> list[tuple[float, float]]:
        """`series`, averaged over consecutive rows so that about `points` are left."""
        found = self.series(key)
        size = max(1, round(len(found) / points))
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
