"""The table of `castlm compare`: a row for each variant and token budget over its seeds, a verdict, and their report.

The report is one summary as Markdown, as JSON, and as an HTML page with its charts inside. Every figure is a mean over
seeds with its sample standard deviation, beside the conditions of its measurement.
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from castlm.fields import without_result
from castlm.files.atomic_file import atomic_write_json, atomic_write_text
from castlm.lab.compare.plots import PLOTS, Spread, has_gap, spread
from castlm.lab.compare.presets import ONESHOT, Preset
from castlm.lab.compare.runs import NAMED, Result
from castlm.lab.report.charts import Picture, can_draw, render
from castlm.methods.table import METHODS, is_control
from castlm.training.config import TrainConfig
from castlm.training.options import StartOptions
from castlm.training.record import start_seconds

COLUMNS = {
    "before_prune": ("before the prune", ".3f"),
    "pruned": ("pruned", ".3f"),
    "gap": ("gap to dense control", "+.4f"),
    "gap_untouched": ("gap to original", "+.4f"),
    "flip_rate": ("flip rate", ".1e"),
    "initial_flip_rate": ("flips since step 0", ".2%"),
    "sparse_weight_ratio": ("kept share", ".4f"),
    "start_tokens": ("start, tokens", ",.0f"),
    "train_seconds": ("time, s", ".0f"),
    "start_seconds": ("start, s", ".0f"),
    "peak_memory_mib": ("peak memory, MiB", ".0f"),
}
"""Heading and number format by the name of a figure in a row of `summarize`."""
RECORDED: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "before_prune": lambda record: record["perplexity"].get("before_prune"),
    "flip_rate": lambda record: record.get("mask", {}).get("flip_rate"),
    "initial_flip_rate": lambda record: record.get("mask", {}).get("initial_flip_rate"),
    "sparse_weight_ratio": lambda record: record.get("mask", {}).get("sparse_weight_ratio"),
    "start_tokens": lambda record: (record.get("start") or {}).get("calibration_tokens"),
    "train_seconds": lambda record: record.get("train_seconds", record.get("prune_seconds")),
    "start_seconds": lambda record: start_seconds(record.get("start") or {}),
    "peak_memory_mib": lambda record: record["peak_memory_bytes"] / 2**20 if "peak_memory_bytes" in record else None,
}
"""Each figure of a row, read from the record of a run, its castlm.json; None without it."""
SHORT = ("variant", "start", "tokens", "rate", "pruned", "gap to dense control")
"""Columns of the table on a terminal and in table.md; the page has all of them."""
MEANINGS = {
    "variant": "A method, or a method with other options.",
    "start": "The sparse weights and masks before step 0. dense: the method has no start of its own.",
    "tokens": "Training tokens: the whole steps that fit in the token budget.",
    "rate": "Peak learning rate.",
    "options": "The options of the method that have an effect, and all options in which the variants differ.",
    "seeds": "Number of finished runs; figures are mean ± sample standard deviation over them.",
    "before the prune": "Perplexity as the model trained, before masked weights are removed.",
    "pruned": "Perplexity after every masked weight is set to zero, or of the trained dense control.",
    "gap to dense control": "ln(perplexity / perplexity of the dense control with the same token budget and seed), in "
    "nats per token. 0 means that sparsity cost nothing. magnitude, which depends on no seed, is compared with the "
    "control of each.",
    "gap to original": "ln(perplexity / perplexity of the dense model before any training). Training alone can make it "
    "negative.",
    "flip rate": "Share of the mask entries that the last refresh of the masks changed.",
    "flips since step 0": "Share of the mask entries that differ from the masks of step 0.",
    "kept share": "sum |kept weights| / sum |all weights| of the sparse layers before the prune; 1: nothing left to "
    "prune.",
    "start, tokens": "Tokens that the start read before step 0; empty for one-shot methods.",
    "time, s": "Seconds of the optimizer steps; of one-shot methods, of the pruning.",
    "start, s": "Seconds that the start took before step 0.",
    "peak memory, MiB": "The most memory that the process of the run held.",
}
SHOWN_ELSEWHERE = {"method", "seed", "learning_rate", "init_from", "max_steps", "eval_steps", *NAMED}
START_OPTIONS = {option.name for option in fields(StartOptions)}
"""Options that distinguish starts of the same name."""


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

    def reasons(problem: str) -> list[str]:
        return [f"seed {r.run.seed}: {r.record['verdict']['reason']}" for r in done if r.problem == problem]

    gaps: dict[int, float] = {}  # by the seed of the control
    of_budget = {seed: value for (tokens, seed), value in controls.items() if tokens == (run.budget or largest)}
    for result in done:
        seeds = of_budget if run.config["method"] == "magnitude" else {result.run.seed} & of_budget.keys()
        gaps |= {seed: math.log(result.perplexity / of_budget[seed]) for seed in seeds}
    return {
        "variant": run.variant,
        "method": run.config["method"],
        "budget": run.budget,
        "tokens": run.tokens,
        "learning_rate": run.config.get("learning_rate"),
        "start": start_of(run.config),
        "options": options,
        "seeds": [r.run.seed for r in done],
        "pruned": spread(r.perplexity for r in done),
        "gap": spread(gaps.values()),
        "gap_seeds": list(gaps),
        "gap_untouched": spread(math.log(r.perplexity / untouched) if untouched else None for r in done),
        **{name: spread(value(r.record) for r in done) for name, value in RECORDED.items()},
        "diverged": reasons("diverged"),
        "fell_short": reasons("fell short"),
        "errors": [f"seed {r.run.seed}: {r.record['error']}" for r in group if "error" in r.record],
    }


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
    names = {name for config in trained for name in config} - SHOWN_ELSEWHERE
    names -= without_result(TrainConfig.sections().values())
    of_methods = {name for method in METHODS.values() for name in method.options}
    differing = [name for name in sorted(names - of_methods) if len({str(config.get(name)) for config in trained}) > 1]
    found: dict[str, dict[str, Any]] = {}
    for variant, config in variants.items():
        method = str(config["method"])
        if method in ONESHOT:
            found[variant] = {} if method == "magnitude" else {"num_sequences": config.get("num_sequences")}
            continue
        run = TrainConfig.from_mapping({**config, "output_dir": method})  # which no effect depends on
        own = [name for name in METHODS[method].options if run.needs(name) is None]
        found[variant] = {name: config[name] for name in (*own, *differing) if config.get(name) is not None}
    return found


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
    starts = set()
    for row in rows:
        if row["tokens"] and row["start"] != "dense":
            options = options_text({name: value for name, value in row["options"].items() if name in START_OPTIONS})
            starts.add(f"{row['start']} with {options}" if options else row["start"])
    if len(starts) > 1:
        return f"The starts differ ({'; '.join(sorted(starts))}): compare methods only within one start."
    return f"Every method that trains from a pruned start had the same one: {starts.pop()}." if starts else ""


def stamp(results: list[Result]) -> dict[str, Any]:
    """The conditions of all figures: text, sequence length, tokenizer, versions, machine and date."""
    from castlm.hardware import cpu_name, library_versions  # imports torch

    record = next((r.record for r in results if "measured" in r.record and not r.trial), {})
    used = [r.record["versions"] for r in results if "versions" in r.record]
    used = used or [library_versions("torch", "transformers")]  # no run has recorded any yet
    return {
        "metric": "perplexity",
        **record.get("measured", {}),
        "base_model": record.get("base_model"),
        "dataset_sha256": next((r.record["dataset"]["sha256"] for r in results if "dataset" in r.record), None),
        "versions": {name: " and ".join(sorted({versions[name] for versions in used})) for name in used[0]},
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "devices": sorted({r.record["machine"] for r in results if "machine" in r.record}),
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


def _distinguishes(key: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a column distinguishes rows; flips of masks that never change, and a prune without effect, do not."""
    figures = [(row[key], row["pruned"]) for row in rows if row[key] is not None]
    if key in ("flip_rate", "initial_flip_rate"):
        return any(figure.mean for figure, _ in figures)
    if key == "before_prune":
        return any(abs(figure.mean - pruned.mean) > 1e-6 * pruned.mean for figure, pruned in figures)
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
        self.verdict = verdict(rows)
        shown = [heading for key, (heading, _) in COLUMNS.items() if _distinguishes(key, rows)]
        self.page_headings = ["variant", "start", "tokens", "rate", "seeds", *shown, "options"]
        self.headings = [heading for heading in self.page_headings if heading in SHORT]
        """The columns of the table on a terminal and in table.md."""
        conditions = stamp(results)
        self.conditions = {**conditions, "sha256": dict(hashes)}
        self.notes = list(filter(None, [starts_note(rows), *explain(conditions, results)]))
        self.warnings = []
        for kind, key in (("failed", "errors"), ("diverged", "diverged"), ("fell short", "fell_short")):
            for row in rows:
                self.warnings += [f"{kind}: {row['variant']}, {reason}" for reason in row[key]]
        for result in results:
            if result.trial and "error" in result.record:
                name, rate = result.run.variant, result.run.config.get("learning_rate")
                self.warnings.append(f"failed: {name}, a trial at the rate {rate}: {result.record['error']}")

    def table(self, headings: Sequence[str]) -> list[list[str]]:
        """The cells of each row in the columns `headings`."""
        lines = []
        for row in self.rows:
            cells = {
                "variant": row["variant"],
                "start": row["start"],
                "tokens": f"{row['tokens']:,}",
                "rate": "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
                "seeds": str(len(row["seeds"])),
                "options": options_text(row["options"]),
            }
            for key, (heading, form) in COLUMNS.items():
                cells[heading] = "" if row[key] is None else row[key].show(form)
            lines.append([cells[heading] for heading in headings])
        return lines

    def glossary(self, headings: Sequence[str]) -> list[tuple[str, str]]:
        """The meaning of every column, and of every method that trains."""
        methods = dict.fromkeys(row["method"] for row in self.rows if row["method"] in METHODS)
        return [(name, MEANINGS[name]) for name in headings] + [(f"method {m}", METHODS[m].title) for m in methods]

    def markdown(self) -> str:
        """The report as Markdown."""
        rule = ["---" if name in ("variant", "start") else "---:" for name in self.headings]
        lines = [
            [cell.replace("|", "\\|") for cell in line] for line in (self.headings, rule, *self.table(self.headings))
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        columns = "\n".join(f"- **{name}**: {meaning}" for name, meaning in self.glossary(self.headings))
        warnings = [f"- {warning}" for warning in self.warnings]
        parts = [f"# {self.question}", self.verdict, f"`{self.command}`", table, *warnings, *self.notes, columns]
        return "\n\n".join(parts) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The report for table.json."""
        tuned = {r.run.variant for r in self.results if r.trial}
        tried = [r for r in self.results if r.run.tokens and r.run.seed == 0 and r.run.variant in tuned]
        done = [
            (r, {**r.record, "method": r.run.variant, "seed": r.run.seed, "key": r.run.key})
            for r in self.final
            if "error" not in r.record
        ]
        return {
            "question": self.question,
            "verdict": self.verdict,
            "command": self.command,
            "stamp": self.conditions,
            "untouched": untouched_perplexity(self.final),
            "rows": [
                {name: value._asdict() if isinstance(value, Spread) else value for name, value in row.items()}
                for row in self.rows
            ],
            "trials": [
                {"variant": r.run.variant, "tokens": r.run.tokens, "learning_rate": r.run.config["learning_rate"]}
                | {"perplexity": r.perplexity, "text": r.run.config["eval_dataset"], "in_table": not r.trial}
                for r in tried
            ],
            "results": [record for r, record in done if r.run.tokens],  # as `castlm plan fit` reads them
            "one_shot_results": [record for r, record in done if not r.run.tokens],
        }

    def write(self, root: Path, preset: Preset) -> None:
        """Writes table.md, table.json, table.html and the charts as .svg into `root`."""
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
            headings=self.page_headings,
            lines=self.table(self.page_headings),
            pictures=pictures.values(),
            glossary=self.glossary(self.page_headings),
            best=next(iter(ranked(self.rows)), None),
        )
        atomic_write_text(root / "table.html", page)
