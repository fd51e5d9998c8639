"""`castlm compare`: CAST and other methods in one harness, and their table on the screen.

`python -m castlm.cli.compare CONFIG.yaml` is the process of a one-shot row.
"""

from __future__ import annotations

import sys
from pathlib import Path

from castlm.cli.options import command_line, parse
from castlm.compare.plan import CompareConfig, compare
from castlm.compare.report import Report
from castlm.compare.runs import OneshotConfig
from castlm.core.errors import InputError
from castlm.fields import build
from castlm.files.yaml_file import read_yaml_mapping
from castlm.progress import Screen, note


def show(report: Report, folder: str) -> None:
    """Prints the table, the verdict and the path of the page."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=report.question, title_justify="left")
    for heading in report.headings:
        table.add_column(heading, justify="left" if heading in ("variant", "start") else "right")
    for line in report.table(report.headings):
        table.add_row(*map(Text, line))
    console = Screen(highlight=False)
    if not console.is_terminal:  # a log has no width to wrap at
        console = Screen(highlight=False, width=100)
    console.print(table)
    for text in (*report.warnings, *report.notes, report.verdict, f"report: {Path(folder, 'table.html')}"):
        console.print(text, markup=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    config = parse(CompareConfig, arguments, "compare")
    code, report = compare(config, command_line("compare", config), note)
    show(report, config.output_dir)
    return code


def one_shot_row(file: str) -> int:
    """Runs a one-shot row with the options of a YAML file; returns the exit code."""
    from castlm.compare.oneshot import run_oneshot

    try:
        run_oneshot(build(OneshotConfig, read_yaml_mapping(file), file))
    except InputError as error:
        note(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(one_shot_row(sys.argv[1]))
