"""`castlm compare`: CAST and other methods in one harness, and their table on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from castlm.cli.options import command_line, parse, to_stderr
from castlm.compare.config import CompareConfig
from castlm.compare.plan import compare

if TYPE_CHECKING:
    from castlm.compare.report import Report


def show(report: Report, folder: str) -> None:
    """Prints the table, the verdict and the path of the page."""
    from rich.table import Table
    from rich.text import Text

    from castlm.progress import Screen

    table = Table(title=report.question, title_justify="left")
    for heading in report.table.headings:
        table.add_column(heading, justify="left" if heading in ("variant", "start") else "right")
    for line in report.table.lines:
        table.add_row(*map(Text, line))
    console = Screen(highlight=False)
    if not console.is_terminal:  # a log has no width to wrap at
        console = Screen(highlight=False, width=100)
    console.print(table)
    for text in (*report.warnings, *report.notes, report.verdict, f"report: {Path(folder, 'table.html')}"):
        console.print(text, markup=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    config = parse(CompareConfig, arguments, "compare")
    code, report = compare(config, command_line("compare", config), to_stderr)
    show(report, config.output_dir)
    return code
