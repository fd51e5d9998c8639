"""`castlm plan sweep`: the runs that a scaling law is fitted to, the cheapest first."""

from __future__ import annotations

from castlm.cli.options import command_line, parse, to_stderr, to_stdout
from castlm.planning.sweep import SweepConfig, sweep


def main(arguments: list[str]) -> int:
    config = parse(SweepConfig, arguments, "plan sweep")
    return sweep(config, command_line("plan sweep", config), to_stdout, to_stderr)
