"""`castlm compare`: CAST and its rivals in one harness."""

from __future__ import annotations

from castlm.cli.options import parse
from castlm.compare.plan import CompareCommand


def main(arguments: list[str]) -> int:
    return int(parse(CompareCommand, arguments, "compare").run(parse))
