"""The output folder of a command: checked before any work, locked during a run, and never lost.

A command with one result calls `check_output`, then writes with `atomic_dir`: a folder beside the final place, which is
flushed to the disk and renamed, so that a kill, a full disk or a power cut leaves the old one or the new one. A run
that works in its folder for hours holds `output_folder` and calls `begin_output` once all checks have passed; before
that, nothing in the folder changes. The folder that an output replaces is renamed, not deleted.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.fields import convert
from castlm.files.atomic_file import (
    atomic_write_text,
    flush_file,
    flush_folder,
    held,
    remove_stale,
    reporting_full_disk,
    temporary_name,
    widen_access,
)
from castlm.files.record import (
    LOCK,
    OUTPUT,
    command_of,
    is_empty,
    list_files,
    record_output,
    set_aside,
    unrecorded,
    update_record,
)
from castlm.progress import note
from castlm_runtime.reading import read_record, user_path

Inputs = Mapping[str, str | Path | None]


def check_output(path: str | Path, *, overwrite: bool = False, inputs: Inputs | None = None) -> Path:
    """Checks, before any work, that a result can be written to the folder `path`; returns it with links resolved.

    Args:
        overwrite: accept an earlier output of castlm, which the result will replace.
        inputs: what the command reads, by option. Values other than local paths and globs are ignored.

    Raises:
        InputError: the folder holds an input or lies inside one, holds something else, is in use by a run, or cannot be
            written.
    """
    final = _resolve(path, inputs or {})
    _refuse_content(final, overwrite)
    refuse_locked(final)
    check_beside(final)
    return final


@contextlib.contextmanager
def output_folder(
    path: str | Path,
    command: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Inputs | None = None,
) -> Iterator[Path]:
    """Locks the folder `path` for a run of `command`, and yields it with links resolved.

    Makes the folder if it is missing, and leaves its content alone until `begin_output`. At the end, its record lists
    its files. A start that fails before it has written anything leaves no trace.

    Args:
        overwrite: accept an earlier output of castlm, which `begin_output` renames.
        resume: accept an earlier output of `command`, to be continued, or an empty folder.
        inputs: as `check_output`.

    Raises:
        InputError: as `check_output`.
    """
    final = _resolve(path, inputs or {})
    existed = final.is_dir()
    if not existed:
        check_beside(final)
        final.mkdir(exist_ok=True)
    with locked(final / LOCK, command, final):
        before = read_record(final / OUTPUT).get("begun")

        def has_begun() -> bool:
            return read_record(final / OUTPUT).get("begun") not in (None, before)

        try:
            if not resume:
                _refuse_content(final, overwrite)
                if not is_empty(final):
                    check_beside(final)
            elif not is_empty(final) and command_of(final) != command:
                raise InputError(f"{final} holds no output of castlm {command}, but other files: name another folder")
            yield final
            if has_begun():
                update_record(final, complete=True)
        except BaseException as error:
            if has_begun():
                _end_early(final, may_continue=isinstance(error, KeyboardInterrupt | SystemExit), resumes=resume)
            raise
        finally:
            if final.is_dir() and is_empty(final):
                for left in final.iterdir():
                    if left.is_dir():
                        left.rmdir()
                    else:
                        left.unlink()
                if not existed or before is not None:  # the finished result replaces the unfinished output
                    final.rmdir()
            elif command_of(final) is None:  # it holds files of others
                (final / LOCK).unlink(missing_ok=True)


def begin_output(
    folder: Path, command: str, files: Mapping[str, str] | None = None, *, resume: bool = False, **about: Any
) -> None:
    """Begins or continues a run in `folder`, which the caller got from `output_folder`.

    With `resume`, or in an empty folder, the run uses the folder as it is. Otherwise a new folder with the record and
    `files` takes the name, and the earlier output is renamed.

    Args:
        files: texts to write first, by file name.
        about: further entries of the record.
    """
    folder, files = Path(os.path.realpath(folder)), files or {}
    about |= {"command": command, "begun": datetime.datetime.now(datetime.UTC).isoformat(), "complete": False}
    about |= {"begins_with": sorted(files)}
    with reporting_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            known = {name: value for name, value in read_record(folder / OUTPUT).items() if name != "files"}
            _write_start(folder, files, {**known, **about, "foreign": unrecorded(folder)})
            return
        if is_empty(folder):
            _write_start(folder, files, about)
            return
        new = folder.with_name(temporary_name(folder.name))
        new.mkdir()
        try:
            with held(new):
                _write_start(new, files, about)
                if (folder / LOCK).exists():  # this process holds it
                    try:
                        os.link(folder / LOCK, new / LOCK)
                    except OSError:  # a file system without hard links
                        os.rename(folder / LOCK, new / LOCK)
                earlier = _publish(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        assert earlier is not None
        (earlier / LOCK).unlink(missing_ok=True)
        update_record(folder, earlier=earlier.name)
        note(f"the earlier output is {earlier} now")


def _write_start(folder: Path, files: Mapping[str, str], about: dict[str, Any]) -> None:
    """Writes the record first, so that a folder left half begun by a kill is recognized as castlm's."""
    record_output(folder, **about)
    for name, text in files.items():
        atomic_write_text(folder / name, text)
    update_record(folder)


def _end_early(folder: Path, *, may_continue: bool, resumes: bool) -> None:
    """Updates the record after an error; undoes the begin if nothing was written since."""
    record = read_record(folder / OUTPUT)
    if set(list_files(folder)) <= set(record.get("begins_with", ())):
        for name in [*list_files(folder), OUTPUT]:
            (folder / name).unlink(missing_ok=True)
        earlier = folder.with_name(record["earlier"]) if "earlier" in record else None
        if earlier is not None and earlier.is_dir():
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
            os.rename(earlier, folder)
        return
    with contextlib.suppress(OSError, InputError):  # the disk is full
        update_record(folder)
    if may_continue:
        again = "the same command" if resumes else "--resume"
        note(f"the work so far is in {folder}: {again} continues there")


def _resolve(path: str | Path, inputs: Inputs) -> Path:
    """Resolves links in `path`; refuses a name that cannot be recorded, a file, or a folder that holds an input."""
    refuse_undecodable({"output_dir": path, **inputs})
    final = Path(os.path.realpath(user_path(path)))
    _refuse_taken(final, overwrite=True)
    refuse_inputs_inside(final, inputs)
    return final


def _refuse_content(final: Path, overwrite: bool) -> None:
    """Refuses a folder that is not empty, unless `overwrite` is set and castlm can rename its own earlier output."""
    _refuse_taken(final, overwrite)
    if is_empty(final):
        return
    here = Path.cwd().resolve()
    if final in (here, *here.parents, Path.home().resolve()) or os.path.ismount(final):
        raise InputError(
            f"{final} cannot be renamed, because it is the working folder, a folder above it, your home or a mount "
            "point: choose another output folder"
        )
    if command_of(final) is None:
        raise InputError(
            f"{final} has no record of castlm, which overwrites only its own: choose another output folder"
        )


def check_beside(final: Path) -> None:
    """Checks that folders with longer names can be made beside `final`, and removes leftovers of killed writers."""
    probe = final.with_name(temporary_name(final.name))  # no name beside `final` is longer
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
        remove_stale(final)
    except OSError as error:
        raise InputError(
            f"cannot write {final.parent}, where {final.name} is to be: {error.strerror}; choose another output folder"
        ) from error


def refuse_locked(folder: Path) -> None:
    """Raises `InputError` when another process holds the lock of `folder`."""
    if (folder / LOCK).is_file():
        with locked(folder / LOCK, "check", folder):
            pass


def record_file(file: Path) -> None:
    """Adds a file that castlm wrote into a finished run to its record; a running one lists its files at its end."""
    if (file.parent / OUTPUT).is_file():
        with contextlib.suppress(InputError), locked(file.parent / LOCK, "report", file.parent):
            foreign = unrecorded(file.parent)
            foreign.pop(file.name, None)
            update_record(file.parent, foreign=foreign)


def refuse_undecodable(paths: Inputs) -> None:
    """Refuses a path that is not UTF-8, by its option, because the records of the result could not hold it."""
    for option, value in paths.items():
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{option} {os.fsencode(str(value))!r} is not UTF-8: rename it") from None


def refuse_inputs_inside(final: Path, inputs: Inputs) -> None:
    """Refuses an output folder that is or holds an input of the same command.

    Resolves links and `..`: the folder would be renamed while the input is still being read.
    """
    for option, value in inputs.items():
        try:
            given = Path(str(value or "")).expanduser()
            found = map(Path, glob.iglob(str(given), recursive=True)) if glob.has_magic(str(value)) else ()
            names = [name for name in (given, *found) if value and os.path.lexists(name)]
        except (RuntimeError, ValueError, OSError):
            continue  # not a path; the command itself reports it
        links = [Path(os.path.realpath(name.parent)) / name.name for name in names]  # its own place, too
        for path in [*(Path(os.path.realpath(name)) for name in names), *links]:
            if final in (path, *path.parents):
                raise InputError(f"{option} {value} is in the output folder {final}: choose another output_dir")


# --------------------------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def locked(file: Path, command: str, output: Path) -> Iterator[None]:
    """Holds the lock `file` during the block, and writes into it who holds it. One process of a run takes it for all.

    The lock is a `flock` of the kernel, so it ends with the process, even after a kill. On NFS 4 and most cluster file
    systems it also holds between machines; after a crash it ends with the lease, in about 90 s. The holder may delete
    the file: who has opened the deleted one is refused.

    Args:
        output: the folder or file that the lock is for, which an error names.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputError(
            f"{output} cannot be locked: {file} cannot be opened ({error.strerror}): remove it, or name another output"
        ) from error
    try:
        holder = _holder(descriptor, file)
        if holder is not None:
            raise InputError(f"{output} is in use by {holder}: wait for it, or choose another output")
        with contextlib.suppress(OSError):  # the disk is full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} (castlm {command})".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int, file: Path) -> str | None:
    """Takes the lock; if another process holds it, or has held and deleted it meanwhile, returns what it wrote."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        note(f"{file.parent} is on a file system without locks: start no other command in it meanwhile")
    return None if os.fstat(descriptor).st_nlink else "a process that has just ended"


# ------------------------------------------------------------------------------------------------ a whole new folder


@contextlib.contextmanager
def atomic_dir(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` to write into, renamed to `final` when the block ends without an error.

    Before the rename, its files are recorded and flushed to the disk. An earlier `final` becomes NAME.previous; see
    `set_aside`. On any error, including Ctrl-C, the temporary folder is removed and `final` stays unchanged.

    Raises:
        InputError: `final` holds something (without `overwrite`), or the disk is full.
    """
    # A link is followed, so that the folder behind it is replaced and the link stays.
    final = Path(os.path.realpath(Path(final).expanduser()))
    temporary = final.with_name(temporary_name(final.name))
    with reporting_full_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(final)
        _refuse_taken(final, overwrite)
        temporary.mkdir()
        try:
            with held(temporary):
                yield temporary
                for root, _, names in os.walk(temporary):
                    for name in names:
                        widen_access(Path(root, name), temporary)
                        flush_file(Path(root, name))
                    flush_folder(Path(root))
                record_output(temporary, command="result", complete=True, checksums=True)
                _refuse_taken(final, overwrite)  # it may have appeared meanwhile
                _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_taken(final: Path, overwrite: bool) -> None:
    """Raises `InputError` if `final` is a file, or holds something without `overwrite`, or that is no bool."""
    overwrite = convert("overwrite", overwrite, bool)  # a library call may give anything, such as a tensor
    if os.path.lexists(final) and not final.is_dir():
        raise InputError(f"{final} is a file: name a folder for the output")
    if not overwrite and not is_empty(final):
        resumes = "--resume, " if "begun" in read_record(final / OUTPUT) else ""
        raise InputError(
            f"{final} already holds something: give {resumes}--overwrite (in Python overwrite=True) or another output "
            "folder"
        )


def _publish(new: Path, final: Path) -> Path | None:
    """Renames `new` to `final`, and an earlier `final` that holds something by `set_aside`; returns its new path.

    A kill between the two renames leaves the earlier folder as NAME.previous.
    """
    earlier = set_aside(final) if final.is_dir() and any(final.iterdir()) else None
    try:
        os.rename(new, final)
    except BaseException:
        if earlier is not None and not os.path.lexists(final):
            os.rename(earlier, final)
        raise
    flush_folder(final.parent)
    return earlier
