"""A budget of a sweep that was run, and what the law of the budgets so far says: a line of the sweep's table."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castlm.planning.law import Prediction


@dataclass(frozen=True)
class Step:
    """A budget that was run."""

    tokens: int
    perplexities: list[float]
    """Of its runs, by seed."""
    predicted: Prediction | None
    """Of the mean of its runs, by the law of the smaller budgets, before they ran."""
    largest: Prediction | None = None
    """Of one run at the largest budget, by the law of all budgets so far."""
    no_law: str | None = None
    """Why they carry no law."""

    @property
    def perplexity(self) -> float:
        """Geometric mean over its runs."""
        return math.exp(statistics.fmean(map(math.log, self.perplexities)))

    @property
    def inside(self) -> bool | None:
        """Whether the mean fell in the interval that was predicted of it."""
        return None if self.predicted is None else self.predicted.low <= self.perplexity <= self.predicted.high

    @property
    def width(self) -> float:
        """Of the interval of the largest budget, as a share of its prediction."""
        return math.inf if self.largest is None else (self.largest.high - self.largest.low) / self.largest.perplexity

    def settles(self, within: float) -> bool:
        """Whether the largest budget need not be run any more."""
        return self.inside is True and self.width < within

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity, "inside": self.inside, "width": self.width}

    def __str__(self) -> str:
        inside = {None: "", True: "inside", False: "outside"}[self.inside]
        width = "" if self.largest is None else f"{self.width:.2%}"
        columns = f"{self.tokens:>14,}{self.perplexity:>12.4f}  {interval_text(self.predicted):<30}{inside:<10}"
        largest = f"no law: {self.no_law}" if self.no_law else f"{interval_text(self.largest):<30}{width:>8}"
        return f"{columns}{largest}".rstrip()


TITLE = (
    f"{'tokens':>14}{'perplexity':>12}  {'predicted (90 %)':<30}{'':<10}{'largest, predicted (90 %)':<30}{'width':>8}"
)


def interval_text(found: Prediction | None) -> str:
    """A perplexity with its interval; nothing for None."""
    return "" if found is None else f"{found.perplexity:.4f} ({found.low:.4f} to {found.high:.4f})"
