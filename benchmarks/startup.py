"""Start-up of the command: `castlm --help` and `castlm verify` against `python -c "import torch"`.

    python -m benchmarks.startup FOLDER [--peer "COMMAND --port {port}" ...] [--rounds 9]

measures `python -m castlm_runtime generate FOLDER` up to its first token, and `serve FOLDER` and the peers' servers, in
turns, up to the end of a chat's answer of one token: processor time with that of child processes, such as the one that
renders the chat template, and the memory at its peak. Linux alone.
"""

from __future__ import annotations

import argparse
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


def first_answer(command: str) -> tuple[float, float]:
    """Seconds of processor time of a server until it has answered by one token, and the most MiB that it held."""
    from benchmarks.serving import client_of, processor_seconds, served

    with served(lambda port: command.format(port=port).split(), ready="/v1/models") as (port, pid):
        client, model = client_of(port)
        message = {"role": "user", "content": "Why is the sky blue?"}
        client.chat.completions.create(model=model, messages=[message], max_tokens=1)
        return processor_seconds(pid), peak(pid)


def peak(pid: int) -> float:
    """The most MiB that a process and its children have held."""
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    return own + sum(peak(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--peer", nargs="*", default=(), help="commands of other servers")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    def show(name: str, seconds: list[float], mib: float) -> None:
        spread = f"{min(seconds):.2f} .. {max(seconds):.2f}"
        print(f"{statistics.median(seconds):6.2f} s of processor time ({spread}), {mib:.0f} MiB at most: {name}")

    show("generate", *first_token(options.folder, options.rounds))
    castlm = f"{sys.executable} -m castlm_runtime serve {options.folder} --port {{port}}"
    found = {command: [first_answer(command)] for command in (castlm, *options.peer)}
    for command in [*found] * (options.rounds - 1):
        found[command].append(first_answer(command))
    for command, times in found.items():
        show(command, [seconds for seconds, _ in times], max(mib for _, mib in times))


if __name__ == "__main__":
    main()
