"""The command as a process: what its neighbours in a pipe see of it."""

import os
import subprocess
import sys

import pytest

from tests.tiny import save_tiny


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["verify", "--help"], ["plan"], ["verify", "{model}"], ["verify", "{model}", "--json", "-"]],
    ids=" ".join,
)
def test_output_that_nobody_reads_is_no_error(arguments, tmp_path):
    model = save_tiny(tmp_path / "model")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "castlm", *(argument.format(model=model) for argument in arguments)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # else no print waits for the end of the process
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
