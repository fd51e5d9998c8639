"""The rows of `castlm compare`: a variant at a token budget, its figures over the seeds, and their rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from castlm.facts import Facts
from castlm.fields import without_result
from castlm.lab.compare.presets import ONESHOT, SPARSEGPT
from castlm.lab.compare.runs import NAMED, Result
from castlm.methods.table import METHODS, is_control
from castlm.training.config import TrainConfig

SHOWN_ELSEWHERE = {"method", "seed", "learning_rate", "init_from", "max_steps", "eval_steps", *NAMED}


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


@dataclass(frozen=True)
class Row:
    """A variant at a token budget, over its seeds. A figure is None where no run has it."""

    variant: str
    method: str
    budget: int
    """The requested training tokens; 0 for one-shot methods."""
    tokens: int
    """Training tokens of the whole steps that fit in the budget."""
    learning_rate: float | None
    start: str
    """See `start_of`."""
    options: dict[str, Any]
    """See `options_of`."""
    seeds: list[int]
    """The seeds of the finished runs."""
    pruned: Spread | None
    """Perplexity of the result: after the prune, or of the dense control."""
    gap: Spread | None
    """ln(perplexity / perplexity of the dense control), with a value for each of `gap_seeds`."""
    gap_seeds: list[int]
    gap_untouched: Spread | None
    """ln(perplexity / perplexity of the dense model before any training)."""
    before_prune: Spread | None
    flip_rate: Spread | None
    initial_flip_rate: Spread | None
    sparse_weight_ratio: Spread | None
    calibration_tokens: Spread | None
    """Tokens that the start, or the one-shot method, read."""
    train_seconds: Spread | None
    start_seconds: Spread | None
    peak_memory_mib: Spread | None
    diverged: list[str]
    """The reason for each seed that diverged."""
    fell_short: list[str]
    errors: list[str]

    @property
    def ranked_gap(self) -> Spread | None:
        """The gap, if the row is ranked and drawn: the gap is finite, and the row is not a dense control."""
        is_finite = self.gap is not None and math.isfinite(self.gap.mean)
        return self.gap if is_finite and not is_control(self.method) else None

    def to_json(self) -> dict[str, Any]:
        """The row for table.json."""
        return {name: value._asdict() if isinstance(value, Spread) else value for name, value in vars(self).items()}


def summarize(results: list[Result]) -> list[Row]:
    """A row for each variant and token budget, in the order of `results`.

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
) -> Row:
    run = group[0].run
    done = [r for r in group if r.failure is None]

    def over_seeds(value: Callable[[Facts], float | None]) -> Spread | None:
        return spread(value(r.facts) for r in done)

    def reasons(problem: str) -> list[str]:
        found = [r for r in group if r.problem == problem]
        return [f"seed {r.run.seed}: {r.failure or (r.facts.verdict and r.facts.verdict.reason)}" for r in found]

    gaps: dict[int, float] = {}  # by the seed of the control
    of_budget = {seed: value for (tokens, seed), value in controls.items() if tokens == (run.budget or largest)}
    for result in done:
        seeds = of_budget if run.config["method"] == "magnitude" else {result.run.seed} & of_budget.keys()
        gaps |= {seed: math.log(result.perplexity / of_budget[seed]) for seed in seeds}
    memory = over_seeds(lambda facts: facts.peak_memory_bytes and facts.peak_memory_bytes / 2**20)
    return Row(
        variant=run.variant,
        method=run.config["method"],
        budget=run.budget,
        tokens=run.tokens,
        learning_rate=run.config.get("learning_rate"),
        start=start_of(run.config),
        options=options,
        seeds=[r.run.seed for r in done],
        pruned=spread(r.perplexity for r in done),
        gap=spread(gaps.values()),
        gap_seeds=list(gaps),
        gap_untouched=spread(math.log(r.perplexity / untouched) if untouched else None for r in done),
        before_prune=over_seeds(lambda facts: facts.perplexity.before_prune),
        flip_rate=over_seeds(lambda facts: facts.mask.flip_rate),
        initial_flip_rate=over_seeds(lambda facts: facts.mask.initial_flip_rate),
        sparse_weight_ratio=over_seeds(lambda facts: facts.mask.sparse_weight_ratio),
        calibration_tokens=over_seeds(_calibration_tokens),
        train_seconds=over_seeds(lambda f: f.prune_seconds if f.train_seconds is None else f.train_seconds),
        start_seconds=over_seeds(lambda facts: facts.start.seconds),
        peak_memory_mib=memory,
        diverged=reasons("diverged"),
        fell_short=reasons("fell short"),
        errors=[f"seed {r.run.seed}: {r.failure}" for r in group if r.failure and r.problem is None],
    )


def _calibration_tokens(facts: Facts) -> float | None:
    """The tokens that a start, or a one-shot method, read; None if neither reads a text."""
    drawn = facts.calibration
    return facts.start.calibration_tokens if drawn is None else drawn.num_sequences * drawn.seq_len


def start_of(config: Mapping[str, Any]) -> str:
    """The start of a run: "dense", a one-shot method, or the name of a model folder.

    A one-shot method is as published, as in a row of its name, unless "refined" follows: then the start changes the
    basis, or improves the masks or the kept weights.
    """
    method = str(config["method"])
    if method in ONESHOT or METHODS[method].step0 == "dense":
        return "dense"
    name = Path(str(config.get("init_from") or "")).name
    is_refined = name == "sparsegpt" and any(config.get(option, value) != value for option, value in SPARSEGPT.items())
    return f"{name}, refined" if is_refined else name


def options_of(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of each variant: those that its method reads, and those in which the trained variants differ.

    Args:
        variants: all fields of one run of each variant, except the output folder.
    """
    trained = [config for config in variants.values() if config["method"] not in ONESHOT]
    names = {name for config in trained for name in config} - SHOWN_ELSEWHERE
    names -= without_result(TrainConfig.sections().values())
    of_methods = {name for method in METHODS.values() for name in method.options}
    differing = [name for name in sorted(names - of_methods) if len({str(config.get(name)) for config in trained}) > 1]
    options: dict[str, dict[str, Any]] = {}
    for variant, config in variants.items():
        method = str(config["method"])
        if method in ONESHOT:
            options[variant] = (
                {} if method == "magnitude" else {"calibration_sequences": config.get("calibration_sequences")}
            )
            continue
        run = TrainConfig.from_mapping({**config, "output_dir": method})  # which no effect depends on
        own = [name for name in METHODS[method].options if run.needs(name) is None]
        options[variant] = {name: config[name] for name in (*own, *differing) if config.get(name) is not None}
    return options


def untouched_perplexity(results: list[Result]) -> float | None:
    """Perplexity of the dense model, from the first run that measured it."""
    return next((r.facts.perplexity.dense for r in results if r.facts.perplexity.dense is not None), None)


def ranked(rows: list[Row]) -> list[int]:
    """The numbers of the rows of the largest budget and of one-shot methods, the smallest gap first.

    Rows without a finite gap are omitted.
    """
    largest = max((row.budget for row in rows), default=0)
    rivals = [(gap.mean, i) for i, row in enumerate(rows) if (gap := row.ranked_gap) and row.budget in (0, largest)]
    return [number for _, number in sorted(rivals)]


class Difference(NamedTuple):
    """The distance of a row behind another in nats per token, paired over the seeds that both have."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval of the mean, by Student's t; None without a second seed of both."""
    num_seeds: int
    """Seeds that both rows have; with none, `mean` is the distance of their means."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the seeds tell the two rows apart."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def behind(other: Row, best: Row) -> Difference:
    """How far `other` is behind `best`; both are among the `ranked` rows."""
    from scipy.stats import t

    assert other.gap is not None
    assert best.gap is not None
    theirs = dict(zip(other.gap_seeds, other.gap.values))
    shared = [theirs[seed] - value for seed, value in zip(best.gap_seeds, best.gap.values) if seed in theirs]
    if len(shared) < 2:
        return Difference(other.gap.mean - best.gap.mean, None, len(shared))
    error = statistics.stdev(shared) / math.sqrt(len(shared))
    return Difference(statistics.fmean(shared), float(t.ppf(0.975, len(shared) - 1)) * error, len(shared))
