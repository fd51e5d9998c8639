"""Replaces a folder and dies at each moment of it. A small process of its own: a fork of pytest's takes 50 ms.

python -m tests.replaced FOLDER
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from castlm.files.output import atomic_dir, check_output


def die_before(moment: int, counts: Callable[[str, tuple], bool] = lambda event, arguments: True) -> None:
    """Lets this process kill itself before its `moment`-th step on files, of those that `counts` says."""
    steps = iter(range(moment))

    def hook(event: str, arguments: tuple) -> None:
        on_files = event.startswith(("os.", "open", "shutil.")) and event != "os.kill"
        if on_files and counts(event, arguments) and next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Does `work` in a child that dies before its `moment`-th step on files. False: it came to its end."""
    child = os.fork()
    if child == 0:
        die_before(moment)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def write(final: Path, text: str) -> None:
    with atomic_dir(final, overwrite=True) as folder:
        for name in "ab":
            (folder / name).write_text(text)


def main(folder: Path) -> None:
    """Prints a row for each moment: what lay there after a check of the next start, and what each folder held."""
    for moment in count():
        final = folder / str(moment) / "out"
        write(final, "older")
        write(final, "old")
        killed = killed_at(moment, lambda final=final: write(final, "new"))
        check_output(final, overwrite=True)
        held = {
            entry.name: [(entry / name).read_text() for name in "ab" if (entry / name).exists()]
            for entry in final.parent.iterdir()
        }
        print(json.dumps(held))
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
