"""The table of `castlm compare`: a row for each variant and token budget over its seeds, a verdict, and their report.

The report is one summary as Markdown and as JSON; over several token budgets it also has a chart. Every figure is a
mean over seeds with its sample standard deviation, beside the conditions of its measurement.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from castlm.facts import to_json
from castlm.files.atomic_file import atomic_write_json, atomic_write_text
from castlm.lab.compare.rows import Row, behind, ranked, summarize, untouched_perplexity
from castlm.lab.compare.runs import Result
from castlm.lab.report.charts import WHOLE, Series, can_draw, line_chart
from castlm.methods.table import METHODS, is_control
from castlm.training.options import StartOptions

COLUMNS = {
    "before_prune": ("before the prune", ".3f"),
    "pruned": ("pruned", ".3f"),
    "gap": ("gap to dense control", "+.4f"),
    "gap_untouched": ("gap to original", "+.4f"),
    "flip_rate": ("flip rate", ".1e"),
    "initial_flip_rate": ("flips since step 0", ".2%"),
    "sparse_weight_ratio": ("kept share", ".4f"),
    "calibration_tokens": ("calibration, tokens", ",.0f"),
    "train_seconds": ("time, s", ".0f"),
    "start_seconds": ("start, s", ".0f"),
    "peak_memory_mib": ("peak memory, MiB", ".0f"),
}
"""Heading and number format by the name of a figure of a `Row`."""
BEHIND = "behind the best"
"""Heading of the distance to the best row."""
SHORT = ("variant", "start", "tokens", "rate", "pruned", "gap to dense control")
"""Columns of the table on a terminal; table.md has all of them."""
MEANINGS = {
    "variant": "A method, or a method with other options.",
    "start": "The sparse weights and masks before step 0. sparsegpt: as published, as in the row of that name. "
    "sparsegpt, refined: with castlm's change of basis, masks and refitted weights. dense: the method has no start of "
    "its own.",
    "tokens": "Training tokens: the whole steps that fit in the token budget.",
    "rate": "Peak learning rate.",
    "options": "The options of the method that have an effect, and all options in which the variants differ.",
    "seeds": "Number of finished runs; figures are mean ± sample standard deviation over them.",
    "before the prune": "Perplexity as the model trained, before masked weights are removed.",
    "pruned": "Perplexity after every masked weight is set to zero, or of the trained dense control.",
    "gap to dense control": "ln(perplexity / perplexity of the dense control with the same token budget and seed), in "
    "nats per token: 0.01 is 1 % in perplexity. 0 means that sparsity cost nothing. magnitude, which depends on no "
    "seed, is compared with the control of each.",
    BEHIND: "The gap minus the best row's, seed by seed: the mean ± half of its 95 % interval by Student's t, over the "
    "seeds that both have. (chance?): the interval includes zero, so that these seeds do not tell the two apart. The "
    "gaps of two rows may overlap where this interval excludes zero, because a seed moves both rows together.",
    "gap to original": "ln(perplexity / perplexity of the dense model before any training). Training alone can make it "
    "negative.",
    "flip rate": "Share of the mask entries that the last refresh of the masks changed.",
    "flips since step 0": "Share of the mask entries that differ from the masks of step 0.",
    "kept share": "sum |kept weights| / sum |all weights| of the sparse layers before the prune; 1: nothing left to "
    "prune.",
    "calibration, tokens": "Tokens by which the start before step 0, or the one-shot method, chose masks and weights. "
    "A sequence of a one-shot method has the model's context, of at most 2,048 tokens.",
    "time, s": "Seconds of the optimizer steps; of one-shot methods, of the pruning.",
    "start, s": "Seconds that the start took before step 0.",
    "peak memory, MiB": "The most memory that the process of the run held.",
}
START_OPTIONS = {option.name for option in fields(StartOptions)}
"""Options that distinguish starts of the same name."""


def options_text(options: Mapping[str, Any]) -> str:
    """Options as text for a table: "decay horizon, scale_groups 2"."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()
    )


def in_perplexity(nats: float) -> str:
    """A difference of nats per token as one of perplexities: "1.3 % in perplexity" for 0.0125."""
    factor = math.exp(nats)
    return f"{factor:.2f} times the perplexity" if factor >= 2 else f"{100 * (factor - 1):.1f} % in perplexity"


def verdict(rows: list[Row]) -> str:
    """One sentence: the best row, its lead, and whether the lead exceeds chance between seeds."""
    if not (order := ranked(rows)):
        return "No result can be compared with a dense control yet."
    best, *others = (rows[number] for number in order)
    assert best.gap is not None
    largest = max(row.budget for row in rows)
    has_trained = any(row.tokens for row in (best, *others))  # one-shot rows have no budget
    against = "At a budget of" if has_trained else "Beside a dense control of"
    budget = f"{against} {largest:,} training tokens, " if largest else ""
    gap = f"{best.gap.show('+.4f')} nats per token ({in_perplexity(best.gap.mean)})"
    text = f"{budget}{best.variant} has the smallest gap to the dense control, {gap}"
    return f"{text}; {_lead(best, others[0])}." if others else f"{text}."


def _lead(best: Row, second: Row) -> str:
    """A phrase on the distance of `second`, and whether chance between the seeds explains it."""
    found = behind(second, best)
    text = f"{second.variant} is {found.mean:.4f} behind ({in_perplexity(found.mean)})"
    if found.half_width is None:
        return f"{text}; without a second seed of both, the difference may be chance"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    text += f", and the 95 % interval, paired over {found.num_seeds} seeds, {low:.4f} to {high:.4f},"
    if found.excludes_zero:
        return f"{text} excludes zero"
    return f"{text} includes zero: these seeds do not tell the two apart"


def starts_note(rows: list[Row]) -> str:
    """Whether the trained methods had the same start, with the same options of it."""
    starts = set()
    for row in rows:
        if row.tokens and row.start != "dense":
            options = options_text({name: value for name, value in row.options.items() if name in START_OPTIONS})
            starts.add(f"{row.start} with {options}" if options else row.start)
    if len(starts) > 1:
        return f"The starts differ ({'; '.join(sorted(starts))}): compare methods only within one start."
    return f"Every method that trains from a pruned start had the same one: {starts.pop()}." if starts else ""


def rates_note(results: list[Result]) -> str:
    """Tells how the learning rates of the rows were chosen."""
    final = [result for result in results if not result.trial]
    rates = sorted({float(r.run.config["learning_rate"]) for r in final if r.run.tokens})
    trials = [r for r in results if r.trial]
    if not rates:
        return ""
    if not trials and all(is_control(r.run.config["method"]) for r in final if r.run.tokens):
        return f"The learning rate of the dense control, {rates[0]:g}, was not tuned: --learning-rates tries several."
    if not trials:
        which = f"all at {rates[0]:g}" if len(rates) == 1 else f"between {rates[0]:g} and {rates[-1]:g}"
        return (
            f"Learning rates were not tuned: {which}. A method may do better at another, which may change the order: "
            "--learning-rates tries several for each."
        )
    text = trials[0].run.config["eval_dataset"]
    shown = any(r.run.config["eval_dataset"] == text for r in final)
    by = "the perplexity in the table" if shown else f"the perplexity on {text}"
    return (
        f"Learning rates were chosen with seed 0 by {by}, from the same candidates for every variant without a rate of "
        f"its own.{_at_the_edge(final, trials)}"
    )


def _at_the_edge(final: list[Result], trials: list[Result]) -> str:
    """Names the variants whose rate is the smallest or the largest of the candidates, so that none beyond was tried."""
    tried: dict[str, list[float]] = {}
    for each in trials:
        tried.setdefault(each.run.variant, []).append(each.run.config["learning_rate"])
    chosen = [(each.run.variant, each.run.config["learning_rate"]) for each in final if each.run.variant in tried]
    parts = []
    for end, of in (("smallest", min), ("largest", max)):
        if found := dict.fromkeys(variant for variant, rate in chosen if rate == of([rate, *tried[variant]])):
            parts.append(f"the {end} candidate for {', '.join(found)}")
    return f" The best rate is {' and '.join(parts)}: one beyond it may be better." if parts else ""


def stamp(results: list[Result]) -> dict[str, Any]:
    """The conditions of all figures: text, sequence length, tokenizer, versions, machine and date."""
    from castlm.hardware import cpu_name, library_versions  # imports torch

    facts = next((r.facts for r in results if r.facts.measured is not None and not r.trial), None)
    measured = {} if facts is None or facts.measured is None else to_json(facts.measured)
    used = [r.facts.versions for r in results if r.facts.versions]
    used = used or [library_versions("torch", "transformers")]  # no run has recorded any yet
    return {
        "metric": "perplexity",
        **measured,
        "base_model": None if facts is None else facts.base_model,
        "dataset_sha256": next((r.facts.dataset.sha256 for r in results if r.facts.dataset), None),
        "versions": {name: " and ".join(sorted({versions[name] for versions in used})) for name in used[0]},
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "devices": sorted({r.facts.machine for r in results if r.facts.machine is not None}),
        "date": datetime.date.today().isoformat(),
    }


def explain(facts: dict[str, Any], results: list[Result]) -> list[str]:
    """The lines under the table: the conditions of its figures."""
    final = [r for r in results if not r.trial]
    untouched = untouched_perplexity(final)
    scored = f" (only the {facts['tokens']}'s are scored)" if facts.get("tokens") == "assistant" else ""
    lines = [
        f"Perplexity on {facts.get('num_tokens', 0):,} tokens{scored} of {facts.get('text')} (sha256 "
        f"{str(facts.get('text_sha256'))[:16]}), seq_len {facts.get('seq_len')}, stride {facts.get('stride')}, "
        f"tokenizer {facts.get('tokenizer')}, {facts.get('precision')}. {facts.get('base_model')} before any training: "
        + (f"{untouched:.3f}." if untouched else "not measured."),
        f"{', '.join(f'{k} {v}' for k, v in facts['versions'].items())}; {facts['cpu']}, {facts['cpus']} CPUs, "
        f"threads per run: {facts['threads']}; {', '.join(facts['devices'])}; {facts['date']}.",
    ]
    if any(r.run.config.get("teacher_cache") for r in final):
        lines.append("The runs share a teacher cache, which the first of them fills: their times do not compare.")
    return lines


def _distinguishes(key: str, rows: list[Row]) -> bool:
    """Whether a column distinguishes rows; flips of masks that never change, and a prune without effect, do not."""
    figures = [(getattr(row, key), row.pruned) for row in rows if getattr(row, key) is not None]
    if key in ("flip_rate", "initial_flip_rate"):
        return any(figure.mean for figure, _ in figures)
    if key == "before_prune":
        return any(pruned and abs(figure.mean - pruned.mean) > 1e-6 * pruned.mean for figure, pruned in figures)
    return bool(figures)


class Report:
    """The results of a comparison, finished or not.

    Args:
        command: the command line that repeats the comparison.
        hashes: SHA-256 of the model and the texts, by option; for those on the hub, of name and revision.
    """

    def __init__(self, question: str, results: list[Result], command: str, hashes: Mapping[str, str]) -> None:
        self.question, self.command, self.results = question, command, results
        self.final = [result for result in results if not result.trial]
        """The results with a row in the table."""
        self.rows = rows = summarize(results)
        self.order = ranked(rows)
        self.verdict = verdict(rows)
        shown = [heading for key, (heading, _) in COLUMNS.items() if _distinguishes(key, rows)]
        if len(self.order) > 1:
            shown.insert(shown.index(COLUMNS["gap"][0]) + 1, BEHIND)
        self.headings = ["variant", "start", "tokens", "rate", "seeds", *shown, "options"]
        conditions = stamp(results)
        self.conditions = {**conditions, "sha256": dict(hashes)}
        self.notes = list(filter(None, [starts_note(rows), rates_note(results), *explain(conditions, results)]))
        reasons = [("failed", row.variant, row.errors) for row in rows]
        reasons += [("diverged", row.variant, row.diverged) for row in rows]
        reasons += [("fell short", row.variant, row.fell_short) for row in rows]
        self.warnings = [f"{kind}: {name}, {reason}" for kind, name, found in reasons for reason in found]
        for result in results:
            if result.trial and result.failure is not None:
                name, rate = result.run.variant, result.run.config.get("learning_rate")
                kind = "failed" if result.problem is None else "diverged"
                self.warnings.append(f"{kind}: {name}, a trial at the rate {rate}: {result.failure}")

    def table(self, headings: Sequence[str]) -> list[list[str]]:
        """The cells of each row in the columns `headings`."""
        lines = []
        for number, row in enumerate(self.rows):
            cells = {
                "variant": row.variant,
                "start": row.start,
                "tokens": f"{row.tokens:,}",
                "rate": "" if row.learning_rate is None else f"{row.learning_rate:g}",
                "seeds": str(len(row.seeds)),
                BEHIND: self._behind_the_best(number),
                "options": options_text(row.options),
            }
            for key, (heading, form) in COLUMNS.items():
                figure = getattr(row, key)
                cells[heading] = "" if figure is None else figure.show(form)
            lines.append([cells[heading] for heading in headings])
        return lines

    def _behind_the_best(self, number: int) -> str:
        """The cell of the column `BEHIND`; empty for the best row and for those that are not ranked with it."""
        if number not in self.order[1:]:
            return ""
        found = behind(self.rows[number], self.rows[self.order[0]])
        if found.half_width is None:
            return f"{found.mean:+.4f}"
        return f"{found.mean:+.4f} ± {found.half_width:.4f}{'' if found.excludes_zero else ' (chance?)'}"

    def markdown(self) -> str:
        """The report as Markdown."""
        rule = ["---" if name in ("variant", "start") else "---:" for name in self.headings]
        lines = [
            [cell.replace("|", "\\|") for cell in line] for line in (self.headings, rule, *self.table(self.headings))
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        methods = dict.fromkeys(row.method for row in self.rows if row.method in METHODS)
        meanings = [(name, MEANINGS[name]) for name in self.headings]
        meanings += [(f"method {name}", METHODS[name].title) for name in methods]
        columns = "\n".join(f"- **{name}**: {meaning}" for name, meaning in meanings)
        warnings = [f"- {warning}" for warning in self.warnings]
        parts = [f"# {self.question}", self.verdict, f"`{self.command}`", table, *warnings, *self.notes, columns]
        return "\n\n".join(parts) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The report for table.json."""
        tuned = {r.run.variant for r in self.results if r.trial}
        tried = [r for r in self.results if r.run.tokens and r.run.seed == 0 and r.run.variant in tuned]
        done = [
            (r, {**r.facts.to_json(), "method": r.run.variant, "seed": r.run.seed, "key": r.run.key})
            for r in self.final
            if r.failure is None
        ]
        return {
            "question": self.question,
            "verdict": self.verdict,
            "command": self.command,
            "stamp": self.conditions,
            "untouched": untouched_perplexity(self.final),
            "rows": [row.to_json() for row in self.rows],
            "trials": [
                {"variant": r.run.variant, "tokens": r.run.tokens, "learning_rate": r.run.config["learning_rate"]}
                | {"perplexity": r.perplexity, "text": r.run.config["eval_dataset"], "in_table": not r.trial}
                for r in tried
            ],
            "results": [record for r, record in done if r.run.tokens],  # as `castlm plan fit` reads them
            "one_shot_results": [record for r, record in done if not r.run.tokens],
        }

    def write(self, root: Path) -> None:
        """Writes table.md and table.json, and the chart over token budgets as gaps.svg, into `root`."""
        atomic_write_json(root / "table.json", self.as_dict())
        atomic_write_text(root / "table.md", self.markdown())
        budgets = {row.tokens for row in self.rows if row.ranked_gap is not None and row.tokens}
        if can_draw() and len(budgets) > 1:
            atomic_write_text(root / "gaps.svg", gaps_over_budgets(self.rows))


def gaps_over_budgets(rows: list[Row]) -> str:
    """A chart (SVG) of the gaps to the dense control of the same budget: a line for each variant, a band of a standard
    deviation over the seeds, and one-shot methods, against the control of the largest budget, as levels."""
    shown = [(row, row.ranked_gap) for row in rows if row.ranked_gap is not None]
    lines = []
    for number, name in enumerate(dict.fromkeys(row.variant for row, _ in shown if row.tokens)):
        of_name = [(row.tokens, gap) for row, gap in shown if row.variant == name]
        points = [(tokens, gap.mean) for tokens, gap in of_name]
        lines.append(Series(name, points, number, marks=True, spread=[gap.std or 0.0 for _, gap in of_name]))
    return line_chart(
        lines,
        x_label="training tokens",
        y_label="ln(perplexity / dense control)",
        levels={row.variant: gap.mean for row, gap in shown if not row.tokens},
        log_x=True,
        log_y=min(gap.mean for _, gap in shown) > 0,
        width=WHOLE,
        height=360,
    )
