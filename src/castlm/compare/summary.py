"""The result of a comparison: a row for each variant and token budget, with its start, its options and its figures over
seeds, and a verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.compare.presets import ONESHOT
from castlm.methods.table import METHODS, is_control
from castlm.training.config import WITHOUT_EFFECT, TrainConfig
from castlm.training.options import StartOptions

if TYPE_CHECKING:
    from castlm.compare.runs import Result


SHOWN_ELSEWHERE = {"method", "seed", "learning_rate", "init_from", "max_steps", "eval_steps", "model", "revision"}
SHOWN_ELSEWHERE |= {"dataset", "eval_dataset", "calibration"}
START_OPTIONS = {option.name for option in fields(StartOptions)}
"""Options that distinguish starts of the same name."""


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

    `gap` is ln(perplexity / perplexity of the dense control with the same token budget and seed), after the prune, one
    value for each of `gap_seeds`. The control is the variant "dense", or else the first variant of that method; its
    diverged runs do not count. One-shot methods have no budget; they are compared with the control of the largest one.
    A control of another seed is never used, except for magnitude, which depends on no seed and is compared with the
    control of each.
    """
    final = [r for r in results if not r.trial]
    dense = [r.run.variant for r in final if is_control(r.run.config["method"])]
    control = "dense" if "dense" in dense else next(iter(dense), None)
    controls = {
        (r.run.budget, r.run.seed): r.perplexity
        for r in final
        if r.run.variant == control and math.isfinite(r.perplexity) and r.problem is None
    }
    largest = max((r.run.budget for r in final), default=0)
    untouched = untouched_perplexity(final)
    options = options_of({r.run.variant: r.run.config for r in final})
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in final:
        groups.setdefault((result.run.variant, result.run.budget), []).append(result)
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

    def over(value: Callable[[Result], float | None]) -> Spread | None:
        return spread(value(r) for r in done)

    gaps = _gaps(done, controls, largest)
    return {
        "variant": run.variant,
        "method": run.config["method"],
        "budget": run.budget,
        "tokens": run.tokens,
        "learning_rate": run.config.get("learning_rate"),
        "start": start_of(run.config),
        "options": options,
        "seeds": [r.run.seed for r in done],
        "before_prune": over(lambda r: r.record["perplexity"].get("before_prune")),
        "pruned": over(lambda r: r.perplexity),
        "gap": spread(gaps.values()),
        "gap_seeds": list(gaps),
        "gap_untouched": over(lambda r: math.log(r.perplexity / untouched) if untouched else None),
        "flip_rate": over(lambda r: _mask_figure(r, "flip_rate")),
        "initial_flip_rate": over(lambda r: _mask_figure(r, "initial_flip_rate")),
        "sparse_weight_ratio": over(lambda r: _mask_figure(r, "sparse_weight_ratio")),
        "train_seconds": over(lambda r: r.record.get("train_seconds", r.record.get("prune_seconds"))),
        "peak_memory_mib": over(lambda r: _mebibytes(r.record.get("peak_memory_bytes"))),
        "start_tokens": over(lambda r: (r.record.get("start") or {}).get("calibration_tokens")),
        "start_seconds": over(lambda r: _start_seconds(r.record.get("start") or {})),
        "diverged": _reasons(done, "diverged"),
        "fell_short": _reasons(done, "fell short"),
        "errors": [f"seed {r.run.seed}: {r.record['error']}" for r in group if "error" in r.record],
    }


def _mask_figure(result: Result, key: str) -> float | None:
    figure: float | None = result.record.get("mask", {}).get(key)
    return figure


def _mebibytes(number: int | None) -> float | None:
    return None if number is None else number / 2**20


def _gaps(done: list[Result], controls: dict[tuple[int, int], float], largest: int) -> dict[int, float]:
    """The gaps by seed of the control: the run's own seed, or every seed if the method depends on none."""
    gaps: dict[int, float] = {}
    for result in done:
        budget = result.run.budget or largest
        of_budget = {seed: value for (tokens, seed), value in controls.items() if tokens == budget}
        seeds = of_budget if result.run.config["method"] == "magnitude" else {result.run.seed} & of_budget.keys()
        gaps |= {seed: math.log(result.perplexity / of_budget[seed]) for seed in seeds}
    return gaps


def _reasons(done: list[Result], problem: str) -> list[str]:
    return [f"seed {r.run.seed}: {r.record['verdict']['reason']}" for r in done if r.problem == problem]


def _start_seconds(start: dict[str, Any]) -> float | None:
    """Seconds of the start: the change of basis, and the pruning with its reconstruction."""
    parts = [(start.get("basis") or {}).get("seconds"), start.get("prune_seconds")]
    known = [float(part) for part in parts if part is not None]
    return sum(known) if known else None


def start_of(config: Mapping[str, Any]) -> str:
    """The start of a run: "dense", a one-shot method, or the name of a model folder."""
    method = str(config["method"])
    if method in ONESHOT or METHODS[method].starts_dense:
        return "dense"
    return Path(str(config.get("init_from") or "")).name


def options_of(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options by variant: the ones that its method reads, and all in which the trained variants differ.

    Args:
        variants: all fields of one run of each variant, except the output folder.
    """
    trained = [config for config in variants.values() if config["method"] not in ONESHOT]
    names = {name for config in trained for name in config} - SHOWN_ELSEWHERE - WITHOUT_EFFECT
    of_methods = {name for method in METHODS.values() for name in method.options}
    differing = [name for name in sorted(names - of_methods) if len({str(config.get(name)) for config in trained}) > 1]
    return {variant: _options(config, differing) for variant, config in variants.items()}


def _options(config: Mapping[str, Any], differing: list[str]) -> dict[str, Any]:
    method = str(config["method"])
    if method in ONESHOT:
        return {} if method == "magnitude" else {"num_sequences": config.get("num_sequences")}
    run = TrainConfig.from_mapping({**config, "output_dir": method})  # which no effect depends on
    own = [name for name in METHODS[method].options if run.needs(name) is None]
    return {name: config[name] for name in (*own, *differing) if config.get(name) is not None}


def options_text(options: Mapping[str, Any]) -> str:
    """Options as text for a table: "decay horizon, scale_groups 2"."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()
    )


def untouched_perplexity(results: list[Result]) -> float | None:
    """Perplexity of the dense model, from the first run that measured it."""
    return next((r.record["perplexity"]["dense"] for r in results if "dense" in r.record.get("perplexity", {})), None)


def ranked(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of the rows of the largest budget and of one-shot methods, the smallest gap first.

    Rows without a finite gap are omitted.
    """
    largest = max((row["budget"] for row in rows), default=0)
    rivals = [i for i, row in enumerate(rows) if has_gap(row) and row["budget"] in (0, largest)]
    return sorted(rivals, key=lambda number: rows[number]["gap"].mean)


def has_gap(row: dict[str, Any]) -> bool:
    """Whether a row is ranked and drawn: it has a finite gap and is not a dense control."""
    return row["gap"] is not None and math.isfinite(row["gap"].mean) and not is_control(row["method"])


def verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence: the best row, its lead, and whether the lead exceeds chance between seeds."""
    if not (order := ranked(rows)):
        return "No result can be compared with a dense control yet."
    best, *others = (rows[number] for number in order)
    largest = max(row["budget"] for row in rows)
    budget = f"At a budget of {largest:,} training tokens, " if largest else ""
    gap = best["gap"].show("+.4f")
    text = f"{budget}{best['variant']} has the smallest gap to the dense control, {gap} nats per token"
    return f"{text}; {_lead(best, others[0])}." if others else f"{text}."


def _lead(best: dict[str, Any], second: dict[str, Any]) -> str:
    """A phrase on the distance of `second`, over the seeds that both have.

    Seeds do not distinguish two rows if the 95 % interval of the difference, by Student's t, includes zero.
    """
    from scipy.stats import t

    one, other = (dict(zip(row["gap_seeds"], row["gap"].values)) for row in (best, second))
    shared = [other[seed] - one[seed] for seed in one if seed in other]
    if len(shared) < 2:
        behind = second["gap"].mean - best["gap"].mean
        return (
            f"{second['variant']} is {behind:.4f} behind; without a second seed of both, the difference may be chance"
        )
    behind, error = statistics.fmean(shared), statistics.stdev(shared) / math.sqrt(len(shared))
    how = f"standard error, paired over {len(shared)} seeds"
    text = f"{second['variant']} is {behind:.4f} ± {error:.4f} behind ({how}), and the 95 % interval"
    if behind <= float(t.ppf(0.975, len(shared) - 1)) * error:
        return f"{text} includes zero: these seeds do not tell the two apart"
    return f"{text} excludes zero"


def starts_note(rows: list[dict[str, Any]]) -> str:
    """Whether the trained methods had the same start, with the same options of it."""
    starts = {_start_text(row) for row in rows if row["tokens"] and row["start"] != "dense"}
    if len(starts) > 1:
        return f"The starts differ ({'; '.join(sorted(starts))}): compare methods only within one start."
    return f"Every method that trains from a pruned start had the same one: {starts.pop()}." if starts else ""


def _start_text(row: dict[str, Any]) -> str:
    options = options_text({name: value for name, value in row["options"].items() if name in START_OPTIONS})
    return f"{row['start']} with {options}" if options else str(row["start"])
