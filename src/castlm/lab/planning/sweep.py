"""Runs a sweep of token budgets, the cheapest first, and fits a scaling law to its runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from castlm.core.errors import InputError
from castlm.fields import convert, essential
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import begin_output, output_folder
from castlm.files.reading import read_record, user_path
from castlm.files.record import OUTPUT
from castlm.files.yaml_file import read_yaml_mapping
from castlm.lab.compare.plan import CompareConfig, Plan, SharedOptions
from castlm.lab.compare.presets import RETRAINING
from castlm.lab.compare.runs import ComparedRun, Result, read_finished, refuse_running
from castlm.methods.table import METHODS
from castlm.say import Say
from castlm.training.config import without_sections

SMALLEST_SHARE = 1 / 64
"""Default of the smallest budget, as a fraction of the largest."""


@dataclass(kw_only=True)
class SweepConfig(SharedOptions):
    """Find the scaling law of a model and text with few runs, the cheapest first.

    The method is cast, unless --config names another. The exit code is 1 if a run failed or no law fits the runs.
    """

    largest_tokens: float | None = essential(None)
    """Training tokens of the largest budget."""

    smallest_tokens: float | None = None
    """Training tokens of the smallest budget. The default is a 64th of the largest."""

    budgets: int = essential(6, at_least=2, at_most=100)
    """Number of budgets, evenly spaced on a logarithmic scale."""

    tokens: str | None = essential(None)
    """All budgets, separated by commas, instead of --largest-tokens, --smallest-tokens and --budgets."""

    seeds: int = essential(2, at_least=1)
    """Number of runs at each budget, with seeds 0, 1, ..."""

    runs_from: tuple[str, ...] = essential(())
    """Folders of `castlm compare` or other sweeps, to reuse their finished runs. Runs are reused if all options, the
    model and the texts are the same.
    """


def sweep(config: SweepConfig, command: str, say: Say, progress: Say) -> int:
    """Starts or continues a sweep, which `command` repeats; returns 1 if a run failed or no law fits the runs, else 0.

    Calls `say` with a line for each budget and for the law, and `progress` with a line for each run. Raises
    `InputError` as `Plan`; for a model that no run could open, budgets that carry no law, a method that does not train,
    or another sweep in the folder.
    """
    shared = without_sections(read_yaml_mapping(config.config), config.config) if config.config else {}
    method, asked = str(shared.get("method", "cast")), _budgets(config)
    if method not in RETRAINING:
        raise InputError(f"method {method} has no training budget to sweep: use one of {', '.join(RETRAINING)}")
    plan = Plan(
        CompareConfig(
            **{option.name: getattr(config, option.name) for option in fields(SharedOptions)},
            budget_tokens=asked[0],
            methods=method,
            seeds=config.seeds,
            published_starts=not METHODS[method].starts_solved,  # each run starts as `castlm train` would
        ),
        progress,
    )
    if missing := [folder for folder in config.runs_from if not user_path(folder).is_dir()]:
        raise InputError(f"runs_from {missing[0]} is no folder: name one of castlm compare or plan sweep")
    runs = [[plan.make(method, tokens, seed, None) for seed in range(config.seeds)] for tokens in asked]
    _check_apart([of_budget[0].tokens for of_budget in runs])
    plan.check_model()
    root = Path(config.output_dir)
    with output_folder(root, "sweep", resume=True):
        refuse_running(root)
        _claim(root, [run.folder(root).name for of_budget in runs for run in of_budget], command)
        say(f"{method}, {config.seeds} seeds, in {root}")
        results: list[Result] = []
        for of_budget in runs:
            found = []
            for run in of_budget:
                finished = _finished_elsewhere(run, config.runs_from)
                if finished is not None:
                    progress(f"{run}: {finished.folder}")
                found.append(finished or plan.measure(run, root))
            for result in found:
                if result.failure is not None:
                    remedy = "" if result.failure.exit_code == 1 else "; the same command continues"  # 1: it diverged
                    say(f"stopped: {result.run} failed: {result.failure.reason}{remedy}")
                    return 1
                if math.isinf(result.perplexity) or result.problem == "diverged":
                    verdict = result.facts.verdict
                    reason = "it has no finite perplexity" if verdict is None else verdict.reason
                    say(f"stopped: {result.run} diverged: {reason}; lower learning_rate")
                    return 1
            results += found
            mean = math.exp(statistics.fmean(math.log(result.perplexity) for result in found))
            say(f"{of_budget[0].tokens:>14,} tokens: perplexity {mean:.4f}")
        return _fit(root, results, say)


def _claim(root: Path, names: list[str], command: str) -> None:
    """Claims the output folder for a sweep, which the names of its runs identify."""
    held = read_record(root / OUTPUT)
    if held.get("runs", names) != names:
        raise InputError(
            f"{root} holds a sweep of other runs ({held.get('repeated_by')}): choose another folder, and reuse "
            f"the runs with --runs-from {root}"
        )
    begin_output(root, "sweep", resume=True, runs=names, repeated_by=command)


def _finished_elsewhere(run: ComparedRun, folders: Sequence[str]) -> Result | None:
    """The result of a run that is finished in one of the `folders` of comparisons or sweeps."""
    for other in map(user_path, folders):
        for folder in other.glob(f"runs/*-{run.key}"):
            if (facts := read_finished(folder)) is not None:
                return Result(run, facts, folder)
    return None


def _fit(root: Path, results: Sequence[Result], say: Say) -> int:
    """Writes the law of all runs; returns the exit code."""
    from castlm.lab.planning.fit import fit_law
    from castlm.lab.planning.points import read_points

    file = root / "law.json"
    try:
        law = fit_law(read_points([result.folder / "model" / "castlm.json" for result in results]))
    except InputError as error:
        file.unlink(missing_ok=True)
        say(f"no law.json: {error}")
        return 1
    atomic_write_json(file, law.as_dict())
    say(law.tested())
    say(f"law: {file} (castlm plan predict)")
    return 0


def _budgets(config: SweepConfig) -> list[int]:
    """The token budgets that the options ask for, in ascending order."""
    if config.tokens is None:
        if config.largest_tokens is None:
            raise InputError("which budgets? Give --largest-tokens, or --tokens with all of them")
        return geometric_budgets(config.largest_tokens, config.smallest_tokens, config.budgets)
    if config.largest_tokens is not None or config.smallest_tokens is not None:
        raise InputError(f"--tokens {config.tokens} has all budgets: leave out --largest-tokens and --smallest-tokens")
    return sorted(int(convert("tokens", number, float)) for number in config.tokens.split(","))


def geometric_budgets(largest: float, smallest: float | None, num: int) -> list[int]:
    """`num` >= 2 budgets, each by the same factor above the one before; `smallest` None is a 64th of `largest`."""
    smallest = largest * SMALLEST_SHARE if smallest is None else smallest
    if not 0 < smallest < largest < math.inf:
        raise InputError(f"budgets from {smallest:g} to {largest:g} tokens: the largest must be above the smallest")
    factor = (largest / smallest) ** (1 / (num - 1))
    return [round(smallest * factor**i) for i in range(num)]


def _check_apart(budgets: Sequence[int]) -> None:
    """Raises `InputError` for ascending budgets of whole steps that are too near each other, or carry no law."""
    from castlm.lab.planning.fit import SAME_BUDGET, check_budgets

    for one, following in itertools.pairwise(budgets):
        if math.log(following / one) <= SAME_BUDGET:
            raise InputError(f"budgets of {one:,} and {following:,} tokens, in whole steps, are one: set them apart")
    check_budgets([math.log(budget) for budget in budgets])
