"""The output folder of a training run: begins it, finds its newest checkpoint, and knows when the run is finished."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.facts import Facts
from castlm.files.output import Inputs, begin_output, output_folder
from castlm.files.record import OUTPUT, PROBE, RESULT
from castlm.files.yaml_file import read_yaml_mapping
from castlm.progress import note
from castlm.training.checkpoint import check_same_run, newest
from castlm.training.config import TrainConfig
from castlm.training.options import CheckpointOptions
from castlm_runtime.reading import read_record, user_path

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
    def text_index(self) -> Path:
        """The places of the documents in .jsonl files, for a restart."""
        return self.path / "text_index"

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
