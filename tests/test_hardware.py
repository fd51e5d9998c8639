"""What runs in a process of its own."""

import os

import pytest

from castlm.hardware import in_own_process


def test_what_runs_in_a_process_of_its_own_gives_its_result_and_its_errors():
    assert in_own_process(os.getpid) != os.getpid()
    with pytest.raises(FileNotFoundError):
        in_own_process(os.listdir, "nowhere")
