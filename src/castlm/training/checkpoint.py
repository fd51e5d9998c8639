"""Checkpoints that a kill cannot break: written beside, flushed, renamed when whole, and loaded only by the run they
are of. Tensors go through torch.distributed.checkpoint, each rank its shards; the rest is a manifest in JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.files import atomic_write_json, flush_folder, is_disk_full
from castlm.training.config import FREE_ON_RESUME, TrainConfig

FORMAT = 2
_NAME = re.compile(r"step-(\d{8})")

# A single process is meant. Not `catch_warnings`: it is no tool for the thread that saves.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in `folder` by step, oldest first. What was not finished has another name."""
    found = {int(m[1]): entry for entry in folder.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / "manifest.json").is_file()}


def after_restart(config: TrainConfig) -> TrainConfig:
    """`config` as it has to be where `torchrun --max-restarts` starts the ranks again: what the start before has begun
    is resumed, or begun anew where it has saved nothing."""
    if config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return config
    folder = Path(config.output_dir)
    if checkpoint_steps(folder / "checkpoints") or (folder / "model" / "castlm.json").is_file():
        return dataclasses.replace(config, resume=True, overwrite=False)
    file = folder / "config.yaml"
    is_ours = file.is_file() and file.read_text(encoding="utf-8") == config.as_yaml()
    return dataclasses.replace(config, overwrite=config.overwrite or is_ours)


class Saver:
    """Writes the checkpoints of a run into `folder/step-XXXXXXXX`, one at a time. All ranks call each method alike.

    Args:
        keep: whole checkpoints that are kept.
        background: write while training goes on, from a copy in host memory.
        say: is told of each checkpoint that is whole.
    """

    def __init__(self, folder: Path, keep: int, world: World, *, background: bool, say: Callable[[str], None]) -> None:
        self.folder, self.keep, self.world, self.background, self.say = folder, keep, world, background, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: tuple[int, str, Future[dict[str, tuple[int, int]]]] | None = None

    def save(self, step: int, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Takes the state of `step`, and finishes the save before it first.

        Args:
            tensors: nested dict of tensors; DTensors are written by the ranks that hold them. They may change at once.
            manifest: JSON-able; what `check_same_run` and the loop need to go on.

        Raises:
            InputError: as `finish`.
        """
        self.finish()
        temporary = self._temporary(step)
        self.world.check_all(self.world.on_main(lambda: self._start(step)))
        content = json.dumps({**manifest, "format": FORMAT, "step": step})  # now: its values go on changing
        options: dict[str, Any] = {"checkpoint_id": temporary, "no_dist": self.world.mesh is None}
        options["process_group"] = self.world.saving
        if self.background:
            write = dcp.async_save(dict(tensors), **options).result
        else:
            write = functools.partial(dcp.save, dict(tensors), **options)
        self._pending = step, content, self._thread.submit(_write, write, temporary, self.world.rank)
        if not self.background:
            self.finish()

    def finish_if_written(self) -> None:
        """Gives the checkpoint that is being written its name, if all ranks have written it; waits for none."""
        if self._pending is not None and not self.world.any(not self._pending[2].done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, and gives it its name.

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
            atomic_write_json(temporary / "manifest.json", manifest)
            flush_folder(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            flush_folder(self.folder)
            for step in list(checkpoint_steps(self.folder))[: -self.keep]:
                old = self._temporary(step)  # under the name of one that is not whole, as it soon will be
                os.rename(self.folder / f"step-{step:08d}", old)
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, InputError) as error:
            return self._explain(step, error)
        return None

    def _explain(self, step: int, error: BaseException) -> str:
        whole = checkpoint_steps(self.folder)
        last = f"the last whole checkpoint is {whole[max(whole)]}" if whole else "there is no earlier checkpoint"
        why = "the disk is full" if _is_full(error) else _first_line(error)
        return f"step {step} could not be saved in {self.folder}: {why}; {last}"


def _write(write: Callable[[], Any], folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of what this rank has written, by file name."""
    write()
    mine = [*folder.glob(f"__{rank}_*"), *(folder.glob(".metadata") if rank == 0 else ())]
    return {path.name: _size_and_crc(path) for path in sorted(mine)}


def load_checkpoint(path: Path, tensors: dict[str, Any], world: World) -> dict[str, Any]:
    """Reads a checkpoint into `tensors`, in place, whatever number of ranks wrote it, and returns its manifest.

    Raises:
        InputError: a file is missing, or differs from what was written.
    """
    manifest = read_manifest(path)
    failure = None
    for name, expected in list(manifest["files"].items())[world.rank :: world.size]:
        if not (path / name).is_file() or list(_size_and_crc(path / name)) != expected:
            failure = f"{path / name} is missing or corrupt: remove {path} and resume from an older one"
    world.check_all(failure)
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=world.mesh is None, process_group=world.control)
    except (CheckpointException, RuntimeError, KeyError, EOFError) as error:
        failure = f"{path} cannot be read ({_first_line(error)}): remove it to resume from an older one"
    world.check_all(failure)
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `InputError` when it is corrupt or of another format."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no readable manifest.json: remove it to resume from an older one") from error
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {manifest.get('format')}, not {FORMAT}: use the castlm that wrote it"
        )
    return manifest


def check_same_run(manifest: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuses to continue a run as another one.

    Args:
        config: of now, as a dict; all but `FREE_ON_RESUME` has to be as it was saved.
        facts: what else has to be equal: text hashes, global batch.

    Raises:
        InputError: lists every difference.
    """
    saved = {k: v for k, v in manifest["config"].items() if k not in FREE_ON_RESUME} | manifest["facts"]
    now = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in FREE_ON_RESUME} | dict(facts)
    changed = [f"{k} {saved.get(k)} -> {now.get(k)}" for k in sorted(saved | now) if saved.get(k) != now.get(k)]
    if changed:
        raise InputError(
            f"this is not the run that was saved ({', '.join(changed)}): undo that, or use a new output_dir"
        )


def _size_and_crc(path: Path) -> tuple[int, int]:
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


def _is_full(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):
        return any(is_disk_full(wrapped[0]) for wrapped in error.failures.values())
    return is_disk_full(error)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
