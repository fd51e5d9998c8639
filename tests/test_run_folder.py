"""The start of a run in a folder: what it continues, what it replaces, and what torchrun starts again."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from castlm.core.errors import InputError
from castlm.files.output import output_folder
from castlm.files.record import OUTPUT, command_of, is_empty, record_output
from castlm.training.config import TrainConfig
from castlm.training.run_folder import RunFolder, after_restart


def config_of(folder: Path, **fields) -> TrainConfig:
    return TrainConfig.of("model", "text.txt", str(folder), **fields)


def begin(config: TrainConfig) -> None:
    with RunFolder(config.checkpoint.output_dir).begun(config):
        pass


def finished_run(folder: Path) -> TrainConfig:
    config = config_of(folder)
    with output_folder(folder, "train"):
        begin(config)
        (folder / "metrics.jsonl").write_text("")
        (folder / "model").mkdir()
        (folder / "model" / "castlm.json").write_text(json.dumps({"config": config.as_dict()}))
        record_output(folder / "model", command="result", checksums=True)
    return config


def test_a_first_start_that_is_killed_at_any_moment_is_repeated(tmp_path, monkeypatch):
    for moment in range(40):
        folder = tmp_path / f"run{moment}"
        config = config_of(folder)
        pid = os.fork()
        if not pid:
            steps = iter(range(moment))

            def hook(event: str, arguments: tuple, steps=steps) -> None:
                if event.startswith(("os.", "open")) and event != "os.kill" and next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            try:
                with output_folder(folder, "train"):
                    begin(config)
                    os._exit(0)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        again = after_restart(config)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
        assert is_empty(folder) or (command_of(folder) == "train" and again.checkpoint.resume), moment
        for resume in {again.checkpoint.resume, True}:
            with output_folder(folder, "train", resume=resume):
                assert RunFolder(folder).newest_checkpoint(again) is None
                begin(again)
                (folder / "metrics.jsonl").touch()


def test_a_start_that_has_saved_nothing_is_not_continued_as_another_run(tmp_path):
    begin(config_of(tmp_path / "run"))
    run_id = RunFolder(tmp_path / "run").run_id
    again = config_of(tmp_path / "run", resume=True)
    assert RunFolder(tmp_path / "run").newest_checkpoint(again) is None
    begin(again)
    assert RunFolder(tmp_path / "run").run_id == run_id
    with pytest.raises(InputError, match="seed 0 -> 1"):
        RunFolder(tmp_path / "run").newest_checkpoint(config_of(tmp_path / "run", seed=1, resume=True))


@pytest.mark.parametrize("begins", [False, True])
def test_a_restart_resumes_its_own_job_alone(begins, tmp_path, monkeypatch):
    """The run that is replaced has the same options; the first start is killed before or after it begins its own."""
    finished_run(tmp_path / "run")
    config = config_of(tmp_path / "run", overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    if begins:
        begin(config)
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
    with output_folder("~/run", "train") as folder:
        begin(config_of(Path("~/run")))
        assert (folder / "config.yaml").is_file()
        assert RunFolder("~/run").model == folder / "model"


def test_what_can_be_resumed_says_so(tmp_path):
    config = finished_run(tmp_path / "run")
    assert RunFolder(tmp_path / "run").is_finished()
    assert RunFolder(tmp_path / "run").finished_record(config, 0)["config"]["seed"] == config.data.seed
    with pytest.raises(InputError, match="pass resume, overwrite or"), output_folder(tmp_path / "run", "train"):
        pass
    assert json.loads((tmp_path / "run" / OUTPUT).read_text())["complete"]
