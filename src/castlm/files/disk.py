"""Reports a full disk, or a file over the size limit, in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from castlm.core.errors import InputError


@contextlib.contextmanager
def reporting_full_disk(path: str | Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Raises `InputError` for a full disk, with the `remedy`, and for a file over the size limit; other errors pass."""
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
    """Whether `error` or a cause of it is a full disk or quota; safetensors reports this as a text, not an OSError."""
    return _is_of(error, (errno.ENOSPC, errno.EDQUOT), ("No space left on device",))


def _is_of(error: BaseException, codes: tuple[int, ...], words: tuple[str, ...] = ()) -> bool:
    """Whether `error` or one of its causes is an OSError with one of `codes`, or has `words` in its message."""
    cause: BaseException | None = error
    words += tuple(f"os error {code})" for code in codes)  # of safetensors
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in codes) or any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
