"""Checkpoints that survive a kill at any moment: written under a temporary name, flushed, and renamed when complete.

A checkpoint is a folder with one safetensors file for each rank, which holds the rank's rows of every tensor, and a
manifest in JSON. The rows of a tensor follow each other in the order of the files, so any number of ranks can read
them. Nothing in a checkpoint can run code. Only the run that wrote a checkpoint loads it.

`RunFolder` is the folder around them: it begins the run, finds its newest checkpoint and knows when it is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from castlm.core.errors import InputError
from castlm.core.shards import local, own_rows
from castlm.facts import Facts
from castlm.fields import free_on_resume
from castlm.files.atomic_file import (
    atomic_write_json,
    flush_file,
    flush_folder,
    is_disk_full,
    is_whole,
    plain_json,
    size_and_crc,
    widen_access,
)
from castlm.files.output import Inputs, begin_output, output_folder
from castlm.files.record import OUTPUT, PROBE, RESULT
from castlm.files.yaml_file import read_yaml_mapping
from castlm.hardware import available_memory, trim_memory
from castlm.progress import note
from castlm.say import Say
from castlm.training.config import TrainConfig
from castlm.training.options import CheckpointOptions
from castlm.world import World
from castlm_runtime.reading import read_json_object, read_record, user_path

FORMAT = 6
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_SHARDS = "shard-*.safetensors"
_RESERVE = 1.1  # memory that must be free for a copy in the background, in copies


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in `folder` by step, oldest first. An unfinished one has another name."""
    named = {int(m[1]): entry for entry in folder.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return {step: named[step] for step in sorted(named) if (named[step] / MANIFEST).is_file()}


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; None if there is none."""
    whole = checkpoint_steps(folder)
    return whole[max(whole)] if whole else None


def _half_removed(folder: Path) -> list[Path]:
    """The remains of checkpoints that a run was removing when it was killed."""
    whole = checkpoint_steps(folder).values()
    named = [entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name) and entry not in whole]
    return [entry for entry in named if entry.is_dir() and not entry.is_symlink()]


KEPT = 2
"""The number of checkpoints that a run keeps: the older one is whole where the newer one is damaged."""


class Saver:
    """Writes the checkpoints of a run into `folder/step-XXXXXXXX`, one at a time. All ranks call each method together.

    Args:
        background: write during the following steps, from a copy in host memory; at once where there is no memory for
            a copy.
        say: called with a line for each complete checkpoint.
    """

    def __init__(self, folder: Path, world: World, *, background: bool, say: Say) -> None:
        self.folder, self.world, self.background, self.say = folder, world, background, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._half_removed = _half_removed(folder) if world.is_main else []  # the main rank publishes, and removes
        self._pending: tuple[int, str, Future[dict[str, tuple[int, int]]]] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Publishes the checkpoint that is being written, also after an error of all ranks."""
        if kind is None:
            self.finish()
        elif isinstance(error, Exception):
            self.finish_despite_error(on_all_ranks=isinstance(error, InputError) and error.on_all_ranks)

    def save(self, step: int, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Saves the state of `step`, after finishing the save before it.

        Args:
            tensors: by name, alike on all ranks; each rank writes its rows of DTensors. They may change as soon as this
                returns.
            manifest: JSON-able; the facts that `check_same_run` and the loop need to continue.
        """
        self.finish()
        self.world.check_all(self.world.on_main(lambda: self._start(step)))
        content = json.dumps({**manifest, "format": FORMAT, "step": step})  # now, because its values change later
        # Sharded tensors are written by the first of the replicas, plain ones by the main rank.
        # ranks 0 to shards - 1; replicas hold the same rows
        is_first_replica = self.world.rank == self.world.shard_index
        rows = {
            name: _rows(tensor)
            for name, tensor in tensors.items()
            if is_first_replica and (self.world.is_main or isinstance(tensor, DTensor))
        }
        background = self.background and self._has_memory(step, sum(part.nbytes for part in rows.values()))
        # The next step changes weights and moments in place, so that a write in the background needs a copy.
        rows = {name: part.to("cpu", copy=background).contiguous() for name, part in rows.items()}
        file = self._temporary(step) / f"shard-{self.world.shard_index:05d}.safetensors"
        self._pending = step, content, self._thread.submit(_write, rows, file)
        if not background:
            self.finish()

    def _has_memory(self, step: int, num_bytes: int) -> bool:
        """Whether all ranks have host memory for a copy of `num_bytes`, beside what a step takes; reports if not."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world.mesh is not None else 1
        free = available_memory() / here
        has_memory = not self.world.any(num_bytes * _RESERVE > free)
        if not has_memory:
            self.say(
                f"step {step} is saved before the next step, not in the background: a copy takes "
                f"{num_bytes / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
            )
        return has_memory

    def finish_if_written(self) -> None:
        """Publishes the checkpoint that is being written, if all ranks have written their parts; does not wait."""
        if self._pending is not None and not self.world.any(not self._pending[2].done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, and publishes it under its name.

        Raises `InputError` if the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        if self._pending is None:
            return
        step, content, written = self._pending
        self._pending = None
        files, failure = {}, None
        try:
            files = written.result()
            if self.background:
                del written
                trim_memory()  # the copy
        except (OSError, SafetensorError) as error:
            failure = self._explain(step, error)
        # Every rank learns of a failure before rank 0 publishes: a checkpoint that lacks a shard must not get its name.
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
            # The rename makes it a checkpoint, at once and whole; what was killed before it is a hidden folder.
            os.rename(temporary, final)
            flush_folder(self.folder)
            for old in [*list(checkpoint_steps(self.folder).values())[:-KEPT], *self._half_removed]:
                _remove(old)
            self._half_removed = []
        except (OSError, InputError) as error:
            return self._explain(step, error)
        return None

    def _explain(self, step: int, error: BaseException) -> str:
        path = newest(self.folder)
        last = f"the last whole checkpoint is {path}" if path else "there is no earlier checkpoint"
        why = "the disk is full" if is_disk_full(error) else str(error)
        return f"step {step} could not be saved in {self.folder}: {why}; {last}"


def _remove(checkpoint: Path) -> None:
    """Deletes the files of a checkpoint; other files stay. Without its manifest, deleted first, it is incomplete."""
    for file in [checkpoint / MANIFEST, *checkpoint.glob(_SHARDS)]:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody's own file is in it
        checkpoint.rmdir()


def remove_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of a finished run; other files in `folder` stay."""
    for checkpoint in [*checkpoint_steps(folder).values(), *_half_removed(folder)]:
        _remove(checkpoint)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _rows(tensor: Tensor) -> Tensor:
    """This rank's rows of `tensor`, sharing its memory; a number is one row."""
    mine = local(tensor.detach())
    return mine if mine.dim() else mine.view(1)


def _write(rows: Mapping[str, Tensor], file: Path) -> dict[str, tuple[int, int]]:
    """Writes this rank's rows, if it has any; returns size and CRC-32 of the file by its name."""
    if not rows:
        return {}
    save_file(dict(rows), file)
    widen_access(file, file.parent)
    flush_file(file)
    return {file.name: size_and_crc(file)}


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """Reads a checkpoint, of any number of ranks, into `tensors`, in place; returns its manifest.

    Raises `InputError` if a file is missing or corrupt, or this run would not have written it.
    """
    manifest = read_manifest(path)
    files = sorted(manifest["files"].items())
    # Each rank checks the CRC-32 of some files, so that a large checkpoint is read once in all.
    broken = [path / name for name, about in files[world.rank :: world.size] if not is_whole(path / name, about)]
    remedy = f"remove {path} to resume from an older one"
    world.check_all(f"{broken[0]} is missing or corrupt: {remedy}" if broken else None)
    failure = None
    try:
        _read_rows([path / name for name, _ in files], tensors)
    except (OSError, SafetensorError, ValueError) as error:
        failure = f"{path} does not describe this run ({error}): {remedy}"
    world.check_all(failure)
    for row in manifest["figures"].values():
        row.update({name: math.inf for name, value in row.items() if value is None})  # JSON has no infinity
    return manifest


@torch.no_grad()
def _read_rows(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
    """Reads this rank's rows of every tensor, in place. Raises `ValueError` unless the files hold these tensors."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        held = [(file, set(file.keys())) for file in opened]
        for name, tensor in tensors.items():
            # A file holds the rows of one rank of the run that saved. Of (1536, 576), saved by 4 ranks, 384 rows each,
            # a rank of 2 reads 768 rows from two files.
            mine, first, done = _rows(tensor), own_rows(tensor).start if tensor.dim() else 0, 0
            for part in (file.get_slice(name) for file, names in held if name in names):
                size, *width = part.get_shape()
                # The rows of the file are done to done + size of the whole tensor, ours first to first + len(mine).
                begin, end = max(done, first), min(done + size, first + len(mine))
                if begin < end:
                    rows = part[begin - done : end - done]
                    if rows.dtype != mine.dtype or list(mine.shape[1:]) != width:
                        raise ValueError(f"{name} is {rows.dtype} {width}, not {mine.dtype} {list(mine.shape[1:])}")
                    mine[begin - first : end - first].copy_(rows)
                done += size
            if done != (len(tensor) if tensor.dim() else 1):
                raise ValueError(f"{name} has {done} rows")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `InputError` if it is corrupt or has another format."""
    remedy = f"remove {path} to resume from an older one"
    manifest = read_json_object(path / MANIFEST, remedy)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {manifest.get('format')}, not {FORMAT}: use the castlm that wrote it"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise InputError(f"{path / MANIFEST} is corrupt: its checksum does not match; {remedy}")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest in canonical JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


_BY_CONTENT = {
    "model": "model_fingerprint",
    "dataset": "dataset_sha256",
    "eval_dataset": "eval_sha256",
    "chat_template_path": "chat_template_sha256",
    "teacher": "teacher_fingerprint",
}
"""Options that name files, and the fact that holds the hash of their content."""


def check_same_run(manifest: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Checks that a checkpoint belongs to a run with these options and facts; `InputError` lists every difference.

    All options must match, except for `free_on_resume`. A file may have another name if its hash, one of the facts, is
    the same.
    """
    before = manifest["facts"]
    free = free_on_resume(TrainConfig.sections().values())
    free |= {k for k, fact in _BY_CONTENT.items() if fact in before and before[fact] == facts.get(fact)}
    # Through JSON, as the saved one went: tuples become lists.
    then, given = manifest["config"], json.loads(json.dumps(config))
    saved = {k: v for k, v in then.items() if k not in free} | before
    now = {k: v for k, v in given.items() if k not in free} | dict(facts)
    changed = [f"{k} {saved.get(k)} -> {now.get(k)}" for k in sorted(saved | now) if saved.get(k) != now.get(k)]
    if changed:
        raise InputError(
            f"this is not the run that was saved ({', '.join(changed)}): undo that, or use a new output_dir"
        )


_NO_JOB = "none"  # the default of --rdzv-id; on a single node torchrun generates one instead
_OF_TRACKERS = ("tensorboard", "wandb")


class RunFolder:
    """The folder `output_dir` of a run. Its methods are for the main rank."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)

    @property
    def model(self) -> Path:
        """The folder of the result."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def run_id(self) -> str | None:
        """The id of the run in this folder, as in trackers; None if none has begun."""
        run_id = read_record(self.path / OUTPUT).get("run_id")
        return run_id if isinstance(run_id, str) and run_id.isalnum() else None

    @contextlib.contextmanager
    def begun(self, config_yaml: str, *, resume: bool) -> Iterator[None]:
        """Makes this the folder of a run, and sets an earlier output aside unless `resume`.

        The caller opens trackers inside the context; after an error there, the folders that they made are deleted.

        Args:
            config_yaml: the content of config.yaml, which is written unless the run has saved something.
        """
        has_saved = resume and (self.is_finished() or newest(self.checkpoints) is not None)
        files = {} if has_saved else {"config.yaml": config_yaml}
        earlier_id = self.run_id if resume else None
        begin_output(self.path, "train", files, resume=resume, run_id=earlier_id or secrets.token_hex(8), job=_job())
        made = [name for name in _OF_TRACKERS if not (self.path / name).exists()]
        try:
            yield
        except BaseException:
            for name in made:
                shutil.rmtree(self.path / name, ignore_errors=True)
            raise

    def newest_checkpoint(self, options: Mapping[str, Any]) -> Path | None:
        """The checkpoint to resume from; None if an earlier start has saved nothing yet.

        Raises `InputError` if the earlier start belongs to a run with other `options`.
        """
        checkpoint = newest(self.checkpoints)
        begun = self.path / "config.yaml"
        if checkpoint is None and begun.is_file():
            saved = TrainConfig.from_mapping(read_yaml_mapping(begun), str(begun)).as_dict()
            check_same_run({"config": json.loads(json.dumps(saved)), "facts": {}}, options, {})
        return checkpoint

    def is_finished(self) -> bool:
        """Whether the result exists. It gets its name only when it is complete."""
        return (self.model / RESULT).is_file()

    def finish_again(self, options: Mapping[str, Any], config_yaml: str, world_batch: int) -> Facts:
        """The facts of a finished run, after checking its options and its files.

        The run may have been killed right before its folder was finished.

        Raises:
            InputError: `options` describe another run, or a file of the result is missing or has changed.
        """
        facts_of_result = Facts.read_result(self.model)
        written = facts_of_result.config or {}
        facts = {"save_dtype": written.get("save_dtype"), "world_batch": facts_of_result.world_batch}
        now = {"save_dtype": options["save_dtype"], "world_batch": world_batch}
        check_same_run({"config": written, "facts": facts}, options, now)
        with self.begun(config_yaml, resume=True):
            note(f"{self.model} is finished already")
        return facts_of_result


def _job() -> str | None:
    """The id that torchrun gives this job over all of its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def is_restart(options: CheckpointOptions) -> bool:
    """Whether `torchrun --max-restarts` starts this job again after an earlier start has begun the run.

    Otherwise the folder may hold another run, which the checks of a first start handle. Raises `InputError` for
    `overwrite` with restarts of a job that has no id.
    """
    if options.overwrite and _job() == _NO_JOB and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise InputError(
            "overwrite with --max-restarts: a restart cannot tell this job's run from the one that it replaces; give "
            "torchrun a --rdzv-id that is new for each job"
        )
    record = read_record(RunFolder(options.output_dir).path / OUTPUT)
    has_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return has_restarted and "begun" in record and record.get("job") == _job()


@contextlib.contextmanager
def claimed(options: CheckpointOptions, inputs: Inputs, world: World) -> Iterator[RunFolder]:
    """Locks the output folder of a run for all ranks, which must all see it; yields it.

    Args:
        inputs: the paths that the run reads, by option.
    """
    output = output_folder(
        options.output_dir, "train", overwrite=options.overwrite, resume=options.resume, inputs=inputs
    )
    with world.context_on_main(output):
        folder = RunFolder(options.output_dir)
        check_shared(folder.path, world)
        yield folder


def check_shared(folder: Path, world: World) -> None:
    """Checks that all ranks see the same output folder; `InputError` names the first that does not.

    If each node had its own folder on a local disk, checkpoints would lack the parts of the other nodes.
    """
    if world.mesh is None:
        return
    probe = Path(world.on_main(lambda: tempfile.mkdtemp(prefix=PROBE, dir=folder)))
    deadline = time.monotonic() + world.timeout_s / 10  # NFS may know for a minute that there is no such folder
    while not (is_there := (folder / probe.name).is_dir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = world.gather(is_there)
    world.on_main(probe.rmdir)
    failure = None
    if not all(seen):
        failure = (
            f"rank {seen.index(False)} does not see the output folder {folder} of rank 0: choose an output_dir on a "
            "file system that all ranks share"
        )
    world.check_all(failure)
