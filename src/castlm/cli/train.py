"""`castlm train`: a dense model in, a verified n:m one out."""

from __future__ import annotations

import sys

from castlm.cli.options import parse


def main(arguments: list[str]) -> int:
    from castlm.training.config import parse_train_arguments

    config = parse_train_arguments(arguments, parse)
    from castlm.hardware import keep_freed_memory
    from castlm.training.interrupt import Interrupted
    from castlm.training.loop import train

    keep_freed_memory()
    try:
        train(config)
    except Interrupted as stop:
        print(f"castlm: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0
