"""Names of files and folders that are being written: each names the process that writes it.

What a killed process has left can so be told from what another process is still writing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path


def temporary_name(name: str, kind: str, mark: str = "") -> str:
    """The process's number alone is not unique on a disk that machines share; `mark` tells its threads apart."""
    return f".{name}.{kind}-{os.getpid()}{mark}@{socket.gethostname()}"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what `castlm.files.atomic_file.atomic_file` writes first."""
    return name.startswith(".") and ".tmp-" in name


def stale_temporaries(final: Path, kind: str, names: Iterable[str]) -> list[Path]:
    """Those of the `names` beside `final` that writers of `final` have left which no longer live."""
    prefix = f".{final.name}.{kind}-"
    return [final.parent / n for n in names if n.startswith(prefix) and not _may_be_written(n[len(prefix) :])]


def _may_be_written(writer: str) -> bool:
    process, _, host = writer.partition("@")
    pid, _, mark = process.partition("-")
    if not pid.isdigit() or host != socket.gethostname():
        return True  # a name that this module does not give, or a process that cannot be seen from here
    return (mark != "" or int(pid) != os.getpid()) and _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it runs, under another user
    return True
