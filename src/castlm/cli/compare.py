"""`castlm compare`: CAST and other methods in one harness, and their table on the screen.

`castlm compare --row CONFIG.yaml` is the process of a one-shot row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from castlm.cli.command_line import command_line, parse, to_stdout
from castlm.core.errors import InputError
from castlm.fields import build
from castlm.files.yaml_file import read_yaml_mapping
from castlm.lab.compare.plan import CompareConfig, compare
from castlm.lab.compare.report import SHORT, Report
from castlm.lab.compare.runs import CASTLM, OneshotConfig
from castlm.names import aligned, columns_of
from castlm.progress import note


def show(report: Report, folder: str) -> None:
    """Prints the table, the verdict and the path of the report."""
    table = _fitting(report, columns_of(sys.stdout) or sys.maxsize)
    page = f"report: {Path(folder, 'table.md')}"
    for line in (report.question, *table, *report.warnings, *report.notes, report.verdict, page):
        to_stdout(line)


def _fitting(report: Report, room: int) -> list[str]:
    """The lines of the table in `room` columns, if need be without starts, which a note names, and tokens."""
    headings = [heading for heading in report.headings if heading in SHORT]
    for left_out in ("", "start", "tokens"):
        headings = [heading for heading in headings if heading != left_out]
        lines = aligned([headings, *report.table(headings)])
        if max(map(len, lines)) <= room:
            break
    return lines


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--row"]:
        return one_shot_row(arguments[1])
    config = parse(CompareConfig, arguments, "compare")
    code, report = compare(config, command_line("compare", config), note, program_of(arguments))
    show(report, config.output_dir)
    return code


def program_of(arguments: list[str]) -> Sequence[str]:
    """The program whose command is `compare` with these arguments: all that stands before it on the command line.

    It is `castlm`, `python -m castlm` or a user's own `python FILE`, which adds rows to the tables of castlm, such as a
    method (docs/how-to/extend.md): each process needs them. Any other program, such as a notebook, starts castlm.
    """
    command = ["compare", *arguments]
    if sys.orig_argv[-len(command) :] == command:
        return [sys.executable, *sys.orig_argv[1 : -len(command)]]
    return CASTLM


def one_shot_row(file: str) -> int:
    """Runs a one-shot row with the options of a YAML file; returns the exit code."""
    from castlm.lab.compare.oneshot import run_oneshot

    try:
        run_oneshot(build(OneshotConfig, read_yaml_mapping(file), file))
    except InputError as error:
        note(f"error: {' '.join(str(error).split())}")
        return 2
    return 0
