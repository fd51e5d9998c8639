"""A run of a comparison with what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castlm.compare.runs import Run
from castlm.training.record import final_perplexity, problem


@dataclass
class Result:
    """A run and what came of it."""

    run: Run
    record: dict[str, Any]
    """The content of its castlm.json, or `{"error": ...}`."""
    folder: Path
    trial: bool = False
    """Only a candidate for the learning rate: no row of the table."""
    zero_shot: list[dict[str, Any]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """Of the pruned model, of the dense control as trained; infinite when the run failed."""
        value = final_perplexity(self.record.get("perplexity", {}))
        return float("inf") if value is None else float(value)

    @property
    def problem(self) -> str | None:
        """What is wrong with it by its own verdict, "diverged" or "fell short"; None if nothing is."""
        return problem(self.record.get("verdict", {}))
