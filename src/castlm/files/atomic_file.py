"""Files that are whole at any moment: a kill, a full disk or a power cut leaves the old one or the new one.

A file is written beside its final place and renamed over it. A full disk is reported in one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError

_TEMPORARY = re.compile(r"\..+\.tmp-(?P<pid>[0-9]+)-[0-9a-f]+@(?P<host>.+)")


def temporary_name(name: str) -> str:
    """A temporary name for `name`, which tells whether the process that made the file still runs."""
    return f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}@{socket.gethostname()}"


@contextlib.contextmanager
def held(temporary: Path) -> Iterator[Path]:
    """Holds a new temporary file or folder during the block, and yields it.

    Two containers may have one host name, and neither knows the processes of the other. So a temporary name of a dead
    process is stale only if nobody holds the lock of the kernel either, which ends with its process.
    """
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks: nobody can take it there either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        os.close(descriptor)


def _is_held(temporary: Path) -> bool:
    """Whether another process holds a temporary file or folder, or may hold it."""
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_stale(path: Path) -> None:
    """Deletes the temporary files and folders beside `path` that dead writers on this machine left."""
    with contextlib.suppress(OSError):  # the folder may not be listed
        for name in os.listdir(path.parent):
            if name.startswith(f".{path.name}.tmp-"):
                _remove_if_stale(path.with_name(name))


def remove_stale_inside(folder: Path) -> None:
    """Deletes the temporary files and folders at any depth of `folder` that dead writers on this machine left."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _remove_if_stale(Path(parent, name))


def _remove_if_stale(path: Path) -> None:
    """Deletes a file or folder with a `temporary_name` of a dead process on this machine, which nobody holds."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None or found["host"] != socket.gethostname() or _is_alive(found["pid"]) or _is_held(path):
        return
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


_remove_stale_once = functools.cache(remove_stale)  # it takes 15 ms to list 20,000 files


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return True  # a name that `temporary_name` does not give
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # it runs, under another user
    return True


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write, renamed over it when the block ends without an error; else removed.

    Does not flush to the disk: the writer does where a power cut matters. The first write of a process also removes
    files that killed writers of `path` left.
    """
    if os.path.lexists(path) and not os.path.isfile(path):  # such as /dev/stdout, a link to a pipe
        raise InputError(f"{path} is not a regular file: name another file")
    path = Path(os.path.realpath(path))  # follow a link and replace its target
    _remove_stale_once(path)
    temporary = path.with_name(temporary_name(path.name))
    temporary.touch()
    try:
        with held(temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as JSON, by `atomic_write_text`. A float that JSON cannot hold (inf, NaN) becomes null."""
    text = json.dumps(plain_json(content), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8 and flushes it to the disk, whole or not at all. A full disk raises `InputError`."""
    path = Path(path)
    with reporting_full_disk(path):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            flush_file(temporary)
        flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def widen_access(path: Path, folder: Path) -> None:
    """Gives `path` the read and write permissions of `folder`: safetensors >= 0.8 writes files for the owner alone."""
    os.chmod(path, path.stat().st_mode | folder.stat().st_mode & 0o666)


def size_and_crc(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, to detect damage by a crash or a disk."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


def is_whole(path: Path, expected: Any) -> bool:
    """Whether `path` is a regular file with the `size_and_crc` that a record expects."""
    return path.is_file() and not path.is_symlink() and list(size_and_crc(path)) == expected


def plain_json(content: Any) -> Any:
    """`content` in JSON's types: inf and NaN become None, paths strings, tuples lists."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(key): plain_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain_json(value) for value in content]
    return str(content) if isinstance(content, Path) else content


@contextlib.contextmanager
def reporting_full_disk(path: str | Path, remedy: str = "free some space or choose another folder") -> Iterator[None]:
    """Raises `InputError` for a full disk, with the `remedy`, or a file above the limit; other errors pass."""
    try:
        yield
    except Exception as error:
        if _has_words(error, f"(os error {errno.EFBIG})", f"[Errno {errno.EFBIG}]"):  # not "413 File too large"
            raise InputError(f"{path} would be larger than files may be here: raise the limit (ulimit -f)") from error
        if is_disk_full(error):
            raise InputError(f"disk full while writing {path}: {remedy}") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or a cause of it is a full disk or quota."""
    return _has_words(error, os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def _has_words(error: BaseException, *words: str) -> bool:
    """Whether `error` or a cause of it contains one of the words: safetensors reports the system's errors as texts."""
    cause: BaseException | None = error
    while cause is not None:
        if any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
