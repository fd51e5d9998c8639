"""Write so that a kill, a full disk or a power cut at any moment leaves either the old result or the new, never half.

Everything is written beside its final place, flushed to the disk, and renamed over it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.reading import open_regular

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


def prepare_output_dir(path: str | Path, overwrite: bool = False) -> Path:
    """Makes the output folder and proves that it can be written, before any long work.

    With `overwrite`, what it holds stays until `atomic_dir` replaces it.

    Raises:
        InputError: a file in its place, a folder that holds something (without `overwrite`), a folder that nobody would
            want replaced (home, the working folder or one above it), or one that cannot be written.
    """
    final = Path(path).expanduser().absolute()
    try:
        if final.parent.is_dir():
            remove_stale_temporaries(final.parent, final.name)
        _refuse_taken(final, overwrite)
        final.mkdir(parents=True, exist_ok=True)
        for folder in (final, final.parent):
            probe = folder / f".castlm-probe-{os.getpid()}"
            probe.mkdir()
            probe.rmdir()
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror}; choose another output folder") from error
    return final


def _refuse_taken(final: Path, overwrite: bool) -> None:
    if os.path.lexists(final) and not final.is_dir():
        raise InputError(f"{final} is a file: name a folder for the output")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{final} already holds something: choose another output folder or pass overwrite")
    real, here = final.resolve(), Path.cwd().resolve()
    if real in (here, *here.parents, Path.home().resolve()):
        raise InputError(
            f"{final} will not be overwritten, it is the working folder, one above it or home: name a new one"
        )


@contextlib.contextmanager
def atomic_dir(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` to write into, renamed over `final` when the block ends without an error.

    All files are flushed to the disk before the rename. What `final` held before is swapped out in one system call on
    Linux; where that is not to be had, it is moved aside first, and `remove_stale_temporaries` moves it back after a
    kill between the two. On any error, Ctrl-C too, the temporary folder is removed and `final` is as it was.

    Raises:
        InputError: `final` holds something (without `overwrite`), or the disk is full.
    """
    # A link is followed, so that the folder behind it is replaced and the link stays.
    final = Path(os.path.realpath(Path(final).expanduser()))
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(final.parent, final.name)
        _refuse_taken(final, overwrite)
        temporary.mkdir()
        yield temporary
        _flush_tree(temporary)
        _publish(temporary, final, overwrite)
    except Exception as error:
        if is_disk_full(error):
            raise InputError(f"disk full while writing {final}: free some space or choose another folder") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a swap this is what `final` held before


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    """Renames `temporary` to `final`; what `final` held, if anything, is left under the name `temporary`."""
    _refuse_taken(final, overwrite)  # it may have appeared meanwhile
    if not (final.is_dir() and any(final.iterdir())):
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        aside = final.parent / f".{final.name}.old-{os.getpid()}"
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(aside, final)
            raise
        os.rename(aside, temporary)
    flush_folder(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step. False where the system or the file system has no such call."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove_stale_temporaries(parent: str | Path, name: str) -> None:
    """Clears up what writers of `parent/name` that no longer live have left; a result they moved aside comes back."""
    final = Path(parent) / name
    for aside in _stale(final, "old"):
        if not os.path.lexists(final):
            os.rename(aside, final)
    for left in [*_stale(final, "tmp"), *_stale(final, "old")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _stale(final: Path, kind: str) -> list[Path]:
    prefix = f".{final.name}.{kind}-"
    left = [entry for entry in final.parent.iterdir() if entry.name.startswith(prefix)]
    return [entry for entry in left if not _may_be_written(entry.name[len(prefix) :])]


def _may_be_written(pid: str) -> bool:
    if not pid.isdigit():
        return True  # not a name of ours: hands off
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it lives, under another user
    return True


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or what caused it is a full disk or quota; safetensors reports it in words, not as an OSError."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(cause) or "os error 28" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _flush_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            widen_access(Path(root, name), folder)
            with open(os.path.join(root, name), "rb") as stream:
                os.fsync(stream.fileno())
        flush_folder(Path(root))


def widen_access(path: Path, folder: Path) -> None:
    """Lets those read and write `path` who may do so in `folder`: safetensors >= 0.8 leaves a file to its owner."""
    os.chmod(path, path.stat().st_mode | folder.stat().st_mode & 0o666)


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write, renamed over it when the block ends without an error; else removed.

    Not flushed to the disk: that is the writer's, where a power cut matters."""
    # the process's number alone is not its own on a disk that machines share
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all. A float that JSON cannot hold (inf, NaN) becomes null.

    Raises:
        InputError: the disk is full.
    """
    path = Path(path)
    try:
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            json.dump(_plain(content), stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        flush_folder(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise InputError(f"disk full while writing {path}: free some space or choose another folder") from error
        raise


def _plain(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return str(content) if isinstance(content, Path) else content


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read a chunk at a time."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
