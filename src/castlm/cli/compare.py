"""`castlm compare`: CAST and its rivals in one harness."""

from __future__ import annotations

from castlm.cli.options import command_line, parse, to_stderr
from castlm.compare.plan import CompareConfig, compare


def main(arguments: list[str]) -> int:
    config = parse(CompareConfig, arguments, "compare")
    return compare(config, command_line("compare", config), to_stderr)
