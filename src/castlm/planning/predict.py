"""What a law says before a run is paid for: the perplexity of a budget, the budget of a perplexity, the GPU-hours."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from castlm.core.errors import InputError
from castlm.planning.law import Law, interval

MOST_TOKENS = 1e30
"""Numbers from here on are refused: no budget is as large, and powers of them overflow."""


def short(value: float) -> str:
    """A number for a message: a whole number may have thousands of digits."""
    return f"{value:g}" if abs(value) <= sys.float_info.max else "a number out of range"


def readable(perplexity: float) -> str:
    """With three decimals, or as a power of ten where it has many digits."""
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3g}"


@dataclass(frozen=True)
class Prediction:
    """Perplexity of a run at `tokens`, with the 90 % interval that it (or the mean of several) should fall in."""

    tokens: float
    perplexity: float
    low: float
    high: float
    beyond: float
    """How many times `tokens` exceeds the largest fitted budget (1 inside the range)."""
    below: float
    """How many times the smallest fitted budget exceeds `tokens` (1 inside the range)."""


@dataclass(frozen=True)
class TokensNeeded:
    """Training tokens at which the law reaches `target_ppl`; `low` and `high` are inf where a refit never does."""

    target_ppl: float
    tokens: float | None
    """None: cannot be reached, the floor is at or above the target."""
    low: float
    high: float
    floor_ppl: float
    """Perplexity of endless training: exp(L_inf), for a joint law exp(L_inf + A * N^-a)."""
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
def predict_perplexity(law: Law, tokens: float, params: float | None = None, num_runs: int = 1) -> Prediction:
    """The perplexity that `tokens` give. The interval holds the law's uncertainty and the scatter of a single run, or
    of the geometric mean of `num_runs` perplexities.

    Raises:
        InputError: `tokens` is not a positive number, a joint law got no `params`, or the law gives no finite number.
    """
    if not 0 < tokens < MOST_TOKENS:
        raise InputError(f"tokens must be a positive number, got {short(tokens)}")
    low, high = interval(np.exp(law.run_losses(tokens, params, num_runs)))
    perplexity = float(np.exp(law.loss(tokens, params)))
    if not math.isfinite(perplexity):
        raise InputError(f"the law gives no finite perplexity at {tokens:g} tokens: fit it again")
    smallest, largest = law.tokens_range
    return Prediction(tokens, perplexity, low, high, max(1.0, tokens / largest), max(1.0, smallest / tokens))


@np.errstate(over="ignore")
def tokens_for(law: Law, target_ppl: float, params: float | None = None) -> TokensNeeded:
    """The budget that reaches `target_ppl` on average over seeds: D = (B / (ln target - floor))^(1 / beta).

    Raises:
        InputError: `target_ppl` is not above 1, a joint law got no `params`, or no budget is as large as the answer.
    """
    if not 1 < target_ppl < MOST_TOKENS:
        raise InputError(f"the target perplexity must be above 1 and below {MOST_TOKENS:g}, got {short(target_ppl)}")
    rows = np.vstack([[law.L_inf, law.B, law.beta, law.A, law.a], law.draws])
    L_inf, B, beta, A, a = rows.T
    floor = L_inf + A * np.asarray(law.size(params), float) ** -a
    margin = math.log(target_ppl) - floor
    reached = margin > 0
    tokens = np.full(len(rows), math.inf)
    tokens[reached] = (B[reached] / margin[reached]) ** (1 / beta[reached])
    low, high = interval(tokens[1:])
    value = float(tokens[0]) if reached[0] else None
    if value is not None and not value < MOST_TOKENS:
        raise InputError(
            f"perplexity {target_ppl:.10g} needs more than {MOST_TOKENS:g} tokens by this law: give a larger target"
        )
    return TokensNeeded(target_ppl, value, low, high, float(np.exp(floor[0])), float(reached[1:].mean()))


def gpu_hours(tokens: float, tokens_per_s: float) -> float:
    """GPU-hours of `tokens` at a measured throughput of `tokens_per_s` for each GPU."""
    if not 0 < tokens_per_s < MOST_TOKENS:
        raise InputError(f"tokens_per_s must be a positive number, got {short(tokens_per_s)}")
    return tokens / tokens_per_s / 3600


def duration(hours: float) -> str:
    """Hours for a person to read, shorter times in minutes or seconds."""
    for size, unit in ((1, "hours"), (60, "minutes")):
        if hours * size >= 1:
            return f"{hours * size:,.2f} {unit}"
    return f"{hours * 3600:.3g} seconds"


def check_price(price_per_hour: float, devices: int = 1) -> None:
    """Raises InputError unless the price of a device-hour is positive and there is a device."""
    if not 0 < price_per_hour < MOST_TOKENS:
        raise InputError(f"price_per_hour is {short(price_per_hour)}: give what an hour of one device costs, above 0")
    if devices < 1:
        raise InputError(f"devices is {devices}: it must be at least 1")
