"""`python -m castlm.cli.oneshot CONFIG.yaml`: the process in which `castlm compare` runs a one-shot solver."""

from __future__ import annotations

import sys

from castlm.compare.oneshot import OneshotConfig, run_oneshot
from castlm.core.errors import InputError
from castlm.fields import build
from castlm.files.yaml_file import read_yaml_mapping

if __name__ == "__main__":
    try:
        run_oneshot(build(OneshotConfig, read_yaml_mapping(sys.argv[1]), sys.argv[1]))
    except InputError as error:
        print(f"castlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
