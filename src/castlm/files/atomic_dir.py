"""Folders that are whole at any moment: a kill, a full disk or a power cut leaves the old one or the new one.

Everything is written beside its final place, flushed to the disk, and renamed over it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_json, flush_file, flush_folder, widen_access
from castlm.files.disk import disk_full_is_said
from castlm.files.owned import OUTPUT, PROBE, RESULT, discard, foreign_names, is_empty, list_files, read_record
from castlm.files.temporary import stale_temporaries, temporary_name
from castlm.progress import note

_PROBE_SECONDS = 60
"""A probe lives for less: one that is older was left by a killed process."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


def make_writable(folder: Path, *, beside: bool = True) -> None:
    """Creates `folder` and checks that entries can be created in it. Raises `OSError`, which names where they cannot.

    Args:
        beside: check this beside `folder` too, as a result needs it that takes its name when it is whole.
    """
    check_name(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder.parent) if beside else (folder,):
        probe = place / f"{PROBE}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            probe.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place)) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                probe.rmdir()


def check_name(final: Path) -> None:
    """Raises `InputError` where the names that writing `final` takes beside it are too long for the file system."""
    most = os.pathconf(next(place for place in final.absolute().parents if place.exists()), "PC_NAME_MAX")
    name = max((f"{final.name}.rejected-99", temporary_name(final.name, "tmp")), key=lambda n: len(os.fsencode(n)))
    if (excess := len(os.fsencode(name)) - most) > 0:
        raise InputError(
            f"the name of the output folder {final.name[:20]}... is {excess} bytes too long for this file system: "
            "choose a shorter one"
        )


def refuse_taken(final: Path, overwrite: bool) -> None:
    """Raises `InputError` unless `final` is free, or `overwrite` is set and castlm wrote everything in it."""
    if os.path.lexists(final) and not final.is_dir():
        raise InputError(f"{final} is a file: name a folder for the output")
    if not final.is_dir() or is_empty(final):
        return
    if not overwrite:
        raise InputError(f"{final} already holds something: choose another output folder or pass overwrite")
    real, here = final.resolve(), Path.cwd().resolve()
    if real in (here, *here.parents, Path.home().resolve()):
        raise InputError(f"{final} is the working folder, a folder above it or your home: choose another output folder")
    if foreign := foreign_names(final):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise InputError(
            f"{final} holds {', '.join(map(repr, foreign[:3]))}{more}, which castlm did not write or which has changed "
            "since: overwrite deletes only what castlm wrote; move that away, or choose another output folder"
        )


@contextlib.contextmanager
def atomic_dir(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` to write into, renamed over `final` when the block ends without an error.

    All files are listed with their SHA-256 in castlm.json and flushed to the disk before the rename. What `final` held
    before is swapped out in one system call on Linux; elsewhere, and on a file system without such a call, it is moved
    aside first, and `remove_stale_temporaries` moves it back after a kill between the two. Files in it that castlm did
    not write are kept, in a folder beside `final`. On any error, Ctrl-C too, the temporary folder is removed and
    `final` is as it was.

    Raises:
        InputError: `final` holds something (without `overwrite`), or the disk is full.
    """
    # A link is followed, so that the folder behind it is replaced and the link stays.
    final = Path(os.path.realpath(Path(final).expanduser()))
    temporary = final.parent / temporary_name(final.name, "tmp")
    made: tuple[int, int] | None = None
    try:
        with disk_full_is_said(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            check_name(final)
            remove_stale_temporaries(final.parent, final.name)
            _refuse_in_place(final, overwrite)
            temporary.mkdir()
            made = _identity(temporary)
            yield temporary
            add_file_list(temporary)
            _flush_tree(temporary)
            _publish(temporary, final, overwrite)
    finally:
        # which of the two the name stands for is asked of the disk: an interrupt can come right after the exchange
        if made is None or _identity(temporary) == made:
            shutil.rmtree(temporary, ignore_errors=True)
        else:  # what `final` held before, or nothing
            discard_old(temporary, final)


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a folder from all others that exist; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _refuse_in_place(final: Path, overwrite: bool) -> None:
    if not (overwrite and final.is_dir()):
        refuse_taken(final, overwrite=False)


def add_file_list(folder: Path) -> None:
    """Lists the files in `folder` in its castlm.json, which tells a later overwrite what it may delete."""
    atomic_write_json(folder / RESULT, {**read_record(folder / RESULT), "files": list_files(folder)})


def discard_old(old: Path, final: Path) -> None:
    """Deletes the result `old`, which `final` has replaced; keeps and names what castlm did not write in it."""
    if left := discard(old, keeps_records=True):  # a kill from here on leaves a folder that is known as a result
        kept = unused_name(final.with_name(f"{final.name}.kept"))
        os.rename(old, kept)
        discard(kept)
        note(f"{left[0]!r} was in the folder that {final} replaced, and castlm did not write it: it is in {kept}")


def unused_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    """Renames `temporary` to `final`; what `final` held, if anything, is left under the name `temporary`."""
    _refuse_in_place(final, overwrite)  # it may have appeared meanwhile
    if not (final.is_dir() and any(final.iterdir())):
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        aside = final.parent / temporary_name(final.name, "old")
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
    """Removes what writers of `parent/name` that no longer live have left; a result they moved aside comes back."""
    final = Path(parent) / name
    names = os.listdir(final.parent)
    for aside in stale_temporaries(final, "old", names):
        if not os.path.lexists(final):
            os.rename(aside, final)
    for left in [*stale_temporaries(final, "tmp", names), *stale_temporaries(final, "old", names)]:
        if not left.is_dir():
            left.unlink(missing_ok=True)
        elif read_record(left / RESULT).get("files") is None and not (left / OUTPUT).is_file():
            shutil.rmtree(left, ignore_errors=True)  # half-written
        else:  # a whole result, which was replaced or not yet published
            discard_old(left, final)
    for probe in [*final.parent.glob(f"{PROBE}*"), *final.glob(f"{PROBE}*")]:
        with contextlib.suppress(OSError):  # it is gone, or not a probe
            if time.time() - probe.stat().st_mtime > _PROBE_SECONDS:
                probe.rmdir()


def _flush_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            widen_access(Path(root, name), folder)
            flush_file(Path(root, name))
        flush_folder(Path(root))
