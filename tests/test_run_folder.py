"""The start of a run in a folder that holds another: killed or out of room at every moment, nothing is lost."""

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.files.atomic_dir import add_file_list
from castlm.files.output import claimed
from castlm.files.owned import OUTPUT, command_of, foreign_names, is_empty, sha256_file
from castlm.training.checkpoint import checkpoint_steps
from castlm.training.config import TrainConfig
from castlm.training.run_folder import RunFolder, after_restart

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die() -> None:
    os._exit(9)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def config_of(folder: Path, **fields) -> TrainConfig:
    return TrainConfig.of("model", "text.txt", str(folder), **fields)


def finished_run(folder: Path) -> TrainConfig:
    config = config_of(folder)
    for name in ("metrics.jsonl", "checkpoints/step-00000002/manifest.json", "checkpoints/step-00000002/__0_0.distcp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "config.yaml").write_text(config.as_yaml())
    files = {"config.yaml": sha256_file(folder / "config.yaml")}
    (folder / OUTPUT).write_text(json.dumps({"command": "train", "run_id": "abc1", "files": files}))
    (folder / "model").mkdir()
    (folder / "model" / "castlm.json").write_text(json.dumps({"run_id": "abc1", "config": config.as_dict()}))
    add_file_list(folder / "model")
    return config


def tree(folder: Path) -> dict[str, bytes]:
    """What is in a folder, without the temporary files of a killed process."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".tmp-" not in path.name]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def begin(folder: Path, config: TrainConfig, moment: int, action: Callable[[], None]) -> bool:
    """Whether a start came to its end before its file operation `moment`, at which the action happens.

    In a process of its own, because a hook cannot be removed and would slow all tests after it.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    countdown = moment

    def hook(event: str, arguments: tuple) -> None:
        nonlocal countdown
        if countdown < 0 or event not in CHANGES or (event == "open" and not arguments[2] & os.O_CREAT):
            return
        countdown -= 1
        if countdown < 0:
            action()

    try:
        sys.addaudithook(hook)
        with contextlib.suppress(InputError):
            RunFolder(folder).begin(config)
        os._exit(0 if countdown >= 0 else 9)
    finally:
        os._exit(9)


def test_an_overwriting_start_that_is_killed_loses_nothing(tmp_path):
    old = finished_run(tmp_path / "old")
    before, moment, ended = tree(tmp_path / "old"), 0, False
    while not ended:
        folder = tmp_path / f"run{moment}"
        shutil.copytree(tmp_path / "old", folder)
        ended = begin(folder, config_of(folder, seed=1), moment, die)
        assert foreign_names(folder) == [], moment
        with claimed(folder, "train", overwrite=True):
            pass
        run = RunFolder(folder)
        if run.run_id == "abc1":
            assert not ended
            assert run.is_finished()
            run.finished_record(old, 0)
            assert {k: v for k, v in tree(folder).items() if k != ".castlm.lock"} == before, moment
        else:
            assert not run.is_finished()
            aside = folder / "replaced" / "abc1"
            assert {name for name in tree(aside) if name != OUTPUT} >= {"metrics.jsonl", "config.yaml"}
            assert list(checkpoint_steps(aside / "checkpoints")) == [2]
            assert tree(folder / "model") == tree(tmp_path / "old" / "model")
        moment += 1
    assert moment > 10


def test_a_full_disk_leaves_an_overwriting_start_as_it_was(tmp_path):
    finished_run(tmp_path / "old")
    before = tree(tmp_path / "old")
    moment, refused, ended = 0, 0, False
    while not ended:
        folder = tmp_path / f"run{moment}"
        shutil.copytree(tmp_path / "old", folder)
        ended = begin(folder, config_of(folder, seed=1), moment, full)
        if RunFolder(folder).run_id == "abc1":
            refused += 1
            assert tree(folder) == before, moment
            assert not (folder / "replaced").exists()
        moment += 1
    assert refused > 5


def test_a_first_start_that_is_killed_is_repeated(tmp_path, monkeypatch):
    moment, ended = 0, False
    while not ended:
        folder = tmp_path / f"run{moment}"
        config = config_of(folder)
        ended = begin(folder, config, moment, die)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        again = after_restart(config)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
        if folder.is_dir() and not is_empty(folder):
            assert command_of(folder) == "train"
            assert again.checkpoint.overwrite
        with claimed(folder, "train", overwrite=again.checkpoint.overwrite) as claim:
            RunFolder(claim).begin(again)
        assert foreign_names(folder) == [], moment
        moment += 1
    assert moment > 4


def test_a_restart_does_not_resume_the_result_that_its_run_replaces(tmp_path, monkeypatch):
    finished_run(tmp_path)
    config = config_of(tmp_path, seed=1, overwrite=True)
    with claimed(tmp_path, "train", overwrite=True) as claim:
        RunFolder(claim).begin(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = after_restart(config)
    assert again.checkpoint.overwrite
    assert not again.checkpoint.resume


@pytest.mark.parametrize("begins", [False, True])
def test_a_restart_resumes_its_own_job_alone(begins, tmp_path, monkeypatch):
    """The run that is replaced has the same options; the first start is killed before or after it begins its own."""
    finished_run(tmp_path)
    config = config_of(tmp_path, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    if begins:
        RunFolder(tmp_path).begin(config)
        saved = tmp_path / "checkpoints" / "step-00000001"
        saved.mkdir(parents=True)
        (saved / "manifest.json").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = after_restart(config)
    assert (again.checkpoint.resume, again.checkpoint.overwrite) == (begins, not begins)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-3")
    assert after_restart(config) == config


def test_overwrite_with_restarts_needs_the_id_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    config = config_of(tmp_path, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert after_restart(config) == config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="give torchrun a --rdzv-id"):
        after_restart(config)


def test_a_run_in_the_home_folder_is_all_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with claimed("~/run", "train") as claim:
        RunFolder("~/run").begin(config_of(Path("~/run")))
        assert (claim / "config.yaml").is_file()
        assert RunFolder("~/run").model == claim / "model"


def test_what_can_be_resumed_says_so(tmp_path):
    finished_run(tmp_path / "run")
    with pytest.raises(InputError, match="pass resume, overwrite or"), claimed(tmp_path / "run", "train"):
        pass
