"""A disk that is full, or does not take so large a file, said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from castlm.core.errors import InputError


@contextlib.contextmanager
def disk_full_is_said(path: str | Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Raises `InputError` with the `remedy` where the disk is full; any other error passes."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            if _is_too_large(error):
                remedy = "the file system or a limit (ulimit -f) does not allow so large a file"
                raise InputError(f"{path} cannot be written: {remedy}") from error
            raise InputError(f"disk full while writing {path}: {remedy}") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or what caused it is a full disk or quota, or a file that is larger than is allowed; safetensors
    reports it in words, not as an OSError."""
    return _is_of(error, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def _is_too_large(error: BaseException) -> bool:
    return _is_of(error, (errno.EFBIG,))


def _is_of(error: BaseException, codes: tuple[int, ...]) -> bool:
    """Whether an OSError with one of `codes` is `error` or among its causes."""
    cause: BaseException | None = error
    words = [*(os.strerror(code) for code in codes), *(f"os error {code})" for code in codes)]
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in codes) or any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
