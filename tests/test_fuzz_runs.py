"""Start, overwrite, resume and kill in any order, against a model of what must be on the disk afterwards.

A run is killed before one of its operations on files, which is drawn; so every moment of a save, of an overwrite and of
the export is reached sooner or later. `make test` tries a few orders, `make fuzz` new ones.
"""

import hashlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from castlm.files.record import LOCK, check_result, command_of
from castlm.oneshot.folder import partial_folder
from castlm.training.checkpoint import checkpoint_steps, read_manifest
from castlm.training.config import TrainConfig
from tests.faults import train_as_a_command
from tests.fuzzing import EXAMPLES
from tests.ranks import said, start_ranks, wait_ranks
from tests.replaced import die_before
from tests.tiny import TEXT, save_tiny

FOREIGN = ("thesis.txt", "checkpoints/notes.txt", "model/README-mine.md")


def train_and_die(config: TrainConfig, moment: int | None) -> int:
    """Trains; the process kills itself before its `moment`-th operation on the output folder."""
    folder = os.path.realpath(config.checkpoint.output_dir)

    def changes_folder(event: str, arguments: tuple[object, ...]) -> bool:
        reads = event in ("os.listdir", "os.scandir")
        return not reads and any(isinstance(a, (str, os.PathLike)) and folder in str(a) for a in arguments)

    if moment is not None:
        die_before(moment, changes_folder)
    return train_as_a_command(config)


def digest(folder: Path) -> dict[str, str]:
    """The files of a folder, without locks."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != LOCK)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Ground:
    """The inputs of all runs, two configs, and the weights that each ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text.txt").write_text(TEXT)
        save_tiny(folder / "dense")
        sizes = {"max_steps": 4, "save_steps": 1, "seq_len": 32, "per_device_train_batch_size": 2, "eval_tokens": 128}
        config = TrainConfig.of(
            *(str(folder / "dense"), str(folder / "text.txt"), str(folder / "straight-0")),
            **{**sizes, "eval_steps": 4, "calibration_sequences": 2, "device": "cpu"},
        )
        self.configs = [config.changed(seed=seed, output_dir=str(folder / f"straight-{seed}")) for seed in (0, 1)]
        self.weights = []
        for one in self.configs:
            code, text = self.run(one)
            assert code == 0, text
            self.weights.append((Path(one.checkpoint.output_dir) / "model" / "model.safetensors").read_bytes())
        self.inputs = self.digest_of_inputs()

    def digest_of_inputs(self) -> dict[str, str]:
        return digest(self.folder / "dense") | {"text": (self.folder / "text.txt").read_text()}

    def run(self, config: TrainConfig, moment: int | None = None) -> tuple[int | None, str]:
        log = self.folder / f"log-{time.monotonic_ns()}"
        (code,) = wait_ranks(start_ranks(train_and_die, 1, config, moment, log=log), 120)
        return code, said(log, 1)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground(tmp_path_factory.mktemp("runs"))


def machine(ground: Ground) -> type[RuleBasedStateMachine]:
    class Runs(RuleBasedStateMachine):
        """The folder of a run, what a user has put there, and whether a result has ever been in it."""

        @initialize()
        def begin(self) -> None:
            self.folder = Path(tempfile.mkdtemp(dir=ground.folder)) / "out"
            self.foreign: list[str] = []
            self.number_put = 0
            self.had_result = False

        def teardown(self) -> None:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

        @rule(
            which=st.integers(0, 1),
            how=st.sampled_from(["new", "overwrite", "resume"]),
            moment=st.one_of(st.none(), st.integers(0, 400)),
        )
        def start(self, which: int, how: str, moment: int | None) -> None:
            config = ground.configs[which].changed(
                output_dir=str(self.folder), resume=how == "resume", overwrite=how == "overwrite"
            )
            existed = self.folder.is_dir()  # a killed run may leave it empty but for its lock
            before = digest(self.folder) if existed else {}
            has_partial = partial_folder(self.folder).exists()  # of another run, perhaps, which only overwrite drops
            can_resume = how == "resume" and self.newest_checkpoint_is(which)
            code, text = ground.run(config, moment)
            assert code in (0, 2, -signal.SIGKILL), text
            assert "Traceback" not in text
            if code == 0:
                assert self.result_is(which), "exit 0 without the result of the config"
            elif code == 2:
                assert text.count("castlm: error: ") == 1, text
                assert digest(self.folder) == before if self.folder.exists() else not before, text
                assert existed or not self.folder.exists(), text
                assert not can_resume, text
                if how == "new":
                    assert before or has_partial, text
                elif command_of(self.folder) is not None or not before:
                    assert how == "resume", f"overwrite is refused: {text}"

        @precondition(lambda self: self.folder.is_dir())
        @rule(name=st.sampled_from(FOREIGN))
        def put(self, name: str) -> None:
            if (self.folder / name).parent.is_dir() and not (self.folder / name).exists():
                self.number_put += 1
                self.foreign.append(f"{name}, number {self.number_put}")
                (self.folder / name).write_text(self.foreign[-1])

        @invariant()
        def nothing_is_lost(self) -> None:
            if not hasattr(self, "folder"):
                return
            assert ground.digest_of_inputs() == ground.inputs
            names = {Path(name).name for name in FOREIGN}
            left = {file.read_text() for file in self.folder.parent.rglob("*") if file.name in names}
            assert left >= set(self.foreign), "a file of others is gone"
            results = [file.parent for file in self.folder.parent.glob("*/model/castlm.json")]
            assert results or not self.had_result, "the result is gone"
            self.had_result = bool(results)
            for model in results:
                check_result(model)
                assert (model / "model.safetensors").read_bytes() in ground.weights, "the model is of neither config"
            for path in checkpoint_steps(self.folder / "checkpoints").values():
                read_manifest(path)

        def result_is(self, which: int) -> bool:
            file = self.folder / "model" / "model.safetensors"
            return file.is_file() and file.read_bytes() == ground.weights[which]

        def newest_checkpoint_is(self, which: int) -> bool:
            whole = checkpoint_steps(self.folder / "checkpoints")
            return bool(whole) and read_manifest(whole[max(whole)])["config"]["seed"] == which

    return Runs


@pytest.mark.slow
def test_any_order_of_starts_and_kills_loses_nothing(ground):
    run_state_machine_as_test(
        machine(ground), settings=settings(max_examples=1 + EXAMPLES // 10, stateful_step_count=8, deadline=None)
    )
