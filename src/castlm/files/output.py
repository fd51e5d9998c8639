"""The output folder of a command: checked, locked while the command runs, and overwritten only where castlm wrote.

All checks happen before anything in the folder changes.
"""

from __future__ import annotations

import contextlib
import datetime
import glob
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from castlm.core.errors import InputError
from castlm.files.atomic_dir import make_writable, refuse_taken, remove_stale_temporaries
from castlm.files.atomic_file import atomic_file, atomic_write_json, read_json_mapping
from castlm.files.owned import (
    HOLDER,
    LOCK,
    OUTPUT,
    RESULT,
    changed_file,
    command_of,
    has_checkpoint,
    is_empty,
    is_of_a_start,
    read_record,
)
from castlm.progress import note


@contextlib.contextmanager
def claimed(
    path: str | Path,
    command: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Mapping[str, str | Path | None] | None = None,
) -> Iterator[Path]:
    """Claims the output folder `path` for the time of the block, and yields it with links resolved.

    The folder is made where it is missing. What it holds is not touched here.

    Args:
        command: a key of `castlm.files.owned.LAYOUT`, or "result" for a single finished result.
        overwrite: accept what an earlier `command` left there, if every file in it is castlm's.
        resume: accept any content; the caller checks whether it can go on from it.
        inputs: what the command reads, by option. A value that is not a local path, or a glob of such, is ignored.

    Raises:
        InputError: the folder holds an input, or lies where one would be overwritten; it holds something else;
            another process has it; or it cannot be written.
    """
    final = _real(path)
    inputs = inputs or {}
    refuse_undecodable({"output_dir": path, **inputs})
    refuse_inputs_inside(final, inputs)
    existed = final.is_dir()
    try:
        try:
            if os.path.lexists(final) and not existed:
                raise InputError(f"{final} is a file: name a folder for the output")
            if not existed and final.parent.is_dir():  # nobody can hold its lock
                remove_stale_temporaries(final.parent, final.name)
                existed = final.is_dir()
            if existed and not resume and not os.path.lexists(final / LOCK):  # else who holds it is said first
                _refuse_content(final, command, overwrite)
            make_writable(final, beside=command == "result")  # which alone is renamed over the folder
        except OSError as error:
            failed = final if error.filename is None else Path(error.filename)
            why = f", where the result is written before it becomes {final}" if failed == final.parent else ""
            raise InputError(f"cannot write {failed}{why}: {error.strerror}; choose another output folder") from error
        with locked(final, command):
            remove_stale_temporaries(final.parent, final.name)
            if not resume:
                _refuse_content(final, command, overwrite)
            yield final
            if final.is_dir() and command_of(final) is None:
                _unlink_lock(final)
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # unless something came to be in it
                final.rmdir()


def _real(path: str | Path) -> Path:
    if not str(path):
        raise InputError("the output folder has no name: pass output_dir")
    try:
        return Path(os.path.realpath(Path(path).expanduser()))
    except (RuntimeError, ValueError, OSError) as error:  # an unknown home, a NUL byte, a loop of links
        raise InputError(f"the output folder {str(path)!r} is not a usable path: {error}") from None


def _refuse_content(final: Path, command: str, overwrite: bool) -> None:
    if is_empty(final):
        return
    if not overwrite:
        resumes = "resume, " if has_checkpoint(final) else ""
        raise InputError(f"{final} already holds something: pass {resumes}overwrite or another output folder")
    found = command_of(final)
    if found is None:
        raise InputError(
            f"{final} has no record of what castlm wrote there, so that it cannot be overwritten: move it away, or "
            "choose another output folder"
        )
    if found != command:
        raise InputError(f"{final} holds the output of another command ({found}): choose another output folder")
    refuse_taken(final, overwrite=True)


@contextlib.contextmanager
def continued(path: str | Path, command: str) -> Iterator[Path]:
    """As `claimed`, of a folder in which `command` goes on where an earlier start of it has stopped.

    After an error before anything is written in it, the folder is free again.

    Raises:
        InputError: as `claimed`; the folder holds something else; or a run that the earlier start has left is at work.
    """
    with claimed(path, command, resume=True) as folder:
        if not _is_continued(folder, command):
            atomic_write_json(folder / OUTPUT, {"command": command})
        for run in sorted(folder.glob("runs/*/")):
            refuse_locked(run)
        try:
            yield folder
        except BaseException as error:
            names = os.listdir(folder) if folder.is_dir() else []  # it may be deleted by now
            if all(name == OUTPUT or is_of_a_start(name) for name in names):
                (folder / OUTPUT).unlink(missing_ok=True)
            elif isinstance(error, (KeyboardInterrupt, SystemExit)):
                note(f"what is done is in {folder}: the same command goes on from there")
            raise


def _is_continued(final: Path, command: str) -> bool:
    """Whether `final` holds an earlier start of `command`; False where it is empty; `InputError` for anything else."""
    if is_empty(final):
        return False
    if (found := command_of(final)) != command:
        what = "something that castlm has no record of" if found is None else f"the output of another command ({found})"
        raise InputError(f"{final} already holds {what}: choose another output folder")
    return True


def _unlink_lock(folder: Path) -> None:
    """Takes the lock, which this process holds, out of a folder in which nothing of castlm came to be."""
    with contextlib.suppress(OSError):
        for name in (HOLDER, LOCK):
            (folder / name).unlink(missing_ok=True)


def refuse_undecodable(paths: Mapping[str, str | Path | None]) -> None:
    """Refuses names that are not UTF-8, which the files of the result could not hold.

    Raises:
        InputError: names the option.
    """
    for option, value in paths.items():
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{option} {os.fsencode(str(value))!r} is not UTF-8: rename it") from None


def refuse_inputs_inside(final: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuses an output folder that is an input of the same command, or that holds one.

    Links, `..`, bind mounts and other names of the same folder are seen through.

    Raises:
        InputError: names the option and the input.
    """
    for option, value in inputs.items():
        if value is None or not str(value):
            continue
        for path in _local_paths(str(value)):
            if any(_is_same(folder, final) for folder in (path, *path.parents)):
                raise InputError(
                    f"{option} {value} is in the output folder {final}, where it could be overwritten: choose another "
                    "output_dir"
                )


def _local_paths(value: str) -> list[Path]:
    """The local files or folders that an option names, with links resolved; and, of a file behind a link, the link."""
    try:
        given = Path(value).expanduser()
        names = [given, *(map(Path, glob.iglob(str(given), recursive=True)) if glob.has_magic(value) else ())]
        names = [name for name in names if os.path.lexists(name)]
        links = [Path(os.path.realpath(name.parent)) / name.name for name in names]
        return list(dict.fromkeys([*(Path(os.path.realpath(name)) for name in names), *links]))
    except (RuntimeError, ValueError, OSError):
        return []  # not a path; the command says what is wrong with it


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


@contextlib.contextmanager
def locked(folder: Path, command: str) -> Iterator[None]:
    """Holds the lock of an output folder. One process of a run takes it, for all of its ranks.

    The lock is the kernel's (`flock`, through filelock), so that it ends with the process, however that ends: nothing
    stale ever blocks. On NFS version 4 and on most cluster file systems it also holds between machines, and there the
    lock of a machine that crashes ends with its lease, after about 90 seconds. A file system without `flock` gets a
    marker file with the process's number instead, which filelock checks on the same machine only. After an error, its
    file stays only in a folder of which a record says that it is a run's.

    Raises:
        InputError: another process holds it: its number, machine and command.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"{folder} is in use by {_holder(folder)}: wait for it, or choose another output folder"
            ) from None
        except OSError as error:
            raise InputError(f"cannot lock {folder}: {error.strerror}; choose another output folder") from error
        _say_who(folder, command)
        yield
    except BaseException:
        if lock.is_locked and command_of(folder) in (None, "result"):
            _unlink_lock(folder)
        raise
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def refuse_locked(folder: Path) -> None:
    """Raises `InputError` when another process holds the lock of `folder`."""
    if (folder / LOCK).is_file():
        with locked(folder, "check"):
            pass


def _say_who(folder: Path, command: str) -> None:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "started": started}
    try:
        with atomic_file(folder / HOLDER) as temporary:
            temporary.write_text(json.dumps(holder), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another output folder") from error


def _holder(folder: Path) -> str:
    holder = read_record(folder / HOLDER)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (castlm {holder.get('command')})"


def read_result(folder: Path) -> dict[str, Any]:
    """The castlm.json of a finished result, whose files are found to be as castlm wrote them.

    Raises:
        InputError: castlm.json is corrupt, or a file that it lists is missing or has changed.
    """
    remedy = f"remove {folder} and run it again"
    record = read_json_mapping(folder / RESULT, remedy)
    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{folder / RESULT} lists no files, so that the result cannot be checked: {remedy}")
    if name := changed_file(folder, files):
        raise InputError(f"{folder / name} is missing or has changed since castlm wrote it: {remedy}")
    return record
