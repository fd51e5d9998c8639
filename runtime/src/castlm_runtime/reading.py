"""Read files that others wrote: only regular files, only valid text and JSON, and one `InputError` for anything else.

Reading a named pipe or a device could hang or never end, and `json` reports bad input by five types of exception. Every
reader of castlm opens its files here; libraries that open files themselves get paths that passed `check_regular`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from castlm_runtime.errors import InputError, check_type, one_line

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


def user_path(path: str | Path) -> Path:
    """`path` with `~` and `~user` expanded; it need not exist.

    Raises:
        InputError: it is no text, is empty, too long, holds a null character, names a user that is unknown or has no
            home folder, or may not be accessed.
    """
    check_type(path, (str, os.PathLike), "a path must be text", "name a file or a folder")
    text = os.fspath(path)
    if not text:
        raise InputError("a path is empty: name a file or a folder")
    home = os.path.expanduser(text.partition("/")[0])
    if text.startswith("~") and os.path.isabs(home) and not os.path.isdir(home):  # of `nobody`: it would be made, in /
        raise InputError(f"the home folder {home} of {text[:200]!r} does not exist: name another place")
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (OSError, RuntimeError, ValueError) as error:  # no home, a null character, a lone surrogate
        if getattr(error, "errno", None) not in _ABSENT:  # `Path.exists` and its like raise the others
            raise InputError(f"cannot access {text[:200]!r}: {one_line(error)}") from error
    return Path(path)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turns an error of the system inside the context into `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


def check_regular(path: str | Path) -> Path:
    """`path` itself, if it is a regular file or a link to one; otherwise raises `InputError`."""
    path = user_path(path)
    with _reading(path):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise InputError(f"{path} is {what}: give a regular file")
    return path


def check_regular_entries(folder: Path) -> None:
    """Checks that `folder` and its subfolders hold only regular files, before a library opens any that it finds."""
    with _reading(folder):
        for parent in (folder, *filter(Path.is_dir, folder.iterdir())):
            for entry in parent.iterdir():
                # a dangling link passes: the reader of the file reports that it is missing
                if entry.exists() and not entry.is_dir():
                    check_regular(entry)


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file for reading, in binary; never waits for a writer, as `open` does on a named pipe."""
    path = check_regular(path)
    with _reading(path):
        # not blocking: a named pipe may have taken the place of the file meanwhile
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path) -> bytes:
    """The whole of a regular file."""
    with open_regular(path) as stream, _reading(path):
        return stream.read()


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file, without a byte order mark."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 near byte {error.start}; convert the file to UTF-8") from error


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text.

    Args:
        where: file or line, for the message.

    Raises:
        InputError: not JSON, not UTF-8, nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not readable JSON: {one_line(error)}") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path), path)


def read_json_object(path: str | Path, remedy: str = "") -> dict[str, Any]:
    """The content of a JSON file that holds an object; an error ends with the `remedy`."""
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    except InputError as error:
        if not remedy:
            raise
        raise InputError(f"{error}; {remedy}") from None
    return content


def read_record(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file that castlm wrote; empty where there is none or it cannot be read."""
    try:
        if os.path.islink(path) or not os.path.isfile(path):
            return {}
        return read_json_object(path)
    except InputError:
        return {}


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read a chunk at a time."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
