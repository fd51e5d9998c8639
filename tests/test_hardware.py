"""What a process does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from castlm.hardware import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
step = lambda: [torch.zeros(4_000_000) for _ in range(3)]  # 16 MB each, all alive at once
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_what_is_freed_is_kept_for_the_next_step():
    """Without it, each step maps its 48 MB again, in pages of 4 KiB."""

    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("given back") > 10 * faults("kept") + 1000
