"""Fits the scaling law of sparse quality to finished runs.

A fit reports its uncertainty (intervals, and a prediction of the largest token budget from the others), and is refused
if the data does not support it. The numerical part works on centred logs, where amplitude and exponent are nearly
uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from castlm.core.errors import InputError
from castlm.lab.planning.law import NAMES, Array, Holdout, Law, interval
from castlm.lab.planning.points import Point

MIN_BUDGETS = 4
MIN_SPREAD = 4.0
"""Least ratio of the largest token budget to the smallest."""
SAME_BUDGET = 0.02
"""Budgets within 2 % count as one."""

MIN_EXPONENT, MAX_EXPONENT = 0.01, 4.0
WIDE_DELTA, HUBER_DELTA = 2e-2, 1e-3
"""Huber's delta of the first pass, and the least of the second: residuals of log loss. 1e-3 is from Hoffmann et al.
(2022)."""
_SHARED = {
    "method": "choose one with --method",
    "pattern": "give runs of one",
    "harness": "evaluate all on one eval_dataset with one seq_len",
    "params": "give one model size at a time",
}
"""Fields of a point that all points of a law share, with the remedy if they do not."""

NUM_STARTS = 5
"""Points of the grid of starts from which the solver descends: those with the smallest loss."""


def fit_law(points: Sequence[Point], *, num_draws: int = 200, seed: int = 0, leave_largest_out: bool = True) -> Law:
    """Fits the law to `points` of one method and model.

    The objective is the Huber loss of the residuals of log loss, minimised from the best of a grid of starts as in
    Hoffmann et al. (2022), Approach 3. Its delta is 1.345 robust standard deviations of the residuals of a first pass,
    and at least their 1e-3. B is fitted as its log, at the geometric mean of the token budgets; L_inf is fitted
    as it is, so that a fit at its bound 0 can be detected. Bounds: 0 <= L_inf <= the lowest loss (mean over seeds),
    0.01 <= beta <= 4.

    Intervals (90 %) come from `num_draws` refits to data drawn around the fitted law: deviations between seeds are
    resampled within their token budget, and the remaining scatter of the means is resampled over token budgets. Both
    are corrected for the degrees of freedom of the fit, the latter also by Student's t, so an interval is wide if there
    is only one budget more than there are parameters.

    Args:
        leave_largest_out: whether a law of the other budgets predicts the largest, as `Law.holdout`.

    Raises:
        InputError: fewer than 4 distinct budgets; budgets within a factor of `MIN_SPREAD`; several methods, patterns,
            base models or sizes mixed; a value that is not finite and positive; loss that does not fall with tokens;
            L_inf or beta at its bound.
    """
    # In one order: the draws of the intervals go through the points, so the order of files would change their digits.
    points = sorted(points, key=lambda point: (point.tokens, point.seed or 0, point.perplexity))
    data = _as_data(points)
    check_budgets(data.x)
    known = {name: _named(points, name) for name in ("method", "pattern", "harness", "base_model")}
    runs_of = {name: " and ".join(values) for name, values in known.items() if values}
    dense = [point.dense for point in points if point.dense is not None]
    least = min([*dense, *(point.perplexity for point in points)]) if dense else None
    law = replace(_fit(data, num_draws, seed), runs_of=runs_of, least_ppl=least)
    if not leave_largest_out:
        return law
    try:
        return replace(law, holdout=_leave_largest_out(data, num_draws, seed))
    except InputError as error:
        return replace(law, holdout_reason=str(error))


def _as_data(points: Sequence[Point]) -> Data:
    for point in points:
        if not (0 < point.tokens < math.inf and 1 < point.perplexity < math.inf):
            raise InputError(
                f"{point.source or 'a point'}: tokens {point.tokens:g}, perplexity {point.perplexity:g}: positive "
                "finite numbers and a perplexity above 1 are needed"
            )
    for name, remedy in _SHARED.items():
        if len(values_of := _named(points, name)) > 1:
            raise InputError(
                f"points of {len(values_of)} values of {name} ({'; '.join(values_of)}): a law holds for one; {remedy}"
            )
    of_runs = [point for point in points if point.base_model]
    for point in of_runs:
        if not point.is_of_the_model_of(other := of_runs[0]):
            raise InputError(
                f"{other.source} is a run of {other.base_model} (dense perplexity {other.dense}), and {point.source} "
                f"of {point.base_model} ({point.dense}): a law holds for one model"
            )
    return make_data(np.log([point.tokens for point in points]), np.log(np.log([point.perplexity for point in points])))


def _named(points: Sequence[Point], field: str) -> list[str]:
    """The values of a field, of the `points` that have one."""
    return sorted({str(value) for point in points if (value := getattr(point, field))})


def check_budgets(x: ArrayLike, min_budgets: int = MIN_BUDGETS, min_spread: float = MIN_SPREAD) -> None:
    """Raises `InputError` for too few distinct token budgets, or a range that is too short; `x` are their logs."""
    num_budgets = 1 + int((np.diff(np.sort(x)) > SAME_BUDGET).sum())
    if num_budgets < min_budgets:
        raise InputError(f"a law needs {min_budgets} distinct token budgets, found {num_budgets}: add more")
    if (spread := math.exp(np.ptp(x))) < min_spread * (1 - 1e-9):
        raise InputError(
            f"budgets span a factor of {spread:.3g}, {min_spread:g} is the least: add a larger or smaller one"
        )


def _fit(data: Data, num_draws: int, seed: int) -> Law:
    """The point estimate and its bootstrap, of budgets that pass `check_budgets`."""
    if not float(data.x @ data.y) < 0:
        raise InputError(
            "perplexity does not fall with tokens: no law to fit; are all runs of one model, text and method?"
        )
    lowest = math.exp(min(data.y[data.budget == budget].mean() for budget in np.unique(data.budget)))
    theta, delta = solve_from_grid(data, lowest)
    if theta[0] < 1e-3 * lowest:
        raise InputError(
            "L_inf is at its bound 0: these budgets show no floor; add runs of 2 and 4 times the largest budget"
        )
    if theta[0] > (1 - 1e-3) * lowest:
        raise InputError(f"L_inf is at its bound, the lowest loss {lowest:.4f}: the curve is flat; add smaller budgets")
    if not MIN_EXPONENT * 1.01 < theta[2] < MAX_EXPONENT * 0.99:
        raise InputError(f"beta is at its bound ({theta[2]:.3g}): the points do not follow a power law")
    fitted = log_loss(theta, data)
    noise = noise_parts(data, data.y - fitted)
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(data.budget == budget) for budget in range(len(noise.between))]
    redrawn = np.empty((num_draws, len(data.y)))  # bootstrap samples of the residuals
    for sample in redrawn:
        # A random sign keeps the deviation of a budget without bias; its seeds deviate from it in turn.
        between = rng.choice(noise.between, len(members)) * rng.choice([-1.0, 1.0], len(members))
        sample[:] = between[data.budget]
        for points, pool in zip(members, noise.within):
            sample[points] += rng.choice(pool, len(points))
    drawn = fitted + redrawn
    refits = np.array([minimise(theta, data, y, lowest, delta) for y in drawn])  # (num_draws, 3)
    draws, r2s = _uncentred(refits, data), _r2(drawn, log_loss(refits, data))
    L_inf, B, beta = map(float, _uncentred(theta, data))
    low, high = float(np.exp(data.x0 + data.x.min())), float(np.exp(data.x0 + data.x.max()))
    return Law(
        L_inf=L_inf,
        B=B,
        beta=beta,
        r2=float(_r2(data.y, fitted)),
        intervals={name: interval(draws[:, at]) for at, name in enumerate(NAMES)} | {"r2": interval(r2s)},
        noise=noise.one_run,
        num_points=len(data.y),
        num_budgets=len(np.unique(data.budget)),
        tokens_range=(low, high),
        draws=draws,
    )


def _uncentred(theta: Array, data: Data) -> Array:
    """(..., 3) in the order of NAMES, of the solver's theta."""
    L_inf, log_b, beta = np.moveaxis(theta, -1, 0)
    return np.stack([L_inf, np.exp(log_b + beta * data.x0), beta], axis=-1)


def _r2(y: Array, fitted: Array) -> Array:
    return np.asarray(1 - ((y - fitted) ** 2).sum(-1) / ((y - y.mean(-1, keepdims=True)) ** 2).sum(-1))


def _leave_largest_out(data: Data, num_draws: int, seed: int) -> Holdout:
    """Fits without the largest token budget and predicts it; with several seeds, one budget per parameter is enough."""
    left = data.budget == data.budget.max()
    x = data.x + data.x0
    rest = make_data(x[~left], data.y[~left])
    has_seeds = len(rest.y) > len(np.unique(rest.budget))
    check_budgets(rest.x, 3 if has_seeds else MIN_BUDGETS, 1.0)
    law = _fit(rest, num_draws, seed)
    tokens = float(np.exp(x[left].mean()))
    low, high = interval(np.exp(law.run_losses(tokens)))
    measured = float(np.exp(np.exp(data.y[left]).mean()))
    return Holdout(tokens, measured, predicted=float(np.exp(law.loss(tokens))), low=low, high=high)


class Data(NamedTuple):
    """Points to fit, each array (num_points,)."""

    x: Array
    """log tokens - x0."""
    y: Array
    """log loss, loss in nats."""
    budget: NDArray[np.int64]
    """Index of the distinct token budget; the points of a budget differ by seed only."""
    x0: float


def make_data(x: Array, y: Array) -> Data:
    """Centres `x` (log tokens), and numbers the budgets."""
    order = np.argsort(x, kind="stable")
    budget = np.empty(len(x), dtype=np.int64)
    budget[order] = np.cumsum(np.diff(x[order], prepend=x[order][:1]) > SAME_BUDGET)
    x0 = float(x.mean())
    return Data(x - x0, y, budget, x0)


def log_loss(theta: Array, data: Data) -> Array:
    """Log loss (..., num_points) of theta (..., 3): L_inf, log B' at the data's centre, beta."""
    L_inf, log_b, beta = np.moveaxis(theta, -1, 0)[..., None]
    return np.asarray(np.log(L_inf + np.exp(log_b - beta * data.x)))


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual) / delta
    return np.asarray(np.where(size <= 1, size**2, 2 * size - 1).sum(-1))


def minimise(theta: Array, data: Data, y: Array, lowest: float, delta: float) -> Array:
    """The minimum (3,) of the Huber loss next to `theta` (3,), by scipy's bounded least squares.

    Args:
        y: (num_points,), the log losses to fit: the data's own, or a bootstrap sample of them.
        lowest: the largest L_inf.
    """
    from scipy.optimize import least_squares  # takes as long to import as the rest of planning

    def jacobian(values: Array) -> Array:
        g = np.exp(values[1] - values[2] * data.x)
        return np.asarray(np.stack([np.ones_like(g), g, -data.x * g], axis=-1) / (values[0] + g)[:, None])

    low, high = np.array([0.0, -40.0, MIN_EXPONENT]), np.array([lowest, 10.0, MAX_EXPONENT])
    result = least_squares(
        lambda values: log_loss(values, data) - y,
        np.clip(theta, low, high),
        jac=jacobian,
        bounds=(low, high),
        method="dogbox",
        loss="huber",
        f_scale=delta,
        max_nfev=100,
    )
    return np.asarray(result.x)


def solve_from_grid(data: Data, lowest: float) -> tuple[Array, float]:
    """The minimum from the best of a grid of starts, then again with a delta that suits the residuals.

    Returns theta, (3,), and the delta, which is 1.345 robust standard deviations of the residuals, and at least
    `HUBER_DELTA`.
    """
    grid = []
    for floor in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97):
        excess = np.log(np.maximum(np.exp(data.y) - floor * lowest, 1e-3 * lowest))
        for beta in (0.1, 0.2, 0.4, 0.8, 1.6):  # with the amplitude that fits floor and exponent best
            grid.append([floor * lowest, float(np.median(excess + beta * data.x)), beta])
    starts = np.array(grid)  # (30, 3)
    best = np.argsort(_huber(log_loss(starts, data) - data.y, WIDE_DELTA), kind="stable")[:NUM_STARTS]
    solved = np.array([minimise(start, data, data.y, lowest, WIDE_DELTA) for start in starts[best]])
    theta = solved[np.argmin(_huber(log_loss(solved, data) - data.y, WIDE_DELTA))]
    residual = data.y - log_loss(theta, data)
    freedom = max(1, len(residual) - len(NAMES))
    scale = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(len(residual) / freedom)
    delta = max(HUBER_DELTA, 1.345 * scale)
    return minimise(theta, data, data.y, lowest, delta), delta


class Noise(NamedTuple):
    """The deviations that a bootstrap sample is drawn from, in log loss."""

    between: Array
    """(num_budgets,): deviation of each budget's mean from the law, beyond what its seeds explain."""
    within: list[Array]
    """One array a budget: the deviations of its seeds from their mean; of all budgets' seeds where it has only one."""

    @property
    def one_run(self) -> float:
        """Standard deviation of a single run about the law."""
        of_seeds = float(np.mean([(w**2).mean() for w in self.within]))
        return math.sqrt(float((self.between**2).mean()) + of_seeds)


def noise_parts(data: Data, residual: Array) -> Noise:
    """Splits residuals into two levels, each widened for its degrees of freedom; `between` by Student's t as well."""
    from scipy.stats import t

    groups = [residual[data.budget == budget] for budget in np.unique(data.budget)]
    means = np.array([group.mean() for group in groups])
    seeds = [(g - g.mean()) * math.sqrt(len(g) / (len(g) - 1)) for g in groups if len(g) > 1]
    pooled = np.concatenate(seeds) if seeds else np.zeros(1)
    of_seeds = iter(seeds)
    within = [next(of_seeds) if len(group) > 1 else pooled for group in groups]
    freedom = len(groups) - len(NAMES)
    spread = float(means @ means) / max(1, freedom)
    if freedom < 1 or spread == 0:  # the curve goes through every budget: only the seeds speak
        return Noise(np.zeros(len(groups)), within)
    from_seeds = float(np.mean([(w**2).mean() / len(g) for w, g in zip(within, groups)]))
    beyond = math.sqrt(max(0.0, 1 - from_seeds / spread) * len(groups) / freedom)
    student = float(t.ppf(0.95, freedom) / NormalDist().inv_cdf(0.95))
    return Noise(means * beyond * student, within)
