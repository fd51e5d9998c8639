"""Recipes for a size: the ways to make a model small that were measured, and the best of them under some limits.

`sizes.json` is docs/results/sizes.json as `python -m benchmarks.render` copies it: the perplexities of one model after
each recipe. For another model the bytes follow from its shapes, and the loss is taken over as a factor of perplexity,
beside that of a second, smaller model: how far the two differ is how far to trust it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from castlm.core.errors import InputError
from castlm.lab.advice.cpu import Load, Option, Shapes, num_bytes, time_options
from castlm.methods.options import default_learning_rate
from castlm.names import aligned
from castlm.say import Progress, silent
from castlm.training.options import HIDDEN_WEIGHT
from castlm_runtime.formats import FORMATS, HEADS

MODEL, NUM_WEIGHTS, STEPS, TOKENS = "SmolLM2-135M", 134_515_008, 100, 512
"""The model of the table, and its training: steps, and tokens of a step."""
DENSE = "dense bf16"
"""The row that the factors are of."""
ROUNDED, SCALES_AFTER = "perplexity", "scales trained after rounding"
"""The columns of models whose weights are trained."""
SCALES_ALONE = "GPTQ, 64 sequences, then 100 steps of the scales"
"""The column of models whose weights are not trained; their head is int8."""

Commands = list[list[str]]
"""Arguments of commands, without the first word `castlm`."""


@dataclass(frozen=True)
class Recipe:
    """One row of the table: a way to store a model, how it gets there, and what that costs."""

    option: Option
    factor: float
    """The perplexity of SmolLM2-135M, in units of the dense bf16 model after the same training."""
    smaller: float | None = None
    """The same of stories260K, if it was measured."""
    minutes: float = 0.0
    """Processor minutes of SmolLM2-135M for the start and the training."""
    trains_weights: bool = False
    trains_scales: bool = False
    """Whether weights are rounded by GPTQ, after their training if they are trained, and the scales learn alone."""

    @property
    def trains(self) -> bool:
        return self.trains_weights or self.trains_scales

    def commands(
        self,
        model: str,
        text: str,
        folder: str,
        max_steps: int = STEPS,
        seq_len: int = TOKENS,
        num_weights: int = NUM_WEIGHTS,
    ) -> Commands:
        """The commands that make it: a run in `folder`/run, if it trains weights, and the model in `folder`/packed."""
        run, values, length = f"{folder}/run", self.option.values, ["--seq-len", str(seq_len)]
        train = ["train", "--model", model, "--dataset", text, "--output-dir", run]
        train += ["--pattern", self.option.pattern] if self.option.is_sparse else ["--method", "dense"]
        train += ["--max-steps", str(max_steps), *length, "--per-device-train-batch-size", "1"]
        if not self.trains_scales:
            train += ["--weight-bits", str(FORMATS[values].bits)]
        elif not self.option.is_sparse:  # nothing heals here: a lower rate than of sparse or rounded weights
            train += ["--learning-rate", f"{default_learning_rate(num_weights) / 3:.2g}"]
            train += ["--hidden-weight", f"{HIDDEN_WEIGHT:g}"]
        make = ["quantize", run if self.trains_weights else model, "--kind", values, "--packed"]
        if self.trains_scales:
            make += ["--train-steps", str(max_steps), *length]
        elif self.trains_weights:
            make = ["pack", run]
        make += ["--head", self.option.head, "--output-dir", f"{folder}/packed"]
        make += ["--calibration", text] if self.trains_scales or FORMATS[self.option.head].reads_text else []
        return [train, make] if self.trains_weights else [make]


def parse_option(name: str) -> Option:
    """The option of a name in the table; the opposite of `Option.name`.

    Examples:
        >>> parse_option("32:64 int4, int8 head")
        Option(values='int4', n=32, m=64, head='int8', by_torch=False)
    """
    weights, _, head = name.removesuffix(" head").partition(", ")
    pattern, values = weights.split(" ")
    n, m = (0, 0) if pattern == "dense" else map(int, pattern.split(":"))
    return Option(values, n, m, head or values)


@cache
def recipes() -> tuple[Recipe, ...]:
    """The recipes of the tables that end in a smaller file than bf16, each by the way of least perplexity."""
    tables = json.loads(files("castlm.lab.advice").joinpath("sizes.json").read_text(encoding="utf-8"))
    large, smaller, alone = tables["smollm2"], tables["stories260k"], tables["oneshot"]
    heads = _column(tables["heads"], "perplexity")
    dense, dense_smaller = (_column(table, ROUNDED)[DENSE] for table in (large, smaller))
    minutes = {_weights(parse_option(name)): cost for name, cost in _column(large, "processor minutes").items()}
    of_scales = _mean(list(_column(alone, "processor minutes").values()))
    best: dict[Option, Recipe] = {}
    for column, of_smaller, trains_weights, trains_scales in (
        (_column(large, ROUNDED), _column(smaller, ROUNDED), True, False),
        (_column(large, SCALES_AFTER), _column(smaller, SCALES_AFTER), True, True),
        ({f"{weights}, int8 head": found for weights, found in _column(alone, SCALES_ALONE).items()}, {}, False, True),
    ):
        for option, perplexity in _with_heads(column, heads).items():
            weights = _weights(option)
            recipe = Recipe(
                option,
                perplexity / dense,
                of_smaller[weights] / dense_smaller if weights in of_smaller else None,
                minutes.get(weights, 0.0) * trains_weights + of_scales * trains_scales,
                trains_weights=trains_weights and FORMATS[option.values].group > 0,  # int8 loses too little for that
                trains_scales=trains_scales,
            )
            if option not in best or recipe.factor < best[option].factor:
                best[option] = recipe
    return tuple(best.values())


def _with_heads(column: Mapping[str, float], heads: Mapping[str, float]) -> dict[Option, float]:
    """The perplexity of each rounded row of a column with each head.

    A head that was not measured with these weights multiplies the perplexity of one that was, as it does that of the
    dense bf16 model.
    """
    measured = {parse_option(name): perplexity for name, perplexity in column.items() if name != DENSE}
    found = {
        replace(option, head=head): perplexity * heads[head] / heads[option.head]
        for option, perplexity in measured.items()
        for head in heads
    }
    return {**found, **measured}


def _weights(option: Option) -> str:
    """The name of an option without its head."""
    return f"{option.pattern} {option.values}"


def _column(table: Mapping[str, Any], name: str) -> dict[str, float]:
    """A column of results by the first cell of the row, without its empty cells."""
    place = [column["name"] for column in table["columns"]].index(name)
    return {row[0]: _mean(row[place]) for row in table["rows"] if row[place] is not None}


def _mean(value: float | Sequence[float]) -> float:
    """The geometric mean of the seeds."""
    values = [value] if isinstance(value, int | float) else value
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Choice:
    """The recipes for a model, and the best one under the limits."""

    candidates: Sequence[tuple[Recipe, int, float | None]]
    """Each recipe with its bytes and the seconds of a token's linear layers on this machine, None if not timed."""
    best: Recipe
    num_weights: int
    load: Load = field(default_factory=Load)

    @property
    def minutes(self) -> float:
        """Processor minutes of the best recipe, if they grow like the weights."""
        return self.best.minutes * self.num_weights / NUM_WEIGHTS

    def commands(self, model: str, text: str, folder: str, max_steps: int = STEPS, seq_len: int = TOKENS) -> Commands:
        """As `Recipe.commands`, of the best recipe."""
        return self.best.commands(model, text, folder, max_steps, seq_len, self.num_weights)

    def text(self, commands: Commands) -> str:
        """The table, the recipe as commands, and what they cost."""
        is_timed = self.candidates[0][2] is not None
        table = [["", "recipe", "MB", f"perplexity, {MODEL}", "stories260K", *(["tokens/s"] if is_timed else [])]]
        for recipe, size, seconds in self.candidates:
            smaller = "" if recipe.smaller is None else f"{recipe.smaller:.2f}x"
            speed = [] if seconds is None else [f"{1 / seconds:,.0f}"]
            mark = "->" if recipe is self.best else ""
            table.append([mark, recipe.option.name, f"{size / 1e6:,.1f}", f"{recipe.factor:.2f}x", smaller, *speed])
        lines = [*aligned(table), "", *(shlex.join(["castlm", *words]) for words in commands), ""]
        cost = f"About {self.minutes:,.0f} processor minutes" if self.best.trains else "A minute or two"
        best, errors = self.best, [abs(math.log(r.factor / r.smaller)) for r, *_ in self.candidates if r.smaller]
        differ = f", which differ by up to {math.expm1(max(errors)):.0%}" if errors else ""
        lines += [
            f"{cost}, and {best.factor:.2f} times the perplexity of the dense model after {STEPS} steps of training.",
            f"Perplexities were measured on {MODEL} and stories260K{differ}; on another model expect at least such an "
            "error. More training loses less.",
            *(["Tokens per second of one sequence are of the linear layers alone, timed here."] if is_timed else []),
            *self.load.note,
        ]
        return "\n".join(lines)

    def as_dict(self, commands: Commands) -> dict[str, Any]:
        """The choice as plain JSON."""
        rows = [
            {
                "name": recipe.option.name,
                "bytes": size,
                "perplexity_factor": recipe.factor,
                "stories260k_factor": recipe.smaller,
                "tokens_per_second": None if seconds is None else 1 / seconds,
                "is_best": recipe is self.best,
            }
            for recipe, size, seconds in self.candidates
        ]
        return {"recipes": rows, "commands": [["castlm", *words] for words in commands], "minutes": self.minutes}


def choose(
    shapes: Shapes,
    *,
    megabytes: float | None = None,
    factor: float | None = None,
    tokens_per_second: float | None = None,
    among: Iterable[Recipe] | None = None,
    seconds: float | None = None,
    progress: Progress = silent,
) -> Choice:
    """The recipe of least perplexity within the limits; with a limit on perplexity alone, the smallest one.

    Args:
        factor: the most perplexity, in units of the dense model's.
        among: by default those of `recipes` whose pattern and head fit the model.
        seconds: of timing on this machine; None times nothing.

    Raises:
        InputError: no recipe keeps the limits.
    """
    fitting = [r for r in (recipes() if among is None else among) if _fits(r.option, shapes)]
    sizes = {recipe: num_bytes(recipe.option, shapes, "bf16") for recipe in fitting}
    timed: dict[Option, float] = {}
    load = Load()
    if seconds is not None:
        options = list(dict.fromkeys(recipe.option for recipe in fitting))
        totals = time_options(options, shapes, {"one token": 1}, seconds, load, progress)
        timed = {option: times["one token"] for option, times in totals.items()}
    candidates = sorted(((r, sizes[r], timed.get(r.option)) for r in fitting), key=lambda row: -row[1])
    kept = [
        (recipe, size)
        for recipe, size, time in candidates
        if (megabytes is None or size <= megabytes * 1e6)
        and (factor is None or recipe.factor <= factor)
        and (tokens_per_second is None or (time is not None and 1 / time >= tokens_per_second))
    ]
    if not kept:
        missed = []
        if megabytes is not None:
            missed.append(f"megabytes {megabytes:g} (the smallest recipe has {candidates[-1][1] / 1e6:,.1f})")
        if factor is not None:
            least = min(recipe.factor for recipe in fitting)
            missed.append(f"perplexity_at_most {factor:g}x (the best has {least:.3f}x)")
        if tokens_per_second is not None:
            missed.append(f"tokens_per_second {tokens_per_second:g} (the fastest has {1 / min(timed.values()):,.0f})")
        raise InputError(f"no recipe has {' and '.join(missed)}: allow more")
    only_factor = megabytes is None and tokens_per_second is None
    best, _ = min(kept, key=lambda row: (row[1], row[0].factor) if only_factor else (row[0].factor, row[1]))
    return Choice(candidates, best, shapes.num_weights, load)


def _fits(option: Option, shapes: Shapes) -> bool:
    """Whether the kernels have the head, and the pattern divides the widths of at least half of the layers."""
    widths = [columns for (_, columns), count in shapes.blocks.items() for _ in range(count)]
    divided = sum(not option.m or columns % option.m == 0 for columns in widths)
    return option.head in HEADS and 2 * divided >= len(widths)
