"""Checkpoints that a kill cannot break: written beside, flushed, renamed when whole, and loaded only by the run they
are of. Tensors go through torch.distributed.checkpoint, each rank its shards; the rest is a manifest in JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from castlm.core.errors import InputError
from castlm.files import atomic_write_json, flush_folder, is_disk_full
from castlm.training.config import FREE_ON_RESUME
from castlm.training.distributed import World

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in `folder` by step, oldest first. What was not finished has another name."""
    found = {int(m[1]): entry for entry in folder.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / "manifest.json").is_file()}


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Any], manifest: Mapping[str, Any], keep: int, world: World
) -> Path:
    """Writes `folder/step-XXXXXXXX` and removes all but the newest `keep`. All ranks call it.

    Args:
        tensors: nested dict of tensors; DTensors are written by the ranks that hold them.
        manifest: JSON-able; what `check_same_run` and the loop need to go on.

    Raises:
        InputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    failure: BaseException | None = None
    try:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        world.barrier()
        with _single_process_is_meant():
            dcp.save(dict(tensors), checkpoint_id=temporary, no_dist=world.mesh is None)
        world.barrier()
        if world.is_main:
            files = {path.name: _size_and_crc(path) for path in sorted(temporary.iterdir())}
            atomic_write_json(temporary / "manifest.json", {**manifest, "format": FORMAT, "step": step, "files": files})
            flush_folder(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            flush_folder(folder)
            for old in list(checkpoint_steps(folder).values())[:-keep]:
                shutil.rmtree(old)
    except (OSError, InputError, CheckpointException, RuntimeError) as error:
        failure = error
    if world.any(failure is not None):
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        whole = checkpoint_steps(folder)
        last = f"the last whole checkpoint is {whole[max(whole)]}" if whole else "there is no earlier checkpoint"
        why = "the disk is full" if failure is not None and _is_full(failure) else _first_line(failure)
        raise InputError(f"step {step} could not be saved in {folder}: {why}; {last}") from failure
    return final


def load_checkpoint(path: Path, tensors: dict[str, Any], world: World) -> dict[str, Any]:
    """Reads a checkpoint into `tensors`, in place, whatever number of ranks wrote it, and returns its manifest.

    Raises:
        InputError: a file is missing, or differs from what was written.
    """
    manifest = read_manifest(path)
    if world.is_main:
        for name, expected in manifest["files"].items():
            if not (path / name).is_file() or list(_size_and_crc(path / name)) != expected:
                raise InputError(f"{path / name} is missing or corrupt: remove {path} and resume from an older one")
    world.barrier()
    try:
        with _single_process_is_meant():
            dcp.load(tensors, checkpoint_id=path, no_dist=world.mesh is None)
    except (CheckpointException, RuntimeError, KeyError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read ({_first_line(error)}): remove it to resume from an older one"
        ) from error
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


@contextlib.contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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


def _first_line(error: BaseException | None) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error or "another rank failed").strip()
    return text.splitlines()[0] if text else type(error).__name__
