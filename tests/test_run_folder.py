"""The start of a run in a folder: what it continues, what it replaces, and what torchrun starts again."""

import json
import os
from pathlib import Path

import pytest

import castlm.training.train as training
from castlm.core.errors import InputError
from castlm.files.output import output_folder
from castlm.files.record import OUTPUT, command_of, is_empty, record_output
from castlm.training.checkpoint import RunFolder, is_restart
from castlm.training.config import TrainConfig
from tests.refusals import refuse_mkdir
from tests.replaced import killed_at


def config_of(folder: Path, **fields) -> TrainConfig:
    return TrainConfig.of("model", "text.txt", str(folder), **fields)


def begin(config: TrainConfig) -> None:
    with RunFolder(config.checkpoint.output_dir).begun(config.as_yaml(), resume=config.checkpoint.resume):
        pass


def newest(config: TrainConfig) -> Path | None:
    return RunFolder(config.checkpoint.output_dir).newest_checkpoint(config.as_dict())


def finished_run(folder: Path) -> TrainConfig:
    config = config_of(folder)
    with output_folder(folder, "train"):
        begin(config)
        (folder / "metrics.jsonl").write_text("")
        (folder / "model").mkdir()
        (folder / "model" / "castlm.json").write_text(json.dumps({"config": config.as_dict(), "world_batch": 8}))
        record_output(folder / "model", command="result", checksums=True)
    return config


def test_a_first_start_that_is_killed_at_any_moment_is_repeated(tmp_path, monkeypatch):
    for moment in range(0, 40, 3):
        folder = tmp_path / f"run{moment}"
        config = config_of(folder)

        def start(folder: Path = folder, config: TrainConfig = config) -> None:
            with output_folder(folder, "train"):
                begin(config)
                os._exit(0)

        killed_at(moment, start)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        resumes = is_restart(config.checkpoint)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
        assert is_empty(folder) or (command_of(folder) == "train" and resumes), moment
        for resume in {resumes, True}:
            with output_folder(folder, "train", resume=resume):
                again = config.changed(resume=resumes)
                assert newest(again) is None
                begin(again)
                (folder / "metrics.jsonl").touch()


def test_a_start_that_could_not_be_saved_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    """As with a volume mounted at /out: the work of the start lies beside the folder, where a user may not write."""
    (tmp_path / "run").mkdir()
    refuse_mkdir(monkeypatch, tmp_path)
    monkeypatch.setattr("castlm.training.trainer.open_dense", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(InputError, match=r"run\.partial .* choose another"):
        training.train(config_of(tmp_path / "run", device="cpu", learning_rate=3e-4))


def test_a_start_that_has_saved_nothing_is_not_continued_as_another_run(tmp_path):
    begin(config_of(tmp_path / "run"))
    run_id = RunFolder(tmp_path / "run").run_id
    again = config_of(tmp_path / "run", resume=True)
    assert newest(again) is None
    begin(again)
    assert RunFolder(tmp_path / "run").run_id == run_id
    with pytest.raises(InputError, match="seed 0 -> 1"):
        newest(config_of(tmp_path / "run", seed=1, resume=True))
    begin(config_of(tmp_path / "run"))
    assert RunFolder(tmp_path / "run").run_id != run_id  # by which trackers know it


@pytest.mark.parametrize("begins", [False, True])
def test_a_restart_resumes_its_own_job_alone(begins, tmp_path, monkeypatch):
    """The run that is replaced has the same options; the first start is killed before or after it begins its own."""
    finished_run(tmp_path / "run")
    config = config_of(tmp_path / "run", overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    if begins:
        begin(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not is_restart(config.checkpoint)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart(config.checkpoint) == begins
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-3")
    assert not is_restart(config.checkpoint)


def test_overwrite_with_restarts_needs_the_id_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    config = config_of(tmp_path, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert not is_restart(config.checkpoint)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="give torchrun a --rdzv-id"):
        is_restart(config.checkpoint)


def test_a_run_in_the_home_folder_is_all_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with output_folder("~/run", "train") as folder:
        begin(config_of(Path("~/run")))
        assert (folder / "config.yaml").is_file()
        assert RunFolder("~/run").model == folder / "model"


def test_what_can_be_resumed_says_so(tmp_path):
    config = finished_run(tmp_path / "run")
    assert RunFolder(tmp_path / "run").is_finished()
    with output_folder(tmp_path / "run", "train", resume=True):
        facts = RunFolder(tmp_path / "run").finish_again(config.as_dict(), config.as_yaml(), 8)
    assert facts.config["seed"] == config.data.seed
    with pytest.raises(InputError, match="give --resume, --overwrite"), output_folder(tmp_path / "run", "train"):
        pass
    assert json.loads((tmp_path / "run" / OUTPUT).read_text())["complete"]
