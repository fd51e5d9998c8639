"""The scaling law of sparse quality: the loss ln(perplexity) falls as a power of the training tokens.

`castlm.planning.fit` finds it; a law knows how far it can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from castlm.core.errors import InputError
from castlm.planning.solve import Array

NAMES = ("L_inf", "B", "beta", "A", "a")
"""Parameters, in the order of a row of `Law.draws`."""
FORMS = {"loglinear": ("B", "beta"), "power": ("L_inf", "B", "beta"), "joint": NAMES}


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
    inside: float
    """The fraction of its runs inside the interval."""
    num_budgets: int
    """The number of token budgets that the law was fitted to."""

    @property
    def error(self) -> float:
        """Predicted minus measured perplexity."""
        return self.predicted - self.perplexity


@dataclass(frozen=True)
class Law:
    """loss(D, N) = L_inf + A * N^-a + B * D^-beta in nats a token, with perplexity = exp(loss).

    `power` has no A term; `loglinear` has no floor either (L_inf = 0), so log loss = log B - beta * log D is a line.
    """

    form: str
    L_inf: float
    B: float
    beta: float
    A: float
    a: float
    r2: float
    """1 - residual / total sum of squares of log loss."""
    intervals: dict[str, tuple[float, float]]
    """90 % interval of each fitted parameter and of r2."""
    noise: float
    """Standard deviation of the log loss of one run around the law."""
    noise_of_budget: float
    """The part of `noise` that all runs of a token budget share: seeds do not average it out. It is widened by what few
    budgets ask for, Student's t over the normal quantile; the rest of `noise`, between seeds, is not."""
    num_points: int
    num_budgets: int
    tokens_range: tuple[float, float]
    draws: Array
    """(num_draws, 5): bootstrap refits, columns as in NAMES."""
    holdout: Holdout | None = None
    holdout_reason: str = ""
    """Why `holdout` is None, if it is."""
    runs_of: dict[str, str] = field(default_factory=dict)
    """What the runs have in common, as far as it is known: `method`, `pattern`, `base_model` and `harness`."""

    def loss(self, tokens: ArrayLike, params: ArrayLike | None = None) -> Array:
        """Predicted ln(perplexity), in the broadcast shape of the arguments; `params` is for the joint law."""
        return law_loss([self.L_inf, self.B, self.beta, self.A, self.a], tokens, self.size(params))

    def draw_losses(self, tokens: float, params: float | None = None) -> Array:
        """(num_draws,): `loss` under each bootstrap refit."""
        return law_loss(self.draws.T, tokens, self.size(params))

    def run_losses(self, tokens: float, params: float | None = None, num_runs: int = 1) -> Array:
        """(num_draws * 21,): losses that a new run may reach, or the mean of `num_runs` of them: each refit with 21
        normal quantiles of the noise."""
        shared = self.noise_of_budget**2
        noise = math.sqrt(shared + (self.noise**2 - shared) / num_runs)
        deviations = noise * np.array([NormalDist().inv_cdf((i + 0.5) / 21) for i in range(21)])
        return np.outer(self.draw_losses(tokens, params), np.exp(deviations)).ravel()

    def size(self, params: ArrayLike | None) -> ArrayLike:
        """`params`, which a joint law needs and the other forms ignore.

        Raises:
            InputError: the law is joint, and `params` is missing or not positive and finite.
        """
        if self.form != "joint":
            return 1.0
        if params is None:
            raise InputError("a joint law predicts for one model size: give params")
        values = np.asarray(params, dtype=np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            raise InputError(f"params is {params}: a positive finite number is needed")
        return params

    def as_dict(self) -> dict[str, Any]:
        """The law as plain JSON, with the draws that predictions need."""
        content = asdict(self)
        if self.form != "joint":
            del content["A"], content["a"]
        content["intervals"] = {name: list(pair) for name, pair in self.intervals.items()}
        content["tokens_range"] = list(self.tokens_range)
        content["draws"] = [[float(f"{value:.8g}") for value in row] for row in self.draws]
        if self.holdout is not None:
            content["holdout"]["error"] = self.holdout.error
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Law:
        """Inverse of `as_dict`.

        Raises:
            InputError: a field is missing, malformed, not finite, or out of the range that a fit can give.
        """
        try:
            holdout = content["holdout"]
            law = cls(
                **{name: float(content[name]) for name in ("L_inf", "B", "beta", "r2", "noise", "noise_of_budget")},
                **{name: float(content.get(name, 0.0)) for name in ("A", "a")},
                form={form: form for form in FORMS}[content["form"]],
                intervals={name: (float(low), float(high)) for name, (low, high) in content["intervals"].items()},
                num_points=int(content["num_points"]),
                num_budgets=int(content["num_budgets"]),
                tokens_range=(float(content["tokens_range"][0]), float(content["tokens_range"][1])),
                draws=np.asarray(content["draws"], dtype=np.float64).reshape(-1, len(NAMES)),
                holdout=None if holdout is None else Holdout(**{k: v for k, v in holdout.items() if k != "error"}),
                holdout_reason=str(content["holdout_reason"]),
                runs_of={str(name): str(value) for name, value in content.get("runs_of", {}).items()},
            )
        except KeyError as error:
            raise InputError(
                f"not a fitted law (its {error} is missing or unknown): write one with `plan fit`"
            ) from error
        except (TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise InputError(
                f"not a fitted law ({type(error).__name__}: {error}): write one with `plan fit`"
            ) from error
        law.check()
        return law

    def check(self) -> None:
        """Checks that every number is one that a fit can give.

        Raises:
            InputError: a number is NaN, infinite or out of range, or there are no draws.
        """
        rows = np.vstack([[getattr(self, name) for name in NAMES], self.draws])
        low, high = self.tokens_range
        problems = {
            "a parameter or draw is not finite": not np.isfinite(rows).all(),
            "there are no draws": not len(self.draws),
            "a parameter or draw is negative": bool((rows < 0).any()),
            "beta is not above 0": bool((rows[:, NAMES.index("beta")] <= 0).any()),
            f"noise is {self.noise}": not 0 <= self.noise < math.inf,
            f"noise_of_budget is {self.noise_of_budget}": not 0 <= self.noise_of_budget <= self.noise,
            f"tokens_range is {self.tokens_range}": not 0 < low <= high < math.inf,
        }
        found = [problem for problem, is_there in problems.items() if is_there]
        if found:
            raise InputError(f"not a fitted law ({found[0]}): write one with `plan fit`")


def law_loss(theta: Sequence[float] | Array, tokens: ArrayLike, params: ArrayLike = 1.0) -> Array:
    """L_inf + A * N^-a + B * D^-beta for `theta` (5, ...) in the order of NAMES; arrays broadcast."""
    L_inf, B, beta, A, a = theta
    return np.asarray(L_inf + B * np.asarray(tokens, float) ** -beta + A * np.asarray(params, float) ** -a)


def interval(values: Array) -> tuple[float, float]:
    """The central 90 % of `values` (num,), which may be infinite."""
    low, high = np.quantile(values, 0.05, method="lower"), np.quantile(values, 0.95, method="higher")
    return float(low), float(high)
