"""Folders that are whole at any moment: a kill, a full disk or a power cut leaves the old one or the new one.

A folder is written beside its final place, flushed to the disk, and renamed. The folder that it replaces is renamed,
not deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from castlm.core.errors import InputError
from castlm.files.atomic_file import flush_file, flush_folder, remove_stale, temporary_name, widen_access
from castlm.files.disk import reporting_full_disk
from castlm.files.record import is_empty, record_output, set_aside


@contextlib.contextmanager
def atomic_dir(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` to write into, renamed to `final` when the block ends without an error.

    Before the rename, its files are recorded and flushed to the disk. An earlier `final` becomes NAME.previous; see
    `set_aside`. On any error, including Ctrl-C, the temporary folder is removed and `final` stays unchanged.

    Raises:
        InputError: `final` holds something (without `overwrite`), its name is too long, or the disk is full.
    """
    # A link is followed, so that the folder behind it is replaced and the link stays.
    final = Path(os.path.realpath(Path(final).expanduser()))
    temporary = final.with_name(temporary_name(final.name))
    with reporting_full_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        check_name(final)
        remove_stale(final, os.listdir(final.parent))
        refuse_taken(final, overwrite)
        temporary.mkdir()
        try:
            yield temporary
            _flush_tree(temporary)
            record_output(temporary, command="result", complete=True, checksums=True)
            refuse_taken(final, overwrite)  # it may have appeared meanwhile
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_taken(final: Path, overwrite: bool) -> None:
    """Raises `InputError` if `final` is a file, or holds something without `overwrite`."""
    if os.path.lexists(final) and not final.is_dir():
        raise InputError(f"{final} is a file: name a folder for the output")
    if not overwrite and not is_empty(final):
        raise InputError(f"{final} already holds something: choose another output folder or pass overwrite")


def check_name(final: Path) -> None:
    """Raises `InputError` if the temporary names beside `final` would be too long for the file system."""
    longest = max(temporary_name(final.name), f"{final.name}.unfinished-99", key=lambda name: len(os.fsencode(name)))
    excess = len(os.fsencode(longest)) - os.pathconf(final.parent, "PC_NAME_MAX")
    if excess > 0:
        raise InputError(
            f"the name of the output folder {final.name[:20]}... is {excess} bytes too long for this file system: "
            "choose a shorter one"
        )


def _publish(temporary: Path, final: Path) -> None:
    """Renames `temporary` to `final`. A kill between the two renames leaves the earlier folder as NAME.previous."""
    aside = set_aside(final) if final.is_dir() and any(final.iterdir()) else None
    try:
        os.rename(temporary, final)
    except BaseException:
        if aside is not None and not os.path.lexists(final):
            os.rename(aside, final)
        raise
    flush_folder(final.parent)


def _flush_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            widen_access(Path(root, name), folder)
            flush_file(Path(root, name))
        flush_folder(Path(root))
