"""The record of an output folder, castlm-output.json: its command, and its files at the end.

`--overwrite` renames the earlier output. An output that was renamed before is deleted, but only if all its files have
the size and time in its record. So no list of the files that each command writes is needed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_json, is_whole, remove_stale_inside, size_and_crc
from castlm_runtime.reading import read_record

OUTPUT = "castlm-output.json"
"""The record: `command`, `complete`, `files`, and what the command adds, as `run_id` and the `job` of torchrun."""

RESULT = "castlm.json"
"""The record of a model, in its folder."""

LOCK = ".castlm.lock"
"""The lock of a folder in use by a run; its text names the holder."""

PROBE = ".castlm-probe-"
"""Prefix of the empty folder by which the ranks of a run find out whether they share a disk."""

_OF_A_START = (LOCK, PROBE, f".{OUTPUT}.tmp-")


def command_of(folder: Path) -> str | None:
    """The command that wrote `folder`; "result" for a model folder; None if castlm did not write it."""
    command = read_record(folder / OUTPUT).get("command")
    if isinstance(command, str):
        return command
    return "result" if read_record(folder / RESULT) else None


def is_empty(folder: Path) -> bool:
    """Whether `folder` is missing, or holds only the leftovers of a start that was killed before it began."""
    return not folder.is_dir() or all(name.startswith(_OF_A_START) for name in os.listdir(folder))


def list_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change (ns) of every file below `folder`, except its record and lock; links are not followed."""
    files, pending = {}, [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            else:
                about = entry.stat(follow_symlinks=False)
                files[os.path.relpath(entry.path, folder)] = [about.st_size, about.st_mtime_ns]
    return {name: about for name, about in files.items() if name not in (OUTPUT, LOCK)}


def unrecorded(folder: Path) -> dict[str, list[int]]:
    """The files of `folder` that differ from its record: added or changed by others, or written last by a killed
    process.
    """
    known = _listed(folder)
    return {name: about for name, about in list_files(folder).items() if known.get(name, [])[:2] != about}


def _listed(folder: Path) -> dict[str, list[int]]:
    """The files that the record of `folder` lists; empty if the record is malformed."""
    listed = read_record(folder / OUTPUT).get("files")
    if not isinstance(listed, dict) or not all(isinstance(about, list) for about in listed.values()):
        return {}
    return listed


def record_output(folder: Path, *, checksums: bool = False, **about: Any) -> None:
    """Writes the record of `folder`: the entries `about` and its files, with `checksums` for `check_result`.

    Unchanged files of the entry `foreign` are not listed, because castlm did not write them.
    """
    foreign = about.get("foreign", {})
    files = {name: entry for name, entry in list_files(folder).items() if foreign.get(name) != entry}
    is_utf8 = {name: name == name.encode(errors="replace").decode() for name in files}  # castlm writes no others
    listed = {name: files[name] for name in sorted(files) if is_utf8[name]}
    if checksums:
        listed = {name: [*entry, size_and_crc(folder / name)[1]] for name, entry in listed.items()}
    atomic_write_json(folder / OUTPUT, {**about, "files": listed})


def update_record(folder: Path, **about: Any) -> None:
    """Lists the current files of `folder` in its record, and updates its entries `about`."""
    record_output(folder, **{**read_record(folder / OUTPUT), **about})


def set_aside(folder: Path) -> Path:
    """Renames an output to NAME.previous, or to NAME.unfinished if it has no result yet.

    An earlier output of that name is deleted if nobody changed it; otherwise it is renamed, and a line reports this. So
    a finished result stays until the next one is finished. Returns the new path.
    """
    is_finished = read_record(folder / OUTPUT).get("complete", True) or (folder / "model" / RESULT).is_file()
    remove_stale_inside(folder)
    kind = "previous" if is_finished else "unfinished"
    aside = folder.with_name(f"{folder.name}.{kind}")
    try:
        if not aside.is_symlink() and read_record(aside / OUTPUT) and not unrecorded(aside):
            _delete(aside)
        if os.path.lexists(aside):
            from castlm.progress import note  # imports rich, which a program that only reads facts may lack

            kept = unused_name(aside)
            os.rename(aside, kept)
            note(f"{aside} holds files that castlm did not write, or that have changed: it is now {kept}")
        os.rename(folder, aside)
    except OSError as error:
        raise InputError(f"{folder} cannot be renamed to {aside}: {error.strerror}; choose another folder") from error
    return aside


def _delete(folder: Path) -> None:
    """Deletes the files of an output, its record last: after a kill it still marks the rest as castlm's."""
    for name in list_files(folder):
        (folder / name).unlink()
    for parent, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            with contextlib.suppress(OSError):  # somebody has just put a file there
                os.rmdir(Path(parent, name))
    for name in (LOCK, OUTPUT):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def unused_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def check_result(folder: Path) -> None:
    """Compares the files of a finished model folder with their size and CRC-32; `InputError` names one that differs."""
    listed = _listed(folder)
    changed = [name for name, about in listed.items() if not is_whole(folder / name, [*about[:1], *about[2:]])]
    if changed or not listed:
        name = changed[0] if changed else OUTPUT
        raise InputError(
            f"{folder / name} is missing or has changed since castlm wrote it: remove {folder} and run it again"
        )
