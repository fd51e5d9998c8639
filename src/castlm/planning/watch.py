"""Extrapolates a running run to its end, from its own prune-now perplexities.

Once the decay has brought the masked weights to zero, the kept weights recover: log loss falls roughly linearly with
the log of the tokens since then. The curve before that point has another shape and is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castlm.core.decay import DECAYS
from castlm.core.errors import DivergedError, InputError
from castlm.files.reading import user_path
from castlm.files.yaml_file import read_yaml_mapping
from castlm.planning.fit import fit_law
from castlm.planning.law import Law, interval
from castlm.planning.points import Point
from castlm.planning.solve import SAME_BUDGET
from castlm.training.config import flatten
from castlm.training.metrics_file import evaluations, has_finite_perplexity, read_metrics

MIN_POINTS = 3
MIN_SPREAD = 1.2


@dataclass(frozen=True)
class WatchReport:
    """The extrapolation to the end of the run: perplexities of the pruned model, `low` to `high` is a 90 % interval."""

    verdict: str
    """One of: too early, no target, on target, uncertain, will miss."""
    message: str
    final_tokens: float
    num_used: int
    num_excluded: int
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    form: str | None = None


def extrapolate_run(
    rows: Sequence[Mapping[str, Any]],
    *,
    total_steps: int | None = None,
    final_tokens: float | None = None,
    target_ppl: float | None = None,
    decay: str | None = "horizon",
) -> WatchReport:
    """Extrapolate the prune-now curve of a run to its end.

    The power law is fitted over the tokens since the end of the decay, or the loglinear law if the points show no
    floor. The interval covers the intervals of two fits, to all points and (from six points on) to their later half,
    whose disagreement shows how far the curve is from the law. Of evaluations that are less than 2 % apart in tokens,
    the last is fitted: a fit takes them for runs of one budget with different seeds, while neighbours on one curve
    share most of their noise.

    Args:
        rows: evaluation rows in order, as `evaluations` gives them: `step`, `tokens`, `prune_now_ppl`, `alpha`.
        total_steps, final_tokens: the end of the run; one of them is needed.
        target_ppl: the perplexity that the run should reach.
        decay: decay of the run. "horizon" ends before the run does, and only the curve after it is used; any other
            decay lasts until the end (None: a method without decay), and the whole curve is used.

    Raises:
        InputError: no end given, a row that lacks a field or holds another value than a finite number, or a target that
            is not a finite number above 1.
    """
    for number, row in enumerate(rows, 1):
        if missing := [key for key in ("step", "tokens", "prune_now_ppl") if key not in row]:
            raise InputError(f"evaluation {number} has no {', '.join(missing)}: is it a row of castlm's metrics.jsonl?")
        for key in ("step", "tokens", "prune_now_ppl", "alpha"):
            value = row.get(key, 0)
            least = -1 if key == "alpha" else 0  # alpha is below 0 in the first step
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e300:
                raise InputError(f"evaluation {number} has {key} {value!r}: a finite number was expected")
    if target_ppl is not None and not 1 < target_ppl < math.inf:
        raise InputError(f"the target perplexity must be above 1, got {target_ppl:g}")
    if final_tokens is None:
        final_tokens = _tokens_at(rows, total_steps)
    start, used, note = _healing(rows, decay)
    excluded = len(rows) - len(used)
    if len(used) < MIN_POINTS:
        message = (
            f"too early: {len(used)} evaluations {note}, {MIN_POINTS} are needed ({excluded} before that are left out)"
        )
        return WatchReport("too early", message, final_tokens, len(used), excluded)
    points = _spaced([Point(row["tokens"] - start, row["prune_now_ppl"]) for row in used])
    try:
        laws = [_fit(points)]
        if len(points) >= 2 * MIN_POINTS:
            laws.append(_fit(points[len(points) // 2 :]))
    except InputError as error:
        return WatchReport("too early", f"too early: {error}", final_tokens, len(used), excluded)
    left = max(final_tokens, used[-1]["tokens"]) - start
    spans = [interval(np.exp(law.run_losses(left))) for law in laws]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    predicted = float(np.exp(laws[0].loss(left)))
    verdict, judgement = _judge(target_ppl, low, high)
    message = (
        f"{verdict}: perplexity {predicted:.4g} (90 %: {low:.4g} to {high:.4g}) at {final_tokens:.3g} tokens"
        f"{judgement}, from {len(used)} evaluations {note} ({excluded} left out), {laws[0].form} law"
    )
    return WatchReport(verdict, message, final_tokens, len(used), excluded, predicted, low, high, laws[0].form)


def watch_run(run: str | Path, target_ppl: float | None = None) -> WatchReport:
    """`extrapolate_run` of a run folder: metrics.jsonl for the curve, config.yaml for its end and its decay.

    Raises:
        InputError: no readable metrics.jsonl or config.yaml in it, or no evaluation yet.
        DivergedError: the last evaluation found a perplexity that is not finite.
    """
    path = user_path(run) / "config.yaml"
    try:
        config = flatten(read_yaml_mapping(path), str(path))
        total_steps, decay = int(config["max_steps"]), str(config["decay"])
        decay = decay if config["method"] == "cast" and DECAYS[decay].reduces else None
    except (InputError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{run} is not the folder of a run: {path} cannot be read ({error})") from error
    metrics = read_metrics(run)
    last = next((row for row in reversed(metrics) if "prune_now_ppl" in row), None)
    if last is not None and not has_finite_perplexity(last):
        raise DivergedError(f"the perplexity of step {last['step']} is not finite: the run has diverged")
    return extrapolate_run(evaluations(metrics), total_steps=total_steps, target_ppl=target_ppl, decay=decay)


def backtest_run(
    rows: Sequence[Mapping[str, Any]],
    fractions: Sequence[float] = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    decay: str | None = "horizon",
) -> list[tuple[float, WatchReport, float]]:
    """The reports that `extrapolate_run` would have given during a finished run, at fractions of its steps.

    Returns:
        A tuple (fraction, report, measured) for each; `measured` is the final perplexity of the run.
    """
    if not rows:
        raise InputError("the run has no evaluation")
    last = rows[-1]
    reports = []
    for fraction in fractions:
        seen = [row for row in rows if row["step"] <= fraction * last["step"]]
        report = extrapolate_run(seen, final_tokens=last["tokens"], decay=decay)
        reports.append((fraction, report, float(last["prune_now_ppl"])))
    return reports


def _tokens_at(rows: Sequence[Mapping[str, Any]], total_steps: int | None) -> float:
    """Tokens at step `total_steps`, from the tokens per step so far."""
    if total_steps is None:
        raise InputError("the end of the run is not known: give total_steps or final_tokens")
    if not rows or rows[-1]["step"] < 1:
        raise InputError("the run has no evaluation after its first step yet: try again later")
    return float(rows[-1]["tokens"] / rows[-1]["step"] * total_steps)


def _healing(rows: Sequence[Mapping[str, Any]], decay: str | None) -> tuple[float, list[Mapping[str, Any]], str]:
    """The number of tokens at which the fitted part of the curve starts, its rows, and a description of them."""
    if decay is None or not DECAYS[decay].uses_decay_end or not any("alpha" in row for row in rows):
        words = f"of the whole curve (decay {decay!r} lasts until the end)" if decay else "of the whole curve"
        return 0.0, [row for row in rows if row["tokens"] > 0], words
    ramp = [row for row in rows if row.get("alpha", 0.0) < 1]
    healing = [row for row in rows if row.get("alpha", 0.0) >= 1]
    words = "after the decay ended"
    started = [row for row in ramp if row.get("alpha", 0.0) > 0]
    if not healing or not started:
        return (ramp[-1]["tokens"] if ramp else 0.0), healing, words
    last = started[-1]  # alpha in a row is the value at the start of its step, (step - 1) / end
    end = (last["step"] - 1) / last["alpha"] * last["tokens"] / last["step"]
    return min(max(end, last["tokens"]), healing[0]["tokens"] * (1 - 1e-9)), healing, words


def _spaced(points: Sequence[Point]) -> list[Point]:
    """Those of `points`, whose tokens ascend, that a fit counts as distinct budgets; the last is among them."""
    kept: list[Point] = []
    for point in reversed(points):
        if not kept or math.log(kept[-1].tokens / point.tokens) > SAME_BUDGET:
            kept.append(point)
    return kept[::-1]


def _fit(points: Sequence[Point]) -> Law:
    options: dict[str, Any] = {"leave_largest_out": False, "min_spread": MIN_SPREAD}
    try:
        return fit_law(points, "power", **options)
    except InputError:
        return fit_law(points, "loglinear", **options)


def _judge(target_ppl: float | None, low: float, high: float) -> tuple[str, str]:
    if target_ppl is None:
        return "no target", ""
    if low > target_ppl:
        return "will miss", f", above the target {target_ppl:g}: a longer run is needed"
    if high <= target_ppl:
        return "on target", f", within the target {target_ppl:g}"
    return "uncertain", f", around the target {target_ppl:g}"
