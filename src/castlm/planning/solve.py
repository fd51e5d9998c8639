"""The numerical part of a law's fit: robust least squares over a grid of starts, and the bootstrap of its residuals.

Everything here works on centred logs, where amplitude and exponent are nearly uncorrelated; `law.py` knows the meaning.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_EXPONENT, MAX_EXPONENT = 0.01, 4.0
WIDE_DELTA, HUBER_DELTA = 2e-2, 1e-3
"""Of the first pass, and the least of the second: residuals of log loss. 1e-3 is that of Hoffmann et al. (2022)."""
SAME_BUDGET = 0.02
"""Budgets within 2 % count as one."""


class Data(NamedTuple):
    """Points to fit, each array (num_points,)."""

    x: Array
    """log tokens - x0."""
    z: Array
    """log params - z0; zeros when the size plays no part."""
    y: Array
    """log loss, loss in nats."""
    budget: NDArray[np.int64]
    """Index of the distinct token budget."""
    cell: NDArray[np.int64]
    """Index of the distinct (budget, size); the points of a cell differ by seed only."""
    x0: float
    z0: float


def make_data(x: Array, z: Array, y: Array) -> Data:
    """Centre `x` (log tokens) and `z` (log params), and number the budgets and cells."""
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
    return np.log(L_inf + np.exp(log_b - beta * data.x) + np.exp(log_a - a * data.z))


def _jacobian(theta: Array, data: Data) -> Array:
    """(..., num_points, 5)."""
    L_inf, log_b, beta, log_a, a = np.moveaxis(theta, -1, 0)[..., None]
    g, h = np.exp(log_b - beta * data.x), np.exp(log_a - a * data.z)
    parts = np.stack([np.ones_like(g), g, -data.x * g, h, -data.z * h], axis=-1)
    return parts / (L_inf + g + h)[..., None]


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual) / delta
    return np.where(size <= 1, size**2, 2 * size - 1).sum(-1)


def _bounds(lowest: float) -> tuple[Array, Array]:
    low = np.array([0.0, -40.0, MIN_EXPONENT, -40.0, MIN_EXPONENT])
    return low, np.array([lowest, 10.0, MAX_EXPONENT, 10.0, MAX_EXPONENT])


def descend(theta: Array, data: Data, y: Array, free: list[int], lowest: float, delta: float) -> Array:
    """Minimise the Huber loss from each row of `theta` (num, 5) at once: Levenberg-Marquardt on its reweighted squares.

    A parameter at its bound is held there while the gradient points outwards. `y`: (num_points,) or (num, num_points).
    """
    low, high = (bound[free] for bound in _bounds(lowest))
    theta = theta.copy()
    theta[:, free] = np.clip(theta[:, free], low, high)
    damping = np.full(len(theta), 1e-3)
    cost = _huber(log_loss(theta, data) - y, delta)
    for _ in range(200):
        residual, jacobian = log_loss(theta, data) - y, _jacobian(theta, data)[..., free]
        weighted = jacobian * np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))[..., None]
        gradient = np.einsum("kip,ki->kp", weighted, residual)
        held = ((theta[:, free] <= low) & (gradient > 0)) | ((theta[:, free] >= high) & (gradient < 0))
        normal = np.einsum("kip,kiq->kpq", weighted, jacobian) * (~held[:, :, None] & ~held[:, None, :])
        diagonal = np.einsum("kpp->kp", normal)  # a view
        diagonal += damping[:, None] * diagonal + 1e-14 + held
        step = np.linalg.solve(normal, -np.where(held, 0, gradient)[..., None])[..., 0]
        trial = theta.copy()
        trial[:, free] = np.clip(theta[:, free] + step, low, high)
        trial_cost = _huber(log_loss(trial, data) - y, delta)
        better = trial_cost < cost
        gain = np.where(better, cost - trial_cost, 0.0)
        theta = np.where(better[:, None], trial, theta)
        damping = np.where(better, damping / 8, damping * 4)
        done = np.where(better, gain <= 1e-9 * cost, damping > 1e8) | (cost < 1e-18)
        cost = np.where(better, trial_cost, cost)
        if done.all():
            break
    return theta


def polish(theta: Array, data: Data, free: list[int], lowest: float, delta: float) -> Array:
    """The minimum of the Huber loss next to `theta` (5,), by scipy's bounded least squares."""
    from scipy.optimize import least_squares  # takes as long to import as the rest of planning

    def full(values: Array) -> Array:
        whole = theta.copy()
        whole[free] = values
        return whole

    low, high = (bound[free] for bound in _bounds(lowest))
    result = least_squares(
        lambda values: log_loss(full(values), data) - data.y,
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
    """Multi-start from a grid, then again with a delta that suits the residuals, polished by scipy.

    Returns:
        theta, (5,), and that delta: 1.345 robust standard deviations of the residuals, at least `HUBER_DELTA`.
    """
    solved = descend(np.array(_grid(data, free, lowest)), data, data.y, free, lowest, WIDE_DELTA)
    theta = solved[np.argmin(_huber(log_loss(solved, data) - data.y, WIDE_DELTA))]
    residual = data.y - log_loss(theta, data)
    freedom = max(1, len(residual) - len(free))
    scale = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(len(residual) / freedom)
    delta = max(HUBER_DELTA, 1.345 * scale)
    (theta,) = descend(theta[None], data, data.y, free, lowest, delta)
    return polish(theta, data, free, lowest, delta), delta


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
    """What a bootstrap sample is drawn from; standard deviations are those of log loss."""

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
        """The part of it that the runs of one cell share."""
        return math.sqrt(float((self.between**2).mean()))


def noise_parts(data: Data, residual: Array, num_free: int) -> Noise:
    """Split residuals into two levels, each widened for its degrees of freedom; `between` by Student's t as well."""
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
    sample = (rng.choice(noise.between, size) * rng.choice([-1.0, 1.0], size))[data.cell]
    for cell, pool in enumerate(noise.within):
        members = np.flatnonzero(data.cell == cell)
        sample[members] += rng.choice(pool, len(members))
    return sample
