"""`python -m castlm.cli.oneshot CONFIG.yaml`: the process of a one-shot row of `castlm compare`."""

from __future__ import annotations

import sys

from castlm.compare.config import OneshotConfig
from castlm.compare.oneshot import run_oneshot
from castlm.core.errors import InputError
from castlm.fields import build
from castlm.files.yaml_file import read_yaml_mapping


def main(file: str) -> int:
    """Runs the options of a YAML file; returns the exit code."""
    try:
        run_oneshot(build(OneshotConfig, read_yaml_mapping(file), file))
    except InputError as error:
        print(f"castlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
