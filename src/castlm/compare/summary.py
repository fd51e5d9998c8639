"""What a comparison found: a row for each variant and token budget, with figures over seeds, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.compare.settings import options_of, start_of

if TYPE_CHECKING:
    from castlm.compare.results import Result


class Spread(NamedTuple):
    """A figure over seeds. `std` is the sample standard deviation; None for a single seed."""

    mean: float
    std: float | None
    values: tuple[float, ...]

    def show(self, form: str) -> str:
        return format(self.mean, form) + ("" if self.std is None else f" ± {format(self.std, form.lstrip('+'))}")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and standard deviation of the values that are not None; None if there are none."""
    found = tuple(float(v) for v in values if v is not None)
    if not found:
        return None
    has_deviation = len(found) > 1 and all(map(math.isfinite, found))
    return Spread(statistics.fmean(found), statistics.stdev(found) if has_deviation else None, found)


def summarize(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each variant and token budget, in the order of `results`. Figures are `Spread` over the seeds, or None.

    `gap` is ln(perplexity / perplexity of the dense control with the same token budget and seed), after the prune. The
    control is the variant "dense", or else the first variant of that method; a run of it that diverged is none.
    One-shot methods have no budget; they are compared with the control of the largest one. A control of another seed is
    never used, except for methods that do not depend on the seed: these are compared with the mean of the controls.
    """
    final = [r for r in results if not r.trial]
    dense = [r.run.variant for r in final if r.run.config["method"] == "dense"]
    control = "dense" if "dense" in dense else next(iter(dense), None)
    controls = {
        (r.run.tokens, r.run.seed): r.perplexity
        for r in final
        if r.run.variant == control and math.isfinite(r.perplexity) and not diverged(r)
    }
    largest = max((tokens for tokens, _ in controls), default=0)
    untouched = untouched_perplexity(final)
    options = options_of({r.run.variant: r.run.config for r in final})
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in final:
        groups.setdefault((result.run.variant, result.run.tokens), []).append(result)
    return [_row(group, controls, largest, untouched, options[name]) for (name, _), group in groups.items()]


def _row(
    group: list[Result],
    controls: dict[tuple[int, int], float],
    largest: int,
    untouched: float | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    run = group[0].run
    done = [r for r in group if "error" not in r.record]

    def control(result: Result) -> float | None:
        budget = result.run.tokens or largest
        if result.run.config["method"] == "magnitude":
            of_budget = spread(v for (tokens, _), v in controls.items() if tokens == budget)
            return None if of_budget is None else of_budget.mean
        return controls.get((budget, result.run.seed))

    def over(value: Callable[[Result], float | None]) -> Spread | None:
        return spread(value(r) for r in done)

    def ratio(result: Result, base: float | None) -> float | None:
        return math.log(result.perplexity / base) if base else None

    return {
        "variant": run.variant,
        "method": run.config["method"],
        "tokens": run.tokens,
        "learning_rate": run.config.get("learning_rate"),
        "start": start_of(run.config),
        "options": options,
        "seeds": [r.run.seed for r in done],
        "before_prune": over(lambda r: r.record["perplexity"].get("before_prune")),
        "pruned": over(lambda r: r.perplexity),
        "gap": over(lambda r: ratio(r, control(r))),
        "gap_untouched": over(lambda r: ratio(r, untouched)),
        **{
            key: over(lambda r, key=key: r.record.get("mask", {}).get(key))
            for key in ("flip_rate", "initial_flip_rate", "sparse_weight_ratio")
        },
        **{key: over(lambda r, key=key: r.record.get(key)) for key in ("train_seconds", "peak_memory_bytes")},
        "start_tokens": over(lambda r: (r.record.get("start") or {}).get("calibration_tokens")),
        "start_seconds": over(lambda r: _start_seconds(r.record.get("start") or {})),
        "zero_shot": _zero_shot(done),
        "diverged": [f"seed {r.run.seed}: {r.record['verdict']['reason']}" for r in done if diverged(r)],
        "errors": [f"seed {r.run.seed}: {r.record['error']}" for r in group if "error" in r.record],
    }


def _start_seconds(start: dict[str, Any]) -> float | None:
    """What the start took: the change of the basis and the pruning with its reconstruction."""
    parts = [(start.get("basis") or {}).get("seconds"), start.get("prune_seconds")]
    known = [float(part) for part in parts if part is not None]
    return sum(known) if known else None


def diverged(result: Result) -> bool:
    """Whether a run ended worse than it began, by its own verdict."""
    return not result.record.get("verdict", {}).get("ok", True)


def _zero_shot(done: list[Result]) -> dict[str, Spread | None]:
    """Accuracies over seeds by "task metric"."""
    by_name: dict[str, list[float]] = {}
    for result in done:
        for row in result.zero_shot:
            by_name.setdefault(f"{row['task']} {row['metric']}", []).append(row["value"])
    return {name: spread(values) for name, values in by_name.items()}


def untouched_perplexity(results: list[Result]) -> float | None:
    """Perplexity of the dense model, from the first run that measured it."""
    return next((r.record["perplexity"]["dense"] for r in results if "dense" in r.record.get("perplexity", {})), None)


def ranked(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of the rows of the largest budget and of one-shot methods that have a gap, the smallest gap first."""
    largest = max((row["tokens"] for row in rows), default=0)
    rivals = [i for i, r in enumerate(rows) if r["gap"] and r["method"] != "dense" and r["tokens"] in (0, largest)]
    return sorted(rivals, key=lambda number: rows[number]["gap"].mean)


def verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence: which row is best, by how much, and whether that is more than the spread over seeds."""
    if not (order := ranked(rows)):
        return "No result can be compared with a dense control yet."
    best, *others = (rows[number] for number in order)
    largest = max(row["tokens"] for row in rows)
    budget = f"At {largest:,} training tokens, " if largest else ""
    gap = best["gap"].show("+.4f")
    text = f"{budget}{best['variant']} has the smallest gap to the dense control, {gap} nats per token"
    if not others:
        return f"{text}."
    second = others[0]
    ahead = second["gap"].mean - best["gap"].mean
    text += f"; {second['variant']} is {ahead:.4f} behind"
    stds = [row["gap"].std for row in (best, second)]
    if None in stds:
        return f"{text}; without a second seed of both, the difference may be chance."
    if ahead <= max(stds):
        return f"{text}, which is within the standard deviation over seeds: the two are level."
    return f"{text}, more than the standard deviation over seeds ({max(stds):.4f})."


def starts_note(rows: list[dict[str, Any]]) -> str:
    """Whether the trained methods had the same start."""
    starts = {row["start"] for row in rows if row["tokens"] and row["start"] != "dense"}
    if len(starts) > 1:
        return f"The starts differ ({', '.join(sorted(starts))}): compare methods only within one start."
    return f"Every method that trains from a pruned start had the same one: {starts.pop()}." if starts else ""
