"""The report of `castlm compare`: one summary as Markdown, as JSON, and as an HTML page with its charts inside.

Every figure is a mean over seeds with its sample standard deviation, beside the conditions of its measurement.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.compare.summary import (
    Spread,
    options_text,
    ranked,
    starts_note,
    summarize,
    untouched_perplexity,
    verdict,
)
from castlm.files.atomic_file import atomic_write_json, atomic_write_text
from castlm.methods.table import METHODS
from castlm.versions import library_versions

if TYPE_CHECKING:
    from castlm.compare.presets import Preset
    from castlm.compare.runs import Result
    from castlm.report.charts import Picture


class Column(NamedTuple):
    """A column of figures in the table."""

    key: str
    """The figure's name in a row of `summarize`."""
    heading: str
    form: str
    meaning: str


COLUMNS = (
    Column(
        "before_prune",
        "before the prune",
        ".3f",
        "Perplexity as the model trained, before masked weights are removed.",
    ),
    Column(
        "pruned",
        "pruned",
        ".3f",
        "Perplexity after every masked weight is set to zero, or of the trained dense control.",
    ),
    Column(
        "gap",
        "gap to dense control",
        "+.4f",
        "ln(perplexity / perplexity of the dense control with the same token budget and seed), in nats per token. 0 "
        "means that sparsity cost nothing. magnitude, which depends on no seed, is compared with the control of each.",
    ),
    Column(
        "gap_untouched",
        "gap to original",
        "+.4f",
        "ln(perplexity / perplexity of the dense model before any training). Training alone can make it negative.",
    ),
    Column("flip_rate", "flip rate", ".1e", "Share of the mask entries that the last refresh of the masks changed."),
    Column(
        "initial_flip_rate",
        "flips since step 0",
        ".2%",
        "Share of the mask entries that differ from the masks of step 0.",
    ),
    Column(
        "sparse_weight_ratio",
        "kept share",
        ".4f",
        "sum |kept weights| / sum |all weights| of the sparse layers before the prune; 1: nothing left to prune.",
    ),
    Column(
        "start_tokens",
        "start, tokens",
        ",.0f",
        "Tokens that the start read before step 0; empty for one-shot methods.",
    ),
    Column("train_seconds", "time, s", ".0f", "Seconds of the optimizer steps; of one-shot methods, of the pruning."),
    Column("start_seconds", "start, s", ".0f", "Seconds that the start took before step 0."),
    Column("peak_memory_mib", "peak memory, MiB", ".0f", "The most memory that the process of the run held."),
)

LEADING = {
    "variant": "A method, or a method with other options.",
    "start": "The sparse weights and masks before step 0. dense: the method has no start of its own.",
    "tokens": "Training tokens: the whole steps that fit in the token budget.",
    "rate": "Peak learning rate.",
    "options": "The options of the method that have an effect, and all options in which the variants differ.",
    "seeds": "Number of finished runs; figures are mean ± sample standard deviation over them.",
}


SHORT = ("variant", "start", "tokens", "rate", "pruned", "gap to dense control")
"""Columns of the table on a terminal and in table.md; the page has all of them."""


@dataclass(frozen=True)
class Cells:
    """A table as text: headings, and the cells of each row."""

    headings: list[str]
    lines: list[list[str]]

    def only(self, kept: Collection[str]) -> Cells:
        """A copy with some of the columns."""
        places = [place for place, heading in enumerate(self.headings) if heading in kept]
        return Cells([self.headings[i] for i in places], [[line[i] for i in places] for line in self.lines])


def stamp(results: list[Result]) -> dict[str, Any]:
    """The conditions of all figures: text, sequence length, tokenizer, versions, machine and date."""
    from castlm.hardware import cpu_name  # imports torch

    record = next((r.record for r in results if "measured" in r.record and not r.trial), {})
    return {
        "metric": "perplexity",
        **record.get("measured", {}),
        "base_model": record.get("base_model"),
        "dataset_sha256": next((r.record["dataset"]["sha256"] for r in results if "dataset" in r.record), None),
        "versions": _versions(results),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "devices": sorted({r.record["machine"] for r in results if "machine" in r.record}),
        "date": datetime.date.today().isoformat(),
    }


def _versions(results: list[Result]) -> dict[str, str]:
    """The package versions that the runs used, or of this process if no run records any."""
    recorded = [r.record["versions"] for r in results if "versions" in r.record]
    made = recorded or [library_versions("torch", "transformers")]
    return {name: " and ".join(sorted({versions[name] for versions in made})) for name in made[0]}


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
        f"{facts['threads']} threads per run, {', '.join(facts['devices'])}; {facts['date']}.",
    ]
    if trials := [r for r in results if r.trial]:
        text = trials[0].run.config["eval_dataset"]
        shown = any(r.run.config["eval_dataset"] == text for r in final)
        by = "the perplexity in the table" if shown else f"the perplexity on {text}"
        lines.append(
            f"Learning rates were chosen with seed 0 by {by}, from the same candidates for every variant without a "
            "rate of its own."
        )
    if any(r.run.config.get("teacher_cache") for r in final):
        lines.append("The runs share a teacher cache, which the first of them fills: their times do not compare.")
    return lines


def cells(rows: list[dict[str, Any]]) -> Cells:
    """The whole table."""
    shown = [column for column in COLUMNS if _is_shown(column, rows)]
    headings = ["variant", "start", "tokens", "rate", "seeds", *(c.heading for c in shown), "options"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["variant"],
                row["start"],
                f"{row['tokens']:,}",
                "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
                str(len(row["seeds"])),
                *("" if row[c.key] is None else row[c.key].show(c.form) for c in shown),
                options_text(row["options"]),
            ]
        )
    return Cells(headings, lines)


def _is_shown(column: Column, rows: list[dict[str, Any]]) -> bool:
    """Whether a column distinguishes rows; flips of masks that never change, and a prune without effect, do not."""
    figures = [(row[column.key], row["pruned"]) for row in rows if row[column.key] is not None]
    if column.key in ("flip_rate", "initial_flip_rate"):
        return any(figure.mean for figure, _ in figures)
    if column.key == "before_prune":
        return any(abs(figure.mean - pruned.mean) > 1e-6 * pruned.mean for figure, pruned in figures)
    return bool(figures)


@dataclass(frozen=True)
class Report:
    """The results of a comparison, finished or not.

    Attributes:
        rows: see `summarize`.
        conditions: see `stamp`, with the hashes of the model and the texts.
        page: the whole table, for the page.
        table: its columns `SHORT`, for a terminal and for table.md.
        warnings: lines on runs that failed, diverged or fell short.
    """

    question: str
    command: str
    results: list[Result]
    rows: list[dict[str, Any]]
    conditions: dict[str, Any]
    verdict: str
    page: Cells
    table: Cells
    warnings: list[str]
    notes: list[str]

    @property
    def final(self) -> list[Result]:
        """The results with a row in the table."""
        return [result for result in self.results if not result.trial]

    def glossary(self, table: Cells) -> list[tuple[str, str]]:
        """The meaning of every column of `table`, and of every method that trains."""
        meanings = LEADING | {column.heading: column.meaning for column in COLUMNS}
        columns = [(name, meanings[name]) for name in table.headings if name in meanings]
        methods = dict.fromkeys(row["method"] for row in self.rows if row["method"] in METHODS)
        return columns + [(f"method {name}", METHODS[name].title) for name in methods]

    def markdown(self) -> str:
        """The report as Markdown."""
        headings = self.table.headings
        rule = ["---" if name in ("variant", "start") else "---:" for name in headings]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in (headings, rule, *self.table.lines)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        columns = "\n".join(f"- **{name}**: {meaning}" for name, meaning in self.glossary(self.table))
        warnings = [f"- {warning}" for warning in self.warnings]
        parts = [f"# {self.question}", self.verdict, f"`{self.command}`", table, *warnings, *self.notes, columns]
        return "\n\n".join(parts) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The report for table.json."""
        tuned = {r.run.variant for r in self.results if r.trial}
        tried = [r for r in self.results if r.run.tokens and r.run.seed == 0 and r.run.variant in tuned]
        done = [r for r in self.final if "error" not in r.record]
        return {
            "question": self.question,
            "verdict": self.verdict,
            "command": self.command,
            "stamp": self.conditions,
            "untouched": untouched_perplexity(self.final),
            "rows": [_plain(row) for row in self.rows],
            "trials": [
                {"variant": r.run.variant, "tokens": r.run.tokens, "learning_rate": r.run.config["learning_rate"]}
                | {"perplexity": r.perplexity, "text": r.run.config["eval_dataset"], "in_table": not r.trial}
                for r in tried
            ],
            "results": [_record(r) for r in done if r.run.tokens],  # as `castlm plan fit` reads them
            "one_shot_results": [_record(r) for r in done if not r.run.tokens],
        }

    def write(self, root: Path, preset: Preset) -> None:
        """Writes table.md, table.json, table.html and the charts as .svg into `root`."""
        from castlm.compare.plots import PLOTS
        from castlm.report.charts import can_draw, render

        pictures: dict[str, Picture] = {}
        for name in dict.fromkeys((*preset.plots, "losses")) if can_draw() else ():
            pictures |= PLOTS[name](self.rows, self.final)
        atomic_write_json(root / "table.json", self.as_dict())
        atomic_write_text(root / "table.md", self.markdown())
        for name, picture in pictures.items():
            atomic_write_text(root / f"{name}.svg", picture.svg)
        page = render(
            "compare.html.jinja",
            title=self.question,
            report=self,
            pictures=pictures.values(),
            glossary=self.glossary(self.page),
            best=next(iter(ranked(self.rows)), None),
        )
        atomic_write_text(root / "table.html", page)


def make_report(
    question: str,
    results: list[Result],
    command: str,
    hashes: Mapping[str, str],
) -> Report:
    """Builds the report of a comparison.

    Args:
        command: the command line that repeats the comparison.
        hashes: SHA-256 of the model and the texts, by option; for those on the hub, of name and revision.
    """
    rows, conditions = summarize(results), stamp(results)
    page = cells(rows)
    notes = [starts_note(rows), *explain(conditions, results)]
    warnings = [
        f"{kind}: {row['variant']}, {reason}"
        for kind, key in (("failed", "errors"), ("diverged", "diverged"), ("fell short", "fell_short"))
        for row in rows
        for reason in row[key]
    ]
    warnings += [
        f"failed: {r.run.variant}, a trial at the rate {r.run.config.get('learning_rate')}: {r.record['error']}"
        for r in results
        if r.trial and "error" in r.record
    ]
    conditions["sha256"] = dict(hashes)
    notes = list(filter(None, notes))
    table = page.only(SHORT)
    return Report(question, command, results, rows, conditions, verdict(rows), page, table, warnings, notes)


def _record(r: Result) -> dict[str, Any]:
    return {**r.record, "method": r.run.variant, "seed": r.run.seed, "key": r.run.key}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Spread) else value for name, value in row.items()}
