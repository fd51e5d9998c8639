"""The memory of a process: its peak, and what it gives back."""

import os
import platform
import subprocess
import sys

import pytest

from castlm.hardware import in_own_process

SCRIPT = """
import resource, torch
from castlm.hardware import keep_freed_memory

def faults():
    step = lambda: [torch.zeros(4_000_000) for _ in range(3)]  # 16 MB each, all alive at once
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
@pytest.mark.slow
def test_what_is_freed_is_kept_for_the_next_step():
    """Without it, each step maps its 48 MB again, in pages of 4 KiB."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert given_back > 10 * kept + 1000


def test_what_runs_in_a_process_of_its_own_gives_its_result_and_its_errors():
    assert in_own_process(os.getpid) != os.getpid()
    with pytest.raises(FileNotFoundError):
        in_own_process(os.listdir, "nowhere")
