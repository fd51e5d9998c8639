"""The output folder of a training run: what a start finds there, what an overwrite sets aside, when it is finished.

With `overwrite`, nothing of the earlier run is deleted before the new result is whole. Its model stays in `model/`; its
config, metrics and checkpoints are moved to `replaced/<run_id>/`. When the new model has taken its name, both go. A
killed run that overwrites is resumed like any other: a result belongs to the run whose `run_id` is in its castlm.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.files.atomic_file import atomic_file, atomic_write_json, atomic_write_text, flush_folder, write_flushed
from castlm.files.disk import disk_full_is_said
from castlm.files.output import read_result
from castlm.files.owned import OUTPUT, PROBE, RESULT, command_of, discard, is_of_a_start, is_of_run, read_record
from castlm.files.reading import user_path
from castlm.files.yaml_file import read_yaml_mapping
from castlm.progress import note
from castlm.training.checkpoint import check_same_run, checkpoint_steps, read_manifest
from castlm.training.config import TrainConfig

_ASIDE = "replaced"
_STAYS = (OUTPUT, "model", _ASIDE)  # castlm-output.json is replaced by the new run's
_NO_JOB = "none"  # the default of --rdzv-id; on a single node torchrun generates one instead


class RunFolder:
    """The folder `output_dir` of a run. Its methods are for the main rank."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)

    @property
    def model(self) -> Path:
        """Where the result goes."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def run_id(self) -> str | None:
        """Of the run whose config, metrics and checkpoints are here."""
        found = read_record(self.path / OUTPUT).get("run_id")
        return found if isinstance(found, str) and found.isalnum() else None

    @property
    def job(self) -> str | None:
        """The job of torchrun that has begun this run; None if none has."""
        found = read_record(self.path / OUTPUT).get("job")
        return found if isinstance(found, str) else None

    def begin(self, config: TrainConfig) -> None:
        """Makes this the folder of a new run, and sets aside what an earlier one has left.

        The folder is the new run's from the moment that its record stands. An error or a kill before that leaves the
        record of the earlier run, to which `_undo_interrupted` moves everything back. What takes room is written first.

        Raises:
            InputError: the disk is full.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._undo_interrupted()
        text = config.as_yaml()
        files = {"config.yaml": hashlib.sha256(text.encode()).hexdigest()}
        names = {"command": "train", "run_id": secrets.token_hex(8), "job": _job()}
        record = json.dumps({**names, "files": files}, indent=2)
        try:
            with (
                disk_full_is_said(self.path),
                atomic_file(self.path / "config.yaml") as new_config,  # takes its name after the record has
                atomic_file(self.path / OUTPUT) as new_record,
            ):
                write_flushed(new_config, text)
                write_flushed(new_record, f"{record}\n")
                self._set_aside()
        except BaseException:
            self._undo_interrupted()
            raise
        flush_folder(self.path)

    @contextlib.contextmanager
    def begun(self, config: TrainConfig) -> Iterator[None]:
        """As `begin`; after an error in the block, which may open trackers, the folder is as it was before."""
        record = self.path / OUTPUT
        earlier = record.read_text(encoding="utf-8") if record.is_file() else None
        self.begin(config)
        try:
            yield
        except BaseException:
            for made_by_tracker in ("tensorboard", "wandb"):
                discard(self.path, made_by_tracker)
            (self.path / "config.yaml").unlink(missing_ok=True)
            if earlier is None:
                record.unlink()
            else:
                atomic_write_text(record, earlier)
            self._undo_interrupted()
            raise

    def _set_aside(self) -> None:
        """Moves the earlier run's files to `replaced/<run_id>`, after a copy of its record."""
        left = [entry for entry in self.path.iterdir() if entry.name not in _STAYS and not entry.name.startswith(".")]
        if not left:
            return
        aside = self.path / _ASIDE / (self.run_id or secrets.token_hex(8))
        aside.mkdir(parents=True, exist_ok=True)
        atomic_write_json(aside / OUTPUT, read_record(self.path / OUTPUT))
        for entry in left:
            os.rename(entry, aside / entry.name)
        flush_folder(self.path)

    def _undo_interrupted(self) -> None:
        """Moves back what a start was setting aside when it was killed: the record here is still the earlier run's."""
        aside = self.path / _ASIDE / (self.run_id or "-")
        if aside.is_dir():
            for entry in aside.iterdir():
                if entry.name != OUTPUT and not os.path.lexists(self.path / entry.name):
                    os.rename(entry, self.path / entry.name)
            discard(aside)
        with contextlib.suppress(OSError):  # there is none, or another run's files are set aside too
            aside.parent.rmdir()

    def newest_checkpoint(self, config: TrainConfig) -> Path:
        """The checkpoint to resume from.

        Raises:
            InputError: there is none, or it is of another model or castlm.
        """
        self._undo_interrupted()
        whole = checkpoint_steps(self.checkpoints)
        if not whole:
            raise InputError(f"{self.path} holds no whole checkpoint: start it without resume")
        path = whole[max(whole)]
        model = read_manifest(path)["config"].get("model")
        if model != config.model.model:
            raise InputError(f"{path} is of the model {model}, not {config.model.model}: use that one")
        return path

    def is_finished(self) -> bool:
        """Whether `model/` is the result of the run whose checkpoints are here, and not of one that it replaces."""
        record = read_record(self.model / RESULT)
        return bool(record) and is_of_run(record, self.path)

    def finished_record(self, config: TrainConfig, world_batch: int) -> dict[str, Any]:
        """The record of the finished run, once its config and its files are found to be as they were.

        Raises:
            InputError: `config` describes another run, or a file of the result is missing or has changed.
        """
        self._undo_interrupted()
        record = read_result(self.model)
        batch = record.get("world_batch")
        written = record.get("config", {})
        facts = {"save_dtype": written.get("save_dtype")} | ({} if batch is None else {"world_batch": batch})
        now = {"save_dtype": config.checkpoint.save_dtype} | ({} if batch is None else {"world_batch": world_batch})
        check_same_run({"config": written, "facts": facts}, config.as_dict(), now)
        self.drop_replaced()
        return record

    def drop_replaced(self) -> None:
        """Deletes what was set aside, now that the new result is whole; what castlm did not write stays."""
        folder = self.path / _ASIDE
        for aside in sorted(folder.iterdir()) if folder.is_dir() else ():
            if left := discard(aside):
                note(f"castlm did not write {left[0]!r} in {aside}: it stays there")
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _job() -> str | None:
    """What torchrun calls this job over all of its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def after_restart(config: TrainConfig) -> TrainConfig:
    """`config` as `torchrun --max-restarts` needs it when it starts the ranks again.

    A run that an earlier start of this job has begun is resumed, or started from step 0 where it has saved nothing. The
    folder of another run, which this one may replace, is left to the checks of a first start.

    Raises:
        InputError: `overwrite` with restarts of a job that has no id.
    """
    if config.checkpoint.overwrite and _job() == _NO_JOB and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise InputError(
            "overwrite with --max-restarts: a restart cannot tell this job's run from the one that it replaces; give "
            "torchrun a --rdzv-id that is new for each job"
        )
    if config.checkpoint.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return config
    folder = RunFolder(config.checkpoint.output_dir)
    if folder.job != _job():
        return config
    try:
        begun = TrainConfig.from_mapping(read_yaml_mapping(str(folder.path / "config.yaml")))
    except InputError:
        has_record_alone = command_of(folder.path) == "train" and all(
            entry.name == OUTPUT or is_of_a_start(entry.name) for entry in folder.path.iterdir()
        )
        return config.changed(overwrite=True) if has_record_alone else config
    if not config.is_begun_as(begun):
        return config
    has_saved = bool(checkpoint_steps(folder.checkpoints)) or folder.is_finished()
    return config.changed(resume=has_saved, overwrite=not has_saved)


def check_shared(folder: Path, world: World) -> None:
    """Checks that all ranks see one output folder. Where each node has one on a disk of its own, checkpoints
    would lack the parts of the other nodes.

    Raises:
        InputError: names the first rank that does not see the folder of the main rank.
    """
    if world.mesh is None:
        return
    probe = Path(world.on_main(lambda: tempfile.mkdtemp(prefix=PROBE, dir=folder)))
    deadline = time.monotonic() + world.timeout_s / 10  # NFS may know for a minute that there is no such folder
    while not (is_there := (folder / probe.name).is_dir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = world.gather(is_there)
    world.on_main(probe.rmdir)
    blind = f"rank {found.index(False)} does not see the output folder {folder} of rank 0" if not all(found) else None
    world.check_all(blind and f"{blind}: choose an output_dir on a file system that all ranks share")
