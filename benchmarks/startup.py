"""Start-up of the command: `castlm --help` and `castlm verify` against `python -c "import torch"`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tiny import save_tiny, tiny_model

from benchmarks.rows import Row, interleaved, ratio_row
from castlm.core.sparsify import prune_


def rows(repeats: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sparse"
        save_tiny(folder, "llama")
        model = tiny_model("llama")
        prune_(model)
        model.save_pretrained(folder)
        castlm = [sys.executable, "-m", "castlm"]
        commands = {
            "help": [*castlm, "--help"],
            "verify": [*castlm, "verify", str(folder)],
            "torch": [sys.executable, "-c", "import torch"],
        }
        times = interleaved(
            {
                name: lambda c=command: subprocess.run(c, check=True, capture_output=True)
                for name, command in commands.items()
            },
            repeats,
        )
    seconds = statistics.median(times["help"])
    help_row = Row("castlm --help, seconds", "nothing", seconds, min(times["help"]), max(times["help"]), "<= 0.4")
    verify = ratio_row(
        "castlm verify, tiny model", 'python -c "import torch"', times["verify"], times["torch"], "<= 1.5"
    )
    return [help_row, verify]
