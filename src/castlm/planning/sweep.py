"""Runs a sweep of token budgets for a scaling law: the cheapest first, and the largest only if it is needed.

Each budget is predicted before it runs. When the law has predicted a budget correctly and its interval at the largest
budget is narrow enough, the largest budget, which costs most, is not run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.compare.config import CompareConfig, SharedOptions
from castlm.compare.plan import Plan, Say
from castlm.compare.presets import RETRAINING
from castlm.compare.runs import Result, Run, read_finished, refuse_running
from castlm.core.errors import InputError
from castlm.fields import convert, essential
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import begin_output, output_folder
from castlm.files.reading import read_json_object
from castlm.files.yaml_file import read_yaml_mapping
from castlm.methods.table import METHODS
from castlm.training.config import without_sections

if TYPE_CHECKING:
    from castlm.planning.law import Law, Prediction

SMALLEST_SHARE = 1 / 64
"""Default of the smallest budget, as a fraction of the largest."""


@dataclass(kw_only=True)
class SweepConfig(SharedOptions):
    """Find the scaling law of a model and text with few runs: the cheapest first, the largest only if needed.

    The method is cast, unless --config names another. The exit code is 1 if a run failed or no law fits the runs.
    """

    largest_tokens: float | None = essential(None)
    """Training tokens of the largest budget."""

    smallest_tokens: float | None = None
    """Training tokens of the smallest budget. The default is a 64th of the largest."""

    budgets: int = essential(6, at_least=2)
    """Number of budgets, evenly spaced on a logarithmic scale."""

    tokens: str | None = essential(None)
    """All budgets, separated by commas, instead of --largest-tokens, --smallest-tokens and --budgets."""

    seeds: int = essential(2, at_least=1)
    """Number of runs at each budget, with seeds 0, 1, ..."""

    within: float = 0.02
    """Skip the largest budget if its predicted 90 % interval is narrower than this fraction of its predicted
    perplexity, and the mean of the budget before it fell inside its own predicted interval.
    """

    form: Literal["power", "loglinear"] = "power"
    """Form of the law: power, with a floor, or loglinear, without one, for a short range of budgets."""

    runs_from: tuple[str, ...] = essential(())
    """Folders of `castlm compare` or other sweeps, to reuse their finished runs. Runs are reused if all options, the
    model and the texts are the same.
    """


@dataclass(frozen=True)
class Step:
    """A budget that was run."""

    tokens: int
    perplexities: list[float]
    """Perplexities of its runs, by seed."""
    predicted: Prediction | None
    """Prediction of the mean of its runs, by the law of all smaller budgets."""
    largest: Prediction | None = None
    """Prediction of one run at the largest budget, by the law of all budgets so far."""
    no_law: str | None = None
    """The reason if no law fits the budgets so far."""

    @property
    def perplexity(self) -> float:
        """Geometric mean over its runs."""
        return math.exp(statistics.fmean(map(math.log, self.perplexities)))

    @property
    def inside(self) -> bool | None:
        """Whether the mean fell into its predicted interval."""
        return None if self.predicted is None else self.predicted.low <= self.perplexity <= self.predicted.high

    @property
    def width(self) -> float:
        """Width of the interval of the largest budget, as a share of its prediction."""
        return math.inf if self.largest is None else (self.largest.high - self.largest.low) / self.largest.perplexity

    def settles(self, within: float) -> bool:
        """Whether the largest budget need not be run."""
        return self.inside is True and self.width < within

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity, "inside": self.inside, "width": self.width}

    def __str__(self) -> str:
        inside = {None: "", True: "inside", False: "outside"}[self.inside]
        width = "" if self.largest is None else f"{self.width:.2%}"
        columns = f"{self.tokens:>14,}{self.perplexity:>12.4f}  {interval_text(self.predicted):<30}{inside:<10}"
        largest = f"no law: {self.no_law}" if self.no_law else f"{interval_text(self.largest):<30}{width:>8}"
        return f"{columns}{largest}".rstrip()


TITLE = (
    f"{'tokens':>14}{'perplexity':>12}  {'predicted (90 %)':<30}{'':<10}{'largest, predicted (90 %)':<30}{'width':>8}"
)


def interval_text(found: Prediction | None) -> str:
    """A perplexity with its interval; empty for None."""
    return "" if found is None else f"{found.perplexity:.4f} ({found.low:.4f} to {found.high:.4f})"


def sweep(config: SweepConfig, command: str, say: Say, progress: Say) -> int:
    """Starts or continues a sweep.

    Args:
        command: the command that repeats this sweep, for sweep.json.
        say: called with a line for each budget and for the verdict.
        progress: called with a line for each run.

    Returns:
        The exit code: 1 if a run failed or no law fits the runs.

    Raises:
        InputError: as `Sweep`, a model that no run could open, or another sweep is running in the folder.
    """
    runs = Sweep(config, command, say, progress)
    runs.plan.check_model()
    with output_folder(runs.root, "sweep", resume=True):
        refuse_running(runs.root)
        runs.claim()
        return runs.run()


class Sweep:
    """The runs of a sweep, and the law of the finished ones.

    Raises:
        InputError: as `Plan`; budgets that cannot predict the largest; or a method that does not train.
    """

    def __init__(self, command: SweepConfig, command_line: str, say: Say, progress: Say) -> None:
        self.command, self.root = command, Path(command.output_dir)
        self.command_line, self.say = command_line, say
        self.method = _method(command.config)
        asked = _ask(command)
        self.plan = Plan(
            CompareConfig(
                **{option.name: getattr(command, option.name) for option in fields(SharedOptions)},
                budget_tokens=asked[0],
                methods=self.method,
                seeds=command.seeds,
                published_starts=not METHODS[self.method].starts_solved,  # each run starts as `castlm train` would
            ),
            progress,
        )
        self.runs = [[self.plan.make(self.method, t, seed, None) for seed in range(command.seeds)] for t in asked]
        self.budgets = [runs[0].tokens for runs in self.runs]
        check_budgets(self.budgets, command.form)
        self.results: list[Result] = []
        self.steps: list[Step] = []
        self.law: Law | None = None

    @property
    def folders(self) -> list[str]:
        """Names of the runs' folders, which identify the sweep."""
        return [run.folder(self.root).name for runs in self.runs for run in runs]

    def claim(self) -> None:
        """Claims the output folder. Raises `InputError` if it holds another sweep."""
        file = self.root / "sweep.json"
        held = read_json_object(file) if file.is_file() else {}
        if held.get("runs", self.folders) != self.folders:
            raise InputError(
                f"{self.root} holds a sweep of other runs ({held.get('command')}): choose another folder, and reuse "
                f"the runs with --runs-from {self.root}"
            )
        begin_output(self.root, "sweep", resume=True)
        if not held:
            self.write("running")

    def run(self) -> int:
        """Runs the budgets in order until the largest is predicted well enough or has run. Returns the exit code."""
        self.say(f"{self.method}, {self.command.seeds} seeds, {self.command.form} law, in {self.root}")
        self.say(TITLE)
        for number, runs in enumerate(self.runs, 1):
            results = [self.measure(run) for run in runs]
            for result in results:
                if problem := _problem(result):
                    return self.end("failed", f"stopped: {result.run} {problem}")
            self.take(results)
            self.say(str(self.steps[-1]))
            if self.steps[-1].settles(self.command.within) and not self.are_finished(self.runs[number:]):
                break
            self.write("running")
        last = self.steps[-1]
        if last.largest is not None:
            return self.end(
                "predicted",
                f"the largest was not run: {last.tokens:,} tokens fell inside the predicted interval, and "
                f"{last.width:.2%} is narrower than {self.command.within:.2%}",
            )
        held = {None: "not predicted", True: "inside the predicted interval", False: "outside the predicted interval"}
        return self.end("complete", f"the largest was run: perplexity {last.perplexity:.4f}, {held[last.inside]}")

    def are_finished(self, budgets: list[list[Run]]) -> bool:
        """Whether an earlier start, with another `within` or `form`, ran all these budgets: they cost nothing now."""
        return all(read_finished(run.folder(self.root)) is not None for runs in budgets for run in runs)

    def measure(self, run: Run) -> Result:
        """The result of a run, finished in a folder of `runs_from` or run in this sweep."""
        for other in map(Path, self.command.runs_from):
            for folder in other.glob(f"runs/*-{run.key}"):
                if (record := read_finished(folder, run.config)) is not None:
                    self.plan.say(f"{run}: {folder}")
                    return Result(run, record, folder)
        return self.plan.measure(run, self.root)

    def take(self, results: list[Result]) -> None:
        """Appends the step of the next budget, with the law of all budgets so far and its prediction of the largest."""
        from castlm.planning.fit import MIN_BUDGETS, fit_law
        from castlm.planning.law import predict_perplexity
        from castlm.planning.points import read_points

        tokens = self.budgets[len(self.steps)]
        predicted = None if self.law is None else predict_perplexity(self.law, tokens, num_runs=self.command.seeds)
        smaller, self.law, largest, no_law = self.law, None, None, None
        self.results += results
        if len(self.steps) + 1 >= MIN_BUDGETS[self.command.form]:
            try:
                files = [result.folder / "model" / "castlm.json" for result in self.results]
                self.law = fit_law(read_points(files), self.command.form, without_largest=smaller)
                if tokens != self.budgets[-1]:
                    largest = predict_perplexity(self.law, self.budgets[-1])
            except InputError as error:
                no_law = str(error)
        perplexities = [result.perplexity for result in results]
        self.steps.append(Step(tokens, perplexities, predicted, largest, no_law))

    @property
    def spent(self) -> int:
        """Tokens of the budgets that were run."""
        return self.command.seeds * sum(step.tokens for step in self.steps)

    @property
    def saved(self) -> int:
        """Tokens of the budgets that were not run."""
        return self.command.seeds * sum(self.budgets) - self.spent

    def end(self, status: str, verdict: str) -> int:
        """Writes and prints the result. A failed start leaves the law.json of an earlier one as it is."""
        self.write(status, verdict)
        self.say(verdict)
        if status == "failed":
            return 1
        if status == "predicted":
            share = self.saved / (self.spent + self.saved)
            self.say(f"largest budget, {self.budgets[-1]:,} tokens: perplexity {interval_text(self.steps[-1].largest)}")
            self.say(f"{self.spent:,} tokens trained, {self.saved:,} saved: {share:.0%} of the sweep")
        file = self.root / "law.json"
        if self.law is None:
            file.unlink(missing_ok=True)
            self.say(f"no law.json: {self.steps[-1].no_law}")
            return 1
        atomic_write_json(file, self.law.as_dict())
        self.say(f"law: {file} (castlm plan predict)")
        return 0

    def write(self, status: str, verdict: str | None = None) -> None:
        """Writes sweep.json."""
        content = {
            "status": status,
            "verdict": verdict,
            "command": self.command_line,
            "method": self.method,
            "form": self.command.form,
            "within": self.command.within,
            "seeds": self.command.seeds,
            "budgets": self.budgets,
            "steps": [step.as_dict() for step in self.steps],
            "trained_tokens": self.spent,
            "saved_tokens": self.saved if status == "predicted" else 0,
            "runs": self.folders,
        }
        atomic_write_json(self.root / "sweep.json", content)


def _problem(result: Result) -> str | None:
    """The reason why the sweep cannot use a run, with its remedy."""
    if "error" in result.record:
        remedy = "" if result.record.get("exit_code") == 1 else "; the same command continues"  # 1: diverged
        return f"failed: {result.record['error']}{remedy}"
    if math.isinf(result.perplexity) or result.problem == "diverged":
        reason = result.record.get("verdict", {}).get("reason", "it has no finite perplexity")
        return f"diverged: {reason}; lower learning_rate"
    return None


def _ask(command: SweepConfig) -> list[int]:
    if command.tokens is None:
        if command.largest_tokens is None:
            raise InputError("which budgets? Give --largest-tokens, or --tokens with all of them")
        return geometric_budgets(command.largest_tokens, command.smallest_tokens, command.budgets)
    if command.largest_tokens is not None or command.smallest_tokens is not None:
        raise InputError(f"--tokens {command.tokens} has all budgets: leave out --largest-tokens and --smallest-tokens")
    return listed_budgets(command.tokens)


def _method(config: str | None) -> str:
    method = str((without_sections(read_yaml_mapping(config), config) if config else {}).get("method", "cast"))
    if method not in RETRAINING:
        raise InputError(f"method {method} has no training budget to sweep: use one of {', '.join(RETRAINING)}")
    return method


def geometric_budgets(largest: float, smallest: float | None, num: int) -> list[int]:
    """`num` >= 2 budgets, each by the same factor above the one before; `smallest` None is a 64th of `largest`.

    Raises:
        InputError: bounds that are not positive numbers in order.
    """
    smallest = largest * SMALLEST_SHARE if smallest is None else smallest
    if not 0 < smallest < largest < math.inf:
        raise InputError(f"budgets from {smallest:g} to {largest:g} tokens: the largest must be above the smallest")
    factor = (largest / smallest) ** (1 / (num - 1))
    return [round(smallest * factor**i) for i in range(num)]


def listed_budgets(text: str) -> list[int]:
    """Parses numbers separated by commas, in ascending order. Raises InputError if one is not a number."""
    return sorted(int(convert("tokens", number, float)) for number in text.split(","))


def check_budgets(budgets: Sequence[int], form: str) -> None:
    """Refuses ascending budgets if the smaller ones cannot predict the largest.

    Raises:
        InputError: too few, too near each other, or over too short a range.
    """
    from castlm.planning.fit import MIN_BUDGETS, MIN_SPREAD, SAME_BUDGET

    least = MIN_BUDGETS[form] + 1
    if len(budgets) < least:
        other = "loglinear"
        remedy = f", or use --form {other}" if len(budgets) > MIN_BUDGETS[other] else ""
        raise InputError(
            f"{len(budgets)} budgets: the {form} form needs {least} to predict the largest from the others; give more "
            f"budgets{remedy}"
        )
    for one, following in itertools.pairwise(budgets):
        if math.log(following / one) <= SAME_BUDGET:
            raise InputError(f"budgets of {one:,} and {following:,} tokens, in whole steps, are one: set them apart")
    if budgets[-2] < MIN_SPREAD * budgets[0]:
        raise InputError(
            f"budgets below the largest go from {budgets[0]:,} to {budgets[-2]:,} tokens: a law needs a factor of "
            f"{MIN_SPREAD:g} between them; start from a smaller one"
        )
