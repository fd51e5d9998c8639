"""Start-up of the command: `castlm --help` and `castlm verify` against `python -c "import torch"`.

`python -m benchmarks.startup FOLDER` measures `python -m castlm_runtime generate FOLDER` up to its first token:
processor time with the process that renders the chat template, and the memory of the process at its peak. Linux alone.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.rows import Row


def rows(repeats: int = 5) -> list[Row]:
    from tests.tiny import save_tiny, tiny_model

    from benchmarks.rows import Row, interleaved, ratio_row
    from castlm.core.sparsify import prune_

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


def first_token(folder: str, repeats: int = 9) -> tuple[list[float], float]:
    """Seconds of processor time to the first token in each round, and the most MiB that the process held.

    The system counts the memory of the process that starts another one, too: here it has imported little.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # the process of the template outlives its parent
    command = [sys.executable, "-m", "castlm_runtime", "generate", folder, "--prompt", "Why is the sky blue?"]
    seconds, most = [], 0.0
    for _ in range(repeats):
        subprocess.Popen([*command, "--max-new-tokens", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        total = 0.0
        while True:
            try:
                _, status, used = os.wait3(0)
            except ChildProcessError:
                break
            assert status == 0
            total += used.ru_utime + used.ru_stime
            most = max(most, used.ru_maxrss / 1024)
        seconds.append(total)
    return seconds, most


_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


if __name__ == "__main__":
    found, mib = first_token(sys.argv[1])
    print(
        f"first token after {statistics.median(found):.2f} s of processor time ({min(found):.2f} .. {max(found):.2f})"
    )
    print(f"{mib:.0f} MiB at most")
