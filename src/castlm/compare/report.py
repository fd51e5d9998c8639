"""The table of `castlm compare`: one summary, on the screen, as Markdown, as JSON, and as HTML with its plots inside.

Every figure is a mean over seeds with its sample standard deviation, and stands beside what it was measured on.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.files import atomic_write_json

if TYPE_CHECKING:
    from castlm.compare.plots import Picture
    from castlm.compare.presets import Preset
    from castlm.compare.results import Result


class Spread(NamedTuple):
    """A figure over seeds. `std` is the sample standard deviation, None for one seed."""

    mean: float
    std: float | None
    values: tuple[float, ...]

    def show(self, form: str) -> str:
        return format(self.mean, form) + ("" if self.std is None else f" ± {format(self.std, form.lstrip('+'))}")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Over those that are there; None when none is."""
    found = tuple(float(v) for v in values if v is not None)
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, found)


class Column(NamedTuple):
    """A column of the table: key of the row, heading, format, and factor to the unit of the heading."""

    key: str
    heading: str
    form: str
    factor: float = 1.0


COLUMNS = (
    Column("before_prune", "before the prune", ".3f"),
    Column("pruned", "pruned", ".3f"),
    Column("gap", "ln(ppl / dense control)", "+.4f"),
    Column("gap_untouched", "ln(ppl / untouched)", "+.4f"),
    Column("flip_rate", "flip rate", ".1e"),
    Column("initial_flip_rate", "flips since step 0", ".2%"),
    Column("sparse_weight_ratio", "sparse-weight ratio", ".4f"),
    Column("train_seconds", "time, s", ".0f"),
    Column("peak_memory_bytes", "peak memory, MiB", ".0f", 1 / 2**20),
)


def summarize(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each variant and budget, in the order of `results`; figures are `Spread` over the seeds, or None.

    `gap` is ln(perplexity / that of the dense control of the same budget and seed), after the prune; for one-shot
    methods, which have no budget, against the control of the largest. A control of another seed is never taken, but
    for methods that do not depend on it, against the mean of the controls.
    """
    final = [r for r in results if not r.trial]
    controls = {
        (r.run.tokens, r.run.seed): r.perplexity
        for r in final
        if r.run.config["method"] == "dense" and math.isfinite(r.perplexity)
    }
    largest = max((tokens for tokens, _ in controls), default=0)
    untouched = untouched_perplexity(final)
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in final:
        groups.setdefault((result.run.variant, result.run.tokens), []).append(result)
    return [_row(group, controls, largest, untouched) for group in groups.values()]


def _row(
    group: list[Result], controls: dict[tuple[int, int], float], largest: int, untouched: float | None
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
        "zero_shot": _zero_shot(done),
        "errors": [f"seed {r.run.seed}: {r.record['error']}" for r in group if "error" in r.record],
    }


def _zero_shot(done: list[Result]) -> dict[str, Spread | None]:
    """Accuracies over seeds by "task metric"."""
    by_name: dict[str, list[float]] = {}
    for result in done:
        for row in result.zero_shot:
            by_name.setdefault(f"{row['task']} {row['metric']}", []).append(row["value"])
    return {name: spread(values) for name, values in by_name.items()}


def untouched_perplexity(results: list[Result]) -> float | None:
    """Of the model as it came, which every run but those that mask from the start measures first."""
    return next((r.record["perplexity"]["dense"] for r in results if "dense" in r.record.get("perplexity", {})), None)


def stamp(results: list[Result]) -> dict[str, Any]:
    """What all figures were measured on: text, context, tokenizer, versions, machine, date."""
    record = next((r.record for r in results if "measured" in r.record and not r.trial), {})
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    libraries = ("castlm", "torch", "transformers")
    return {
        "metric": "perplexity",
        **record.get("measured", {}),
        "base_model": record.get("base_model"),
        "dataset_sha256": next((r.record["dataset"]["sha256"] for r in results if "dataset" in r.record), None),
        "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "devices": sorted({r.record["machine"] for r in results if "machine" in r.record}),
        "date": datetime.date.today().isoformat(),
    }


def explain(facts: dict[str, Any], results: list[Result]) -> list[str]:
    """The lines under the table: what its figures were measured on, and how to read them."""
    final = [r for r in results if not r.trial]
    untouched = untouched_perplexity(final)
    lines = [
        f"Perplexity on {facts.get('num_tokens', 0):,} tokens of {facts.get('text')} (sha256 "
        f"{str(facts.get('text_sha256'))[:16]}), context {facts.get('seq_len')}, stride {facts.get('stride')}, "
        f"tokenizer {facts.get('tokenizer')}, {facts.get('precision')}; {facts.get('base_model')} as it came: "
        + (f"{untouched:.3f}." if untouched else "not measured."),
        f"{', '.join(f'{k} {v}' for k, v in facts['versions'].items())}; {facts['cpu']}, {facts['cpus']} CPUs, "
        f"{facts['threads']} threads a run, {', '.join(facts['devices'])}; {facts['date']}.",
        "Mean ± sample standard deviation over seeds. The flip rate is of one mask refresh, at the end.",
    ]
    if trials := [r for r in results if r.trial]:
        text = trials[0].run.config["eval_dataset"]
        by = "the perplexity shown" if any(r.run.config["eval_dataset"] == text for r in final) else f"that of {text}"
        lines.append(f"Learning rates were chosen with seed 0, by {by}, of equally many for each variant.")
    return lines + _raised_damping(final)


def _raised_damping(final: list[Result]) -> list[str]:
    """A line for each one-shot variant of which some layers took more damping than was asked for."""
    raised: dict[str, list[Result]] = {}
    for result in final:
        if result.record.get("raised_damping"):
            raised.setdefault(result.run.variant, []).append(result)
    lines = []
    for variant, results in raised.items():
        layers = [r.record["raised_damping"] for r in results]
        lines.append(
            f"{variant}: up to {max(map(len, layers))} layers took more damping than {results[0].record['damping']:g}, "
            f"up to {max(max(taken.values()) for taken in layers):g}, with seed "
            f"{', '.join(str(r.run.seed) for r in results)}; the castlm.json of each run lists them."
        )
    return lines


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table as text: headings, and a list of cells for each row."""
    tasks = list(dict.fromkeys(name for row in rows for name in row["zero_shot"]))
    shown = [c for c in COLUMNS if any(row[c.key] is not None for row in rows)]
    headings = ["variant", "tokens", "rate", "seeds", *(c.heading for c in shown), *tasks]
    lines = []
    for row in rows:
        figures = [(row[c.key], c.form, c.factor) for c in shown]
        figures += [(row["zero_shot"].get(task), ".3f", 1.0) for task in tasks]
        lines.append(
            [
                row["variant"],
                f"{row['tokens']:,}",
                "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
                str(len(row["seeds"])),
                *("" if s is None else _scaled(s, f).show(form) for s, form, f in figures),
            ]
        )
    return headings, lines


def _scaled(figure: Spread, factor: float) -> Spread:
    std = None if figure.std is None else figure.std * factor
    return Spread(figure.mean * factor, std, tuple(v * factor for v in figure.values))


def markdown(question: str, rows: list[dict[str, Any]], notes: list[str], command: str) -> str:
    headings, lines = cells(rows)
    rule = ["---", *("---:" for _ in headings[1:])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))
    errors = [f"- failed: {row['variant']}, {error}" for row in rows for error in row["errors"]]
    parts = [f"# {question}", f"`{command}`", table, *errors, *notes]
    return "\n\n".join(parts) + "\n"


def write_report(
    root: Path,
    preset: Preset,
    results: list[Result],
    command: str,
    show: bool,
    untouched: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes table.md and table.json into `root`; with `show` table.html, its plots as .svg, and prints the table.

    Args:
        untouched: zero-shot rows of the model as it came.
    """
    rows, facts = summarize(results), stamp(results)
    notes = explain(facts, results)
    if untouched:
        figures = ", ".join(f"{row['task']} {row['metric']} {row['value']:.3f}" for row in untouched)
        notes.append(f"Zero-shot by lm-eval, no examples, no chat template; the model as it came: {figures}.")
    trained = [r for r in results if not r.trial and r.run.tokens and "error" not in r.record]
    atomic_write_json(
        root / "table.json",
        {
            "question": preset.question,
            "command": command,
            "stamp": facts,
            "untouched": untouched_perplexity([r for r in results if not r.trial]),
            "untouched_zero_shot": list(untouched),
            "rows": [_plain(row) for row in rows],
            "trials": [
                {"variant": r.run.variant, "tokens": r.run.tokens, "learning_rate": r.run.config["learning_rate"]}
                | {"perplexity": r.perplexity, "text": r.run.config["eval_dataset"], "in_table": not r.trial}
                for r in results
                if r.run.tokens and r.run.seed == 0 and any(o.trial and o.run.variant == r.run.variant for o in results)
            ],
            # one record a run, as `castlm plan fit` reads them
            "results": [
                {**r.record, "method": r.run.variant, "seed": r.run.seed, "key": r.run.key, "zero_shot": r.zero_shot}
                for r in trained
            ],
        },
    )
    (root / "table.md").write_text(markdown(preset.question, rows, notes, command), encoding="utf-8")
    if not show:
        return
    print_table(preset.question, rows, notes)
    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None:
        print(f"{root / 'table.md'}, table.json; for table.html: pip install 'castlm[report]'")
        return
    from castlm.compare.plots import PLOTS

    drawn = {name: PLOTS[name](rows, [r for r in results if not r.trial]) for name in preset.plots}
    pictures = {name: picture for name, picture in drawn.items() if picture is not None}
    for name, picture in pictures.items():
        (root / f"{name}.svg").write_text(picture.svg, encoding="utf-8")
    (root / "table.html").write_text(html(preset, rows, notes, command, pictures.values()), encoding="utf-8")
    print(f"{root / 'table.html'}, with table.md, table.json and its plots beside it")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, Spread) else value

    return {k: plain(v) for k, v in row.items()} | {"zero_shot": {k: plain(v) for k, v in row["zero_shot"].items()}}


def print_table(question: str, rows: list[dict[str, Any]], notes: list[str]) -> None:
    from rich.table import Table

    from castlm.progress import Screen

    headings, lines = cells(rows)
    table = Table(title=question, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    console = Screen(highlight=False)
    if not console.is_terminal:  # a log has no width
        console = Screen(highlight=False, width=200)
    console.print(table)
    for row in rows:
        for error in row["errors"]:
            console.print(f"failed: {row['variant']}, {error}", markup=False)
    for note in notes:
        console.print(note, markup=False)


def html(
    preset: Preset, rows: list[dict[str, Any]], notes: list[str], command: str, pictures: Iterable[Picture]
) -> str:
    """One file that holds its plots; nothing is fetched when it is opened."""
    from jinja2 import Environment, PackageLoader

    headings, lines = cells(rows)
    environment = Environment(loader=PackageLoader("castlm.compare", "."), autoescape=True)
    return environment.get_template("report.html.jinja").render(
        question=preset.question,
        command=command,
        headings=headings,
        lines=lines,
        errors=[f"{row['variant']}, {error}" for row in rows for error in row["errors"]],
        notes=notes,
        pictures=pictures,
    )
