"""Replaces a folder and dies at each moment of it. A small process of its own: a fork of pytest's takes 50 ms.

python -m tests.replaced FOLDER [--no-exchange]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path

from castlm.files import atomic_dir as atomic_dir_module
from castlm.files.atomic_dir import atomic_dir, remove_stale_temporaries


def replace_and_die(final: Path, moment: int) -> bool:
    """Replaces `final` in a child that kills itself before its `moment`-th step on files. False: it came to its end."""
    child = os.fork()
    if child == 0:
        steps = iter(range(moment))

        def hook(event: str, arguments: tuple) -> None:
            on_files = event.startswith(("os.", "open", "shutil.", "ctypes.dlsym")) and event != "os.kill"
            if on_files and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            with atomic_dir(final, overwrite=True) as folder:
                for name in "ab":
                    (folder / name).write_text("new")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(folder: Path, exchanges: bool) -> None:
    """Prints a row for each moment: whether the folder was there, what lay beside it after a clean-up, what it held."""
    final = folder / "out"
    if not exchanges:
        atomic_dir_module._exchange = lambda one, other: False
    for moment in count():
        with atomic_dir(final, overwrite=True) as old:
            for name in "ab":
                (old / name).write_text("old")
        killed = replace_and_die(final, moment)
        was_there = final.exists()
        remove_stale_temporaries(folder, "out")
        beside = sorted(entry.name for entry in folder.iterdir())
        print(json.dumps([was_there, beside, [(final / name).read_text() for name in "ab"]]))
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--no-exchange" not in sys.argv)
