"""A lock in the file system: one process at a time writes a folder or a file, and the others learn which one does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from castlm.progress import note


class HeldError(Exception):
    """Another process holds the lock. The text names its number, machine and command, if they are known."""


@contextlib.contextmanager
def locked(file: Path, command: str) -> Iterator[None]:
    """Holds the lock `file` during the block, and writes into it who holds it.

    The lock is a `flock` of the kernel, so it ends with the process, even after a kill. On NFS 4 and most cluster file
    systems it also holds between machines; after a crash it ends with the lease, in about 90 s. The holder may delete
    the file: who has opened the deleted one is refused.

    Raises:
        HeldError: another process holds the lock, or has held and deleted it meanwhile.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(os.pread(descriptor, 200, 0).decode(errors="replace") or "another process") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            note(f"{file.parent} is on a file system without locks: start no other command in it meanwhile")
        if not os.fstat(descriptor).st_nlink:
            raise HeldError("a process that has just ended")
        with contextlib.suppress(OSError):  # the disk is full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} (castlm {command})".encode(), 0)
        yield
    finally:
        os.close(descriptor)
