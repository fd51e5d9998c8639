"""Checkpoints that survive a kill at any moment: written under a temporary name, flushed, and renamed when complete.

Only the run that wrote a checkpoint loads it. torch.distributed.checkpoint stores the tensors, each rank its shards;
the rest is a manifest in JSON. No part of a checkpoint is a pickle that could run code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.files.atomic_file import (
    atomic_write_json,
    flush_folder,
    is_whole,
    plain_json,
    read_json_mapping,
    size_and_crc,
)
from castlm.files.disk import is_disk_full
from castlm.training.checkpoint_storage import DATA_FILE, METADATA, JsonReader, JsonWriter
from castlm.training.config import FREE_ON_RESUME, is_retired

FORMAT = 3
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def _expect_single_process() -> None:
    """Silences torch's warning about a single process; `catch_warnings` does not work in the thread that saves."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in `folder` by step, oldest first. An unfinished one has another name."""
    found = {int(m[1]): entry for entry in folder.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / MANIFEST).is_file()}


def _half_removed(folder: Path) -> list[Path]:
    """The remains of checkpoints that a run was removing when it was killed."""
    whole = checkpoint_steps(folder).values()
    named = [entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name) and entry not in whole]
    return [entry for entry in named if entry.is_dir() and not entry.is_symlink()]


class Saver:
    """Writes the checkpoints of a run into `folder/step-XXXXXXXX`, one at a time. All ranks call each method together.

    Args:
        keep: number of checkpoints that are kept.
        background: write during the following steps, from a copy in host memory.
        say: called with a line for each complete checkpoint.
    """

    def __init__(self, folder: Path, keep: int, world: World, *, background: bool, say: Callable[[str], None]) -> None:
        self.folder, self.keep, self.world, self.background, self.say = folder, keep, world, background, say
        _expect_single_process()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._half_removed = _half_removed(folder) if world.is_main else []  # the main rank publishes, and removes
        self._pending: tuple[int, str, Future[dict[str, tuple[int, int]]]] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Publishes the checkpoint that is being written, also after an error, if this process is the only rank."""
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception):
            self.finish_despite_error()

    def save(self, step: int, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Saves the state of `step`, after finishing the save before it.

        Args:
            tensors: nested dict of tensors; each rank writes its shards of DTensors. They may change as soon as this
                returns.
            manifest: JSON-able; the facts that `check_same_run` and the loop need to continue.

        Raises:
            InputError: as `finish`.
        """
        self.finish()
        temporary = self._temporary(step)
        self.world.check_all(self.world.on_main(lambda: self._start(step)))
        content = json.dumps({**manifest, "format": FORMAT, "step": step})  # now, because its values change later
        writer = JsonWriter(temporary, per_thread_copy_ahead=0)  # copying ahead takes the stream of this thread's GPU
        options: dict[str, Any] = {"storage_writer": writer, "no_dist": self.world.mesh is None}
        options["process_group"] = self.world.saving
        if self.background:
            write = dcp.async_save(dict(tensors), **options).result
        else:
            write = functools.partial(dcp.save, dict(tensors), **options)
        self._pending = step, content, self._thread.submit(_write, write, temporary, self.world.rank)
        if not self.background:
            self.finish()

    def finish_if_written(self) -> None:
        """Publishes the checkpoint that is being written, if all ranks have written their parts; does not wait."""
        if self._pending is not None and not self.world.any(not self._pending[2].done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, and publishes it under its name.

        Raises:
            InputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        if self._pending is None:
            return
        step, content, written = self._pending
        self._pending = None
        files, failure = {}, None
        try:
            files = written.result()
        except (OSError, CheckpointException, RuntimeError) as error:
            failure = self._explain(step, error)
        gathered = self.world.gather((files, failure))
        failure = next((f for _, f in gathered if f is not None), None)
        if failure is None:
            files = {name: entry for rank_files, _ in gathered for name, entry in rank_files.items()}
            failure = self.world.on_main(lambda: self._publish(step, {**json.loads(content), "files": files}))
        if failure is not None and self.world.is_main:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        self.world.check_all(failure)
        self.say(f"saved {self.folder / f'step-{step:08d}'}")

    def finish_despite_error(self, *, on_all_ranks: bool = False) -> None:
        """`finish` before an error ends the run: reports a checkpoint that cannot be saved, and raises nothing.

        Args:
            on_all_ranks: whether all ranks have the error. Otherwise several ranks leave the checkpoint unfinished,
                because `finish` would wait for ranks that do not call it.
        """
        if self.world.mesh is not None and not on_all_ranks:
            return
        try:
            self.finish()
        except (Exception, SystemExit) as error:  # the main rank has the reason
            self.say(str(error))

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def _start(self, step: int) -> str | None:
        try:
            for left in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(left)
            self._temporary(step).mkdir(parents=True)
        except OSError as error:
            return self._explain(step, error)
        return None

    def _publish(self, step: int, manifest: dict[str, Any]) -> str | None:
        temporary, final = self._temporary(step), self.folder / f"step-{step:08d}"
        try:
            manifest = plain_json(manifest)
            atomic_write_json(temporary / MANIFEST, manifest | {"checksum": _checksum(manifest)})
            flush_folder(temporary)
            if final.exists():
                _remove(final)
            os.rename(temporary, final)
            flush_folder(self.folder)
            for old in [*list(checkpoint_steps(self.folder).values())[: -self.keep], *self._half_removed]:
                _remove(old)
            self._half_removed = []
        except (OSError, InputError) as error:
            return self._explain(step, error)
        return None

    def _explain(self, step: int, error: BaseException) -> str:
        whole = checkpoint_steps(self.folder)
        last = f"the last whole checkpoint is {whole[max(whole)]}" if whole else "there is no earlier checkpoint"
        why = "the disk is full" if _is_full(error) else _first_line(error)
        return f"step {step} could not be saved in {self.folder}: {why}; {last}"


def _remove(checkpoint: Path) -> None:
    """Deletes the files of a checkpoint; other files stay. Without its manifest, deleted first, it is incomplete."""
    for file in [checkpoint / MANIFEST, checkpoint / METADATA, *checkpoint.glob("__*_*.distcp")]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody's own file is in it
        checkpoint.rmdir()


def remove_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of a finished run; other files in `folder` stay."""
    for checkpoint in [*checkpoint_steps(folder).values(), *_half_removed(folder)]:
        _remove(checkpoint)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write(write: Callable[[], Any], folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Writes this rank's part; returns size and CRC-32 of its files, by name."""
    write()
    mine = [*folder.glob(f"__{rank}_*"), *(folder.glob(METADATA) if rank == 0 else ())]
    return {path.name: size_and_crc(path) for path in sorted(mine)}


def load_checkpoint(path: Path, tensors: dict[str, Any], world: World) -> dict[str, Any]:
    """Reads a checkpoint into `tensors`, in place, and returns its manifest. Any number of ranks may have written it.

    Nothing in a checkpoint can run code, allocate more than the run's own tensors, or name a file outside of it.

    Returns:
        The manifest; figures that were not finite are inf.

    Raises:
        InputError: a file is missing or corrupt, or this run would not have written it.
    """
    manifest = read_manifest(path)
    failure = None
    for name, expected in list(manifest["files"].items())[world.rank :: world.size]:
        file = path / name
        if not is_whole(file, expected):
            failure = f"{file} is missing or corrupt: remove {path} to resume from an older one"
    world.check_all(failure)
    reader = None
    try:
        reader = JsonReader(path, tensors)
    except InputError as error:
        failure = str(error)
    world.check_all(failure)
    try:
        _expect_single_process()
        dcp.load(tensors, storage_reader=reader, no_dist=world.mesh is None, process_group=world.control)
    except (CheckpointException, Exception) as error:  # torch raises any type for a file with other content
        failure = f"{path} cannot be read ({_first_line(error)}): remove it to resume from an older one"
    world.check_all(failure)
    for row in manifest["figures"].values():
        row.update({name: math.inf for name, value in row.items() if value is None})  # JSON has no infinity
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        InputError: it is corrupt, its checksum does not match, or it has another format.
    """
    remedy = f"remove {path} to resume from an older one"
    manifest = read_json_mapping(path / MANIFEST, remedy)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {manifest.get('format')}, not {FORMAT}: use the castlm that wrote it"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise InputError(f"{path / MANIFEST} is corrupt: its checksum does not match; {remedy}")
    if wrong := next((name for name, is_right in _EXPECTED.items() if not is_right(manifest.get(name))), None):
        raise InputError(f"{path / MANIFEST} is corrupt: {wrong} is not what castlm writes; {remedy}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest in canonical JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_mapping(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


def _is_file_list(value: Any) -> bool:
    def is_entry(entry: Any) -> bool:
        return isinstance(entry, list) and len(entry) == 2 and all(map(_is_count, entry))

    return _is_mapping(value, is_entry) and all(name == METADATA or DATA_FILE.fullmatch(name) for name in value)


_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "tokens": _is_count,
    "flips": _is_count,
    "seconds": lambda value: _is_number(value) and value >= 0,
    "config": lambda value: isinstance(value, dict),
    "facts": lambda value: isinstance(value, dict),
    "data": lambda value: isinstance(value, dict),
    # a perplexity that overflowed is null
    "figures": lambda value: _is_mapping(value, lambda row: _is_mapping(row, lambda x: x is None or _is_number(x))),
    "files": lambda value: _is_file_list(value) and METADATA in value,
}
"""A test for each field of a manifest."""


_BY_CONTENT = {
    "dataset": "dataset_sha256",
    "eval_dataset": "eval_sha256",
    "chat_template_path": "chat_template_sha256",
}
"""Options that name files, and the fact that holds the hash of their content."""


def check_same_run(manifest: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Checks that a checkpoint belongs to a run with these options and facts.

    Args:
        manifest: the manifest of the checkpoint; its `config` and `facts` are compared.
        config: the options of this start. All outside `FREE_ON_RESUME` must match the checkpoint; a file may be renamed
            if its hash matches.
        facts: text hashes and the global batch, which must match too.

    Raises:
        InputError: lists every difference.
    """
    before = manifest["facts"]
    free = FREE_ON_RESUME | {k for k, fact in _BY_CONTENT.items() if fact in before and before[fact] == facts.get(fact)}
    then, given = manifest["config"], json.loads(json.dumps(config))
    saved = {k: v for k, v in then.items() if k not in free and not is_retired(k, v)} | before
    now = {k: v for k, v in given.items() if k not in free and not is_retired(k, v)} | dict(facts)
    changed = [f"{k} {saved.get(k)} -> {now.get(k)}" for k in sorted(saved | now) if saved.get(k) != now.get(k)]
    if changed:
        raise InputError(
            f"this is not the run that was saved ({', '.join(changed)}): undo that, or use a new output_dir"
        )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):
        return any(is_disk_full(wrapped[0]) for wrapped in error.failures.values())
    return is_disk_full(error)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # torch's own message explains how to run the code in the file
        return "it holds something other than tensors"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
