"""Runs the fuzz tests with new inputs until the time is over, and counts the inputs: the second part of `make fuzz`.

    python -m tests.fuzz [SECONDS]

Exits with 1 at the first input that ends in anything but an answer or an `InputError`; pytest prints that input.
"""

import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = "100"


def main(seconds: float) -> int:
    here = Path(__file__).parent
    files = sorted(str(file) for file in here.glob("test_fuzz*.py"))
    started, rounds, tried = time.monotonic(), 0, 0
    while time.monotonic() - started < seconds:
        seed = secrets.randbelow(2**31)
        options = ["-p", "no:xdist", "-q", "-m", "", f"--hypothesis-seed={seed}", "--hypothesis-show-statistics"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            env=os.environ | {"CASTLM_FUZZ_EXAMPLES": EXAMPLES},
            cwd=here.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        rounds += 1
        tried += sum(int(count) for count in re.findall(r"(\d+) passing, \d+ failing", done.stdout))
        minutes = (time.monotonic() - started) / 60
        print(f"round {rounds}: {tried:,} inputs in {minutes:.1f} minutes (seed {seed})", flush=True)
        if done.returncode:
            print(done.stdout)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 3600))
