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
from numpy.typing import NDArray

from castlm.core.errors import InputError
from castlm.planning.law import FORMS, NAMES, Array, Holdout, Law, interval
from castlm.planning.points import Point

MIN_BUDGETS = {"loglinear": 3, "power": 4, "joint": 3}
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
}
"""Fields of a point that all points of a law share, with the remedy if they do not."""

NUM_STARTS = 5
"""Points of the grid of starts from which the solver descends: those with the smallest loss."""


def fit_law(
    points: Sequence[Point],
    form: str = "power",
    *,
    num_draws: int = 200,
    seed: int = 0,
    leave_largest_out: bool = True,
    without_largest: Law | None = None,
) -> Law:
    """Fits `form` to `points` of one method (and, unless `joint`, of one model size).

    The objective is the Huber loss of the residuals of log loss, minimised from the best of a grid of starts as in
    Hoffmann et al. (2022), Approach 3. Its delta is 1.345 robust standard deviations of the residuals of a first pass,
    and at least their 1e-3. Amplitudes are fitted as logs, at the geometric mean of the token budgets; L_inf is fitted
    as it is, so that a fit at its bound 0 can be detected. Bounds: 0 <= L_inf <= the lowest loss (mean over seeds),
    0.01 <= beta, a <= 4.

    Intervals (90 %) come from `num_draws` refits to data drawn around the fitted law: deviations between seeds are
    resampled within their token budget, and the remaining scatter of the means is resampled over token budgets. Both
    are corrected for the degrees of freedom of the fit, the latter also by Student's t, so an interval is wide if there
    is only one budget more than there are parameters.

    Args:
        leave_largest_out: whether a law of the other budgets predicts the largest, as `Law.holdout`.
        without_largest: that law, if an earlier call fitted it.

    Raises:
        InputError: fewer than 3 (loglinear, joint) or 4 (power) distinct budgets; budgets within a factor of
            `MIN_SPREAD`; for joint fewer than 3 sizes or 6 (size, budget) pairs, or sizes and budgets that grow
            together; several methods, patterns, base models or sizes mixed; a value that is not finite and positive;
            loss that does not fall with tokens; L_inf or an exponent at its bound.
    """
    # In one order: the draws of the intervals go through the points, so the order of files would change their digits.
    points = sorted(points, key=lambda point: (point.params or 0, point.tokens, point.seed or 0, point.perplexity))
    data = _as_data(points, form)
    _check_design(data, form, MIN_BUDGETS[form], MIN_SPREAD)
    law = replace(_fit(data, form, num_draws, seed), runs_of=_common(points))
    if not leave_largest_out:
        return law
    try:
        return replace(law, holdout=_leave_largest_out(data, form, num_draws, seed, without_largest))
    except InputError as error:
        return replace(law, holdout_reason=str(error))


def _as_data(points: Sequence[Point], form: str) -> Data:
    for point in points:
        values = (point.tokens, point.perplexity, 1.0 if point.params is None else point.params)
        if not all(math.isfinite(value) and value > 0 for value in values) or point.perplexity <= 1:
            raise InputError(
                f"{point.source or 'a point'}: tokens {point.tokens:g}, perplexity {point.perplexity:g}, params "
                f"{point.params}: positive finite numbers and a perplexity above 1 are needed"
            )
    for name, remedy in _SHARED.items():
        if len(values_of := _named(points, name)) > 1:
            raise InputError(
                f"points of {len(values_of)} values of {name} ({'; '.join(values_of)}): a law holds for one; {remedy}"
            )
    _check_models(points, form)
    sizes = {point.params for point in points}
    if form == "joint" and None in sizes:
        raise InputError("the joint form needs params of every point; add the column, or use form power")
    if form != "joint" and len(sizes - {None}) > 1:
        raise InputError(f"points of {len(sizes)} model sizes: use form joint, or give one size at a time")
    x = np.log([point.tokens for point in points])
    z = np.log([point.params or 1.0 for point in points]) * (form == "joint")
    return make_data(x, z, np.log(np.log([point.perplexity for point in points])))


def _named(points: Sequence[Point], field: str) -> list[str]:
    """The values of a field of `points`, of those that have one."""
    return sorted({value for point in points if (value := getattr(point, field))})


def _common(points: Sequence[Point]) -> dict[str, str]:
    """`Law.runs_of`; a joint law has several base models."""
    known = {name: _named(points, name) for name in (*_SHARED, "base_model")}
    return {name: " and ".join(values) for name, values in known.items() if values}


def _check_models(points: Sequence[Point], form: str) -> None:
    """Raises `InputError` for points of several dense models, or of one size in a joint law."""
    first: dict[float | None, Point] = {}
    for point in filter(lambda point: point.base_model, points):
        other = first.setdefault(point.params if form == "joint" else None, point)
        if not point.is_of_the_model_of(other):
            raise InputError(
                f"{other.source} is a run of {other.base_model} (dense perplexity {other.dense}), and {point.source} "
                f"of {point.base_model} ({point.dense}): a law holds for one model"
            )


def _check_design(data: Data, form: str, min_budgets: int, min_spread: float) -> None:
    num_budgets, num_sizes, num_cells = (len(np.unique(v)) for v in (data.budget, data.z, data.cell))
    if num_budgets < min_budgets:
        raise InputError(f"the {form} form needs {min_budgets} distinct token budgets, found {num_budgets}; add runs")
    if (spread := math.exp(np.ptp(data.x))) < min_spread * (1 - 1e-9):
        raise InputError(
            f"budgets span a factor of {spread:.3g}, {min_spread:g} is the least; add a larger or smaller one"
        )
    if form == "joint" and (num_sizes < 3 or num_cells < 6):
        raise InputError(
            f"the joint form needs 3 sizes and 6 different (size, budget) pairs, found {num_sizes} and {num_cells}"
        )
    if form == "joint" and abs(np.corrcoef(data.x, data.z)[0, 1]) > 0.95:
        raise InputError("sizes and budgets grow together, their effects cannot be told apart; vary one of them alone")
    within = data.x.copy()  # runs are compared within a size
    for size in np.unique(data.z):
        within[data.z == size] -= within[data.z == size].mean()
    if not float(within @ data.y) < 0:
        raise InputError(
            "perplexity does not fall with tokens: no law to fit; are all runs of one model, text and method?"
        )


def _fit(data: Data, form: str, num_draws: int, seed: int) -> Law:
    """The point estimate and its bootstrap, after `_check_design`."""
    free = [NAMES.index(name) for name in FORMS[form]]
    lowest = math.exp(min(data.y[data.cell == cell].mean() for cell in np.unique(data.cell)))
    theta, delta = solve_from_grid(data, free, lowest)
    _check_bounds(theta, free, lowest)
    fitted = log_loss(theta, data)
    noise = noise_parts(data, data.y - fitted, len(free))
    rng = np.random.default_rng(seed)
    drawn = fitted + np.array([redraw(data, noise, rng) for _ in range(num_draws)])  # (num_draws, num_points)
    refits = np.array([minimise(theta, data, y, free, lowest, delta) for y in drawn])  # (num_draws, 5)
    draws, r2s = _uncentred(refits, data), _r2(drawn, log_loss(refits, data))
    L_inf, B, beta, A, a = map(float, _uncentred(theta, data))
    low, high = float(np.exp(data.x0 + data.x.min())), float(np.exp(data.x0 + data.x.max()))
    return Law(
        form=form,
        L_inf=L_inf,
        B=B,
        beta=beta,
        A=A,
        a=a,
        r2=float(_r2(data.y, fitted)),
        intervals={name: interval(draws[:, NAMES.index(name)]) for name in FORMS[form]} | {"r2": interval(r2s)},
        noise=noise.one_run,
        noise_of_budget=noise.of_budget,
        num_points=len(data.y),
        num_budgets=len(np.unique(data.budget)),
        tokens_range=(low, high),
        draws=draws,
    )


def _check_bounds(theta: Array, free: list[int], lowest: float) -> None:
    if 0 in free and theta[0] < 1e-3 * lowest:
        raise InputError("L_inf is at its bound 0: these budgets show no floor; add larger ones, or use form loglinear")
    if 0 in free and theta[0] > (1 - 1e-3) * lowest:
        raise InputError(f"L_inf is at its bound, the lowest loss {lowest:.4f}: the curve is flat; add smaller budgets")
    for index in {2, 4} & set(free):
        if not MIN_EXPONENT * 1.01 < theta[index] < MAX_EXPONENT * 0.99:
            raise InputError(f"{NAMES[index]} is at its bound ({theta[index]:.3g}): the points do not follow this form")


def _uncentred(theta: Array, data: Data) -> Array:
    """(..., 5) in the order of NAMES, of the solver's theta."""
    L_inf, log_b, beta, log_a, a = np.moveaxis(theta, -1, 0)
    return np.stack([L_inf, np.exp(log_b + beta * data.x0), beta, np.exp(log_a + a * data.z0), a], axis=-1)


def _r2(y: Array, fitted: Array) -> Array:
    return np.asarray(1 - ((y - fitted) ** 2).sum(-1) / ((y - y.mean(-1, keepdims=True)) ** 2).sum(-1))


def _leave_largest_out(data: Data, form: str, num_draws: int, seed: int, law: Law | None) -> Holdout:
    """Fits without the largest token budget and predicts it; with several seeds, one budget per parameter is enough."""
    left = data.budget == data.budget.max()
    x, z, y = data.x + data.x0, data.z + data.z0, data.y
    if law is None or law.num_points != np.count_nonzero(~left):
        rest = make_data(x[~left], z[~left], y[~left])
        repeated = len(rest.y) > len(np.unique(rest.cell))
        _check_design(rest, form, 3 if form == "power" and repeated else MIN_BUDGETS[form], 1.0)
        law = _fit(rest, form, num_draws, seed)
    x_left, params = float(np.exp(x[left].mean())), np.exp(z[left])
    size = float(params[0]) if len(set(params)) == 1 else None
    if size is None:  # a joint law: the largest budget of the largest size
        keep = params == params.max()
        left[np.flatnonzero(left)[~keep]] = False
        size = float(params.max())
    low, high = interval(np.exp(law.run_losses(x_left, size)))
    measured = np.exp(np.exp(y[left]))
    return Holdout(
        tokens=x_left,
        perplexity=float(np.exp(np.log(measured).mean())),
        predicted=float(np.exp(law.loss(x_left, size))),
        low=low,
        high=high,
        inside=float(((measured >= low) & (measured <= high)).mean()),
        num_budgets=law.num_budgets,
    )


class Data(NamedTuple):
    """Points to fit, each array (num_points,)."""

    x: Array
    """log tokens - x0."""
    z: Array
    """log params - z0; zeros if the form ignores the size."""
    y: Array
    """log loss, loss in nats."""
    budget: NDArray[np.int64]
    """Index of the distinct token budget."""
    cell: NDArray[np.int64]
    """Index of the distinct (budget, size); the points of a cell differ by seed only."""
    x0: float
    z0: float


def make_data(x: Array, z: Array, y: Array) -> Data:
    """Centres `x` (log tokens) and `z` (log params), and numbers the budgets and cells."""
    order = np.argsort(x, kind="stable")
    budget = np.empty(len(x), dtype=np.int64)
    budget[order] = np.cumsum(np.diff(x[order], prepend=x[order][:1]) > SAME_BUDGET)
    size = np.unique(z, return_inverse=True)[1]
    cell = np.unique(budget * (len(x) + 1) + size, return_inverse=True)[1]
    x0, z0 = float(x.mean()), float(z.mean())
    return Data(x - x0, z - z0, y, budget, cell, x0, z0)


def log_loss(theta: Array, data: Data) -> Array:
    """Log loss (..., num_points) of theta (..., 5): L_inf, log B', beta, log A', a, amplitudes at the data's centre."""
    L_inf, log_b, beta, log_a, a = np.moveaxis(theta, -1, 0)[..., None]
    return np.asarray(np.log(L_inf + np.exp(log_b - beta * data.x) + np.exp(log_a - a * data.z)))


def _jacobian(theta: Array, data: Data) -> Array:
    """(..., num_points, 5)."""
    L_inf, log_b, beta, log_a, a = np.moveaxis(theta, -1, 0)[..., None]
    g, h = np.exp(log_b - beta * data.x), np.exp(log_a - a * data.z)
    parts = np.stack([np.ones_like(g), g, -data.x * g, h, -data.z * h], axis=-1)
    return np.asarray(parts / (L_inf + g + h)[..., None])


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual) / delta
    return np.asarray(np.where(size <= 1, size**2, 2 * size - 1).sum(-1))


def _bounds(lowest: float) -> tuple[Array, Array]:
    low = np.array([0.0, -40.0, MIN_EXPONENT, -40.0, MIN_EXPONENT])
    return low, np.array([lowest, 10.0, MAX_EXPONENT, 10.0, MAX_EXPONENT])


def minimise(theta: Array, data: Data, y: Array, free: list[int], lowest: float, delta: float) -> Array:
    """The minimum (5,) of the Huber loss next to `theta` (5,), by scipy's bounded least squares.

    Args:
        y: (num_points,), the log losses to fit: the data's own, or a bootstrap sample of them.
        free: the parameters to fit, as places in NAMES; the others stay as they are in `theta`.
    """
    from scipy.optimize import least_squares  # takes as long to import as the rest of planning

    def full(values: Array) -> Array:
        whole = theta.copy()
        whole[free] = values
        return whole

    low, high = (bound[free] for bound in _bounds(lowest))
    result = least_squares(
        lambda values: log_loss(full(values), data) - y,
        np.clip(theta[free], low, high),
        jac=lambda values: _jacobian(full(values), data)[:, free],
        bounds=(low, high),
        method="dogbox",
        loss="huber",
        f_scale=delta,
        max_nfev=100,
    )
    return full(result.x)


def solve_from_grid(data: Data, free: list[int], lowest: float) -> tuple[Array, float]:
    """The minimum from the best of a grid of starts, then again with a delta that suits the residuals.

    Returns:
        theta, (5,), and the delta: 1.345 robust standard deviations of the residuals, at least `HUBER_DELTA`.
    """
    starts = np.array(_grid(data, free, lowest))  # (num_starts, 5)
    best = np.argsort(_huber(log_loss(starts, data) - data.y, WIDE_DELTA), kind="stable")[:NUM_STARTS]
    solved = np.array([minimise(start, data, data.y, free, lowest, WIDE_DELTA) for start in starts[best]])
    theta = solved[np.argmin(_huber(log_loss(solved, data) - data.y, WIDE_DELTA))]
    residual = data.y - log_loss(theta, data)
    freedom = max(1, len(residual) - len(free))
    scale = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(len(residual) / freedom)
    delta = max(HUBER_DELTA, 1.345 * scale)
    return minimise(theta, data, data.y, free, lowest, delta), delta


def _grid(data: Data, free: list[int], lowest: float) -> list[Array]:
    """Floors x exponents (x shares of the excess loss that are the size's), with the amplitudes that fit them best."""
    floors = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97) if 0 in free else (0.0,)
    shares = (0.2, 0.5, 0.8) if 3 in free else (0.0,)
    exponents = (0.1, 0.2, 0.4, 0.8, 1.6)
    starts = []
    for floor in floors:
        excess = np.log(np.maximum(np.exp(data.y) - floor * lowest, 1e-3 * lowest))
        for beta in exponents:
            for share in shares:
                log_b = math.log(1 - share) + float(np.median(excess + beta * data.x))
                for a in exponents if share else (0.0,):
                    log_a = math.log(share) + float(np.median(excess + a * data.z)) if share else -math.inf
                    starts.append(np.array([floor * lowest, log_b, beta, log_a, a]))
    return starts


class Noise(NamedTuple):
    """The deviations that a bootstrap sample is drawn from, in log loss."""

    between: Array
    """(num_cells,): deviation of each cell's mean from the law, beyond what its seeds explain."""
    within: list[Array]
    """One array a cell: the deviations of its seeds from their mean (of all cells' seeds, where it has only one)."""

    @property
    def one_run(self) -> float:
        """Standard deviation of a single run about the law."""
        return math.hypot(self.of_budget, math.sqrt(float(np.mean([(w**2).mean() for w in self.within]))))

    @property
    def of_budget(self) -> float:
        """The part that the runs of one cell share."""
        return math.sqrt(float((self.between**2).mean()))


def noise_parts(data: Data, residual: Array, num_free: int) -> Noise:
    """Splits residuals into two levels, each widened for its degrees of freedom; `between` by Student's t as well."""
    from scipy.stats import t

    cells = np.unique(data.cell)
    groups = [residual[data.cell == cell] for cell in cells]
    means = np.array([group.mean() for group in groups])
    seeds = [(g - g.mean()) * math.sqrt(len(g) / (len(g) - 1)) for g in groups if len(g) > 1]
    pooled = np.concatenate(seeds) if seeds else np.zeros(1)
    of_seeds = iter(seeds)
    within = [next(of_seeds) if len(group) > 1 else pooled for group in groups]
    freedom = len(cells) - num_free
    spread = float(means @ means) / max(1, freedom)
    if freedom < 1 or spread == 0:  # the curve goes through every budget: only the seeds speak
        return Noise(np.zeros(len(cells)), within)
    from_seeds = float(np.mean([(w**2).mean() / len(g) for w, g in zip(within, groups)]))
    beyond = math.sqrt(max(0.0, 1 - from_seeds / spread) * len(cells) / freedom)
    student = float(t.ppf(0.95, freedom) / NormalDist().inv_cdf(0.95))
    return Noise(means * beyond * student, within)


def redraw(data: Data, noise: Noise, rng: np.random.Generator) -> Array:
    """One bootstrap sample of the residuals, (num_points,); random signs keep it without bias."""
    size = len(noise.between)
    sample: Array = (rng.choice(noise.between, size) * rng.choice([-1.0, 1.0], size))[data.cell]
    for cell, pool in enumerate(noise.within):
        members = np.flatnonzero(data.cell == cell)
        sample[members] += rng.choice(pool, len(members))
    return sample
