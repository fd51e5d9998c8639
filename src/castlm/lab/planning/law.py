"""The scaling law of sparse quality, and its predictions before a run is paid for.

The loss ln(perplexity) falls as a power of the training tokens. `castlm.lab.planning.fit` fits the law, with its
uncertainty. A law predicts the perplexity of a token budget, the budget for a perplexity, and the GPU-hours; `plot_law`
draws it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_file, reporting_full_disk
from castlm.lab.planning.points import Point
from castlm.lab.report.charts import NEEDS_MATPLOTLIB, can_draw

Array = NDArray[np.float64]

NAMES = ("L_inf", "B", "beta")
"""Parameters, in the order of a row of `Law.draws`."""


@dataclass(frozen=True)
class Holdout:
    """The largest token budget, predicted by a law fitted without it."""

    tokens: float
    perplexity: float
    """Measured: geometric mean over its runs."""
    predicted: float
    low: float
    high: float
    """90 % interval of one run with this budget."""

    @property
    def error(self) -> float:
        """Predicted minus measured perplexity."""
        return self.predicted - self.perplexity


@dataclass(frozen=True)
class Law:
    """loss(D) = L_inf + B * D^-beta in nats a token for D training tokens, with perplexity = exp(loss)."""

    L_inf: float
    B: float
    beta: float
    r2: float
    """1 - residual / total sum of squares of log loss."""
    intervals: dict[str, tuple[float, float]]
    """90 % interval of each parameter and of r2."""
    noise: float
    """Standard deviation of the log loss of one run around the law."""
    num_points: int
    num_budgets: int
    tokens_range: tuple[float, float]
    draws: Array
    """(num_draws, 3): bootstrap refits, columns as in NAMES."""
    holdout: Holdout | None = None
    holdout_reason: str = ""
    """The reason if `holdout` is None."""
    least_ppl: float | None = None
    """The lowest perplexity that is predicted: the dense model's, or the best run's if it is lower; None
    if the dense model's is not known."""
    runs_of: dict[str, str] = field(default_factory=dict)
    """The `method`, `pattern`, `base_model` and `harness` that the runs share, as far as they are known."""

    def loss(self, tokens: ArrayLike) -> Array:
        """Predicted ln(perplexity), in the shape of `tokens`."""
        return law_loss([self.L_inf, self.B, self.beta], tokens)

    def draw_losses(self, tokens: float) -> Array:
        """(num_draws,): `loss` under each bootstrap refit."""
        return law_loss(self.draws.T, tokens)

    def run_losses(self, tokens: float) -> Array:
        """(num_draws * 21,): losses that a new run may reach: each refit with 21 normal quantiles of the noise."""
        deviations = self.noise * np.array([NormalDist().inv_cdf((i + 0.5) / 21) for i in range(21)])
        return np.outer(self.draw_losses(tokens), np.exp(deviations)).ravel()

    def tested(self) -> str:
        """One line on how well the other budgets predict the largest."""
        if self.holdout is None:
            return f"the largest budget was not predicted from the others: {self.holdout_reason}"
        found = self.holdout
        return (
            f"the largest budget, predicted from the others: perplexity {found.predicted:.4f} ({found.low:.4f} to "
            f"{found.high:.4f}), measured {found.perplexity:.4f}, off by {found.error:+.3f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The law as plain JSON, with the draws that predictions need."""
        content = asdict(self)
        content["draws"] = [[float(f"{value:.8g}") for value in row] for row in self.draws]
        if self.holdout is not None:
            content["holdout"]["error"] = self.holdout.error
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Law:
        """Inverse of `as_dict`. Raises `InputError` for fields that a fit cannot give."""
        try:
            holdout = content["holdout"]
            law = cls(
                **{name: float(content[name]) for name in (*NAMES, "r2", "noise")},
                intervals={name: (float(low), float(high)) for name, (low, high) in content["intervals"].items()},
                num_points=int(content["num_points"]),
                num_budgets=int(content["num_budgets"]),
                tokens_range=(float(content["tokens_range"][0]), float(content["tokens_range"][1])),
                draws=np.asarray(content["draws"], dtype=np.float64),
                holdout=None if holdout is None else Holdout(**{k: v for k, v in holdout.items() if k != "error"}),
                holdout_reason=str(content["holdout_reason"]),
                least_ppl=None if (least := content.get("least_ppl")) is None else float(least),
                runs_of={str(name): str(value) for name, value in content.get("runs_of", {}).items()},
            )
            rows = np.vstack([[law.L_inf, law.B, law.beta], law.draws])
            (low, high), is_finite = law.tokens_range, len(law.draws) and np.isfinite(rows).all()
            is_possible = is_finite and (rows >= 0).all() and (rows[:, 2] > 0).all()
            if not (is_possible and 0 <= law.noise <= 100 and 0 < low <= high < math.inf):  # noise in nats of loss
                raise ValueError("a number is out of range")
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"not a fitted law ({reason}): write one with `plan fit`") from error
        return law


def law_loss(theta: Sequence[float] | Array, tokens: ArrayLike) -> Array:
    """L_inf + B * D^-beta for `theta` (3, ...) in the order of NAMES; arrays broadcast."""
    L_inf, B, beta = theta
    return np.asarray(L_inf + B * np.asarray(tokens, float) ** -beta)


def interval(values: Array) -> tuple[float, float]:
    """The central 90 % of `values` (num,), which may be infinite."""
    low, high = np.quantile(values, 0.05, method="lower"), np.quantile(values, 0.95, method="higher")
    return float(low), float(high)


def readable(perplexity: float) -> str:
    """Formats a number with three decimals, or as a power of ten if it has many digits."""
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3g}"


@dataclass(frozen=True)
class Prediction:
    """Perplexity of a run at `tokens`, with its 90 % interval."""

    tokens: float
    perplexity: float
    low: float
    high: float
    beyond: float
    """Ratio of `tokens` to the largest fitted budget (1 inside the range)."""
    below: float
    """Ratio of the smallest fitted budget to `tokens` (1 inside the range)."""
    is_least: bool = False
    """Whether the law itself gives less than its `least_ppl`, which stands in its place."""


@dataclass(frozen=True)
class TokensNeeded:
    """Training tokens at which the law reaches `target_ppl`; `low` and `high` are inf if a refit never does."""

    target_ppl: float
    tokens: float | None
    """None: cannot be reached, the floor is at or above the target."""
    low: float
    high: float
    floor_ppl: float
    """Perplexity of endless training: exp(L_inf), or `Law.least_ppl` if that is more."""
    probability: float
    """Share of the bootstrap refits under which the target can be reached at all."""

    def __str__(self) -> str:
        if self.tokens is None:
            return (
                f"perplexity {self.target_ppl:g} cannot be reached: the law's floor is {self.floor_ppl:.4g} "
                f"({self.probability:.0%} of the refits reach it)"
            )
        high = f"{self.high:.3g}" if math.isfinite(self.high) else "no upper limit"
        return f"perplexity {self.target_ppl:g} needs {self.tokens:.3g} tokens (90 %: {self.low:.3g} to {high})"


@np.errstate(over="ignore")  # a bad law gives infinity
def predict_perplexity(law: Law, tokens: float) -> Prediction:
    """The perplexity that `tokens` give, a positive number.

    The interval holds the law's uncertainty and the scatter of a single run. Neither goes below `law.least_ppl`.
    """
    low, high = interval(np.exp(law.run_losses(tokens)))
    smallest, largest = law.tokens_range
    least, predicted = law.least_ppl or 0.0, float(np.exp(law.loss(tokens)))
    return Prediction(
        tokens,
        perplexity=max(predicted, least),
        low=max(low, least),
        high=max(high, least),
        beyond=max(1.0, tokens / largest),
        below=max(1.0, smallest / tokens),
        is_least=predicted < least,
    )


@np.errstate(over="ignore")
def tokens_for(law: Law, target_ppl: float) -> TokensNeeded:
    """The token budget that reaches `target_ppl`, above 1, on average over seeds: D = (B / (ln target - L_inf))^(1 /
    beta).
    """
    L_inf, B, beta = np.vstack([[law.L_inf, law.B, law.beta], law.draws]).T
    margin = math.log(target_ppl) - L_inf
    least = law.least_ppl or 0.0
    reached = (margin > 0) & (target_ppl >= least)
    tokens = np.full(len(L_inf), math.inf)
    tokens[reached] = (B[reached] / margin[reached]) ** (1 / beta[reached])
    low, high = interval(tokens[1:])
    value = float(tokens[0]) if reached[0] else None
    floor = max(float(np.exp(law.L_inf)), least)
    return TokensNeeded(target_ppl, value, low, high, floor, float(reached[1:].mean()))


_CREATOR = "castlm plan fit"
"""Marks a plot, in its metadata, as one that may be replaced."""


def check_plot(path: str | Path) -> None:
    """Checks before a fit that its plot can be written and replaces at most an earlier plot."""
    if not can_draw():
        raise InputError(NEEDS_MATPLOTLIB)
    if Path(path).suffix not in (".pdf", ".png", ".svg"):
        raise InputError(f"plot {path}: its name must end in .pdf, .png or .svg")
    if os.path.lexists(path) and not (os.path.isfile(path) and _CREATOR.encode() in Path(path).read_bytes()):
        raise InputError(f"{path} exists and is not a plot of castlm plan fit: choose another name")


def plot_law(law: Law, points: Sequence[Point], path: str | Path) -> None:
    """Writes a plot to `path` (its suffix is the format): the law with its 90 % band, and log-loss residuals below."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    tokens = np.geomspace(law.tokens_range[0] / 1.5, law.tokens_range[1] * 4, 100)
    x, ppl = np.array([point.tokens for point in points]), np.array([point.perplexity for point in points])
    band = np.array([interval(np.exp(law.draw_losses(t))) for t in tokens])
    (line,) = upper.plot(tokens, np.exp(law.loss(tokens)))
    upper.fill_between(tokens, band[:, 0], band[:, 1], alpha=0.2, color=line.get_color())
    upper.plot(x, ppl, "o", color=line.get_color())
    lower.plot(x, np.log(np.log(ppl)) - np.log(law.loss(x)), "o", color=line.get_color())
    upper.set(xscale="log", ylabel="perplexity", title=f"R² {law.r2:.4f} in log loss")
    lower.axhline(0, color="grey", linewidth=0.8)
    lower.set(xlabel="training tokens", ylabel="log-loss residual")
    with reporting_full_disk(path), atomic_file(Path(path)) as temporary:
        kind = Path(path).suffix.lower().removeprefix(".")
        figure.savefig(temporary, format=kind, metadata={"Creator": _CREATOR})
