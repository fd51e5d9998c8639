"""A disk that is full, or does not take so large a file, said in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from castlm.core.errors import InputError


@contextlib.contextmanager
def disk_full_is_said(path: str | Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Raises `InputError` where the disk is full, with the `remedy`, or a file larger than is allowed; others pass."""
    try:
        yield
    except Exception as error:
        if _is_of(error, (errno.EFBIG,)):
            reason = "the file system or a limit (ulimit -f) does not allow so large a file"
            raise InputError(f"{path} cannot be written: {reason}") from error
        if is_disk_full(error):
            raise InputError(f"disk full while writing {path}: {remedy}") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or what caused it is a full disk or quota; safetensors reports it in words, not as an OSError."""
    return _is_of(error, (errno.ENOSPC, errno.EDQUOT), ("No space left on device",))


def _is_of(error: BaseException, codes: tuple[int, ...], words: tuple[str, ...] = ()) -> bool:
    """Whether `error` or one of its causes is an OSError with one of `codes`, or says so in `words`."""
    cause: BaseException | None = error
    words += tuple(f"os error {code})" for code in codes)  # of safetensors
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in codes) or any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
