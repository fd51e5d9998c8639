"""A teacher's top-k tokens on disk: a run from them equals the run with the teacher, bit for bit."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from castlm.core.distill import TopTokens
from castlm.core.errors import InputError
from castlm.distributed.world import World
from castlm.training import teacher_cache
from castlm.training.config import TrainConfig
from castlm.training.teacher_cache import TeacherCache
from castlm.training.train import train
from tests.ranks import run_ranks
from tests.runs import assert_equal_weights, begin_run, metrics, small, teacher_batches
from tests.slow import slow_but
from tests.tiny import save_tiny


def config_in(folder, llama, text) -> TrainConfig:
    cache = {"teacher_top_k": 8, "teacher_cache": str(folder / "cache")}
    return small(llama, text, folder / "run", **cache)


@pytest.fixture
def config(llama, text, tmp_path) -> TrainConfig:
    return config_in(tmp_path, llama, text)


@pytest.fixture(scope="module")
def taught(llama, text, tmp_path_factory) -> Path:
    """The folder of a run in `run`, whose teacher has filled `cache`."""
    folder = tmp_path_factory.mktemp("taught")
    with teacher_batches() as read:
        train(config_in(folder, llama, text))
    assert read == [(4, 32)] * 8
    return folder


@pytest.fixture
def trained(taught, config, tmp_path):
    """`config` after its run, in a copy that the test may change."""
    for name in ("run", "cache"):
        shutil.copytree(taught / name, tmp_path / name)
    return config


def in_folder(config, tmp_path, name, **over):
    return config.changed(output_dir=str(tmp_path / name), **over)


def test_a_run_from_the_cache_is_the_run_of_the_teacher(trained, tmp_path, lessons, capsys):
    train(in_folder(trained, tmp_path, "again"))
    assert not lessons
    assert "no teacher is loaded" in capsys.readouterr().err
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "again" / "model")


def test_another_run_over_the_same_text_needs_no_teacher(trained, tmp_path, lessons):
    shorter = in_folder(trained, tmp_path, "shorter", max_steps=6, learning_rate=3e-3, method="srste")
    run = begin_run(shorter)
    assert run.objective.teacher is None
    longer = begin_run(in_folder(trained, tmp_path, "longer", max_steps=9))
    assert longer.objective.teacher is not None


def test_resumed_run_is_the_straight_run_and_covers_it(config, tmp_path, lessons):
    straight = in_folder(config, tmp_path, "straight", teacher_cache=None, hidden_weight=0.0)
    train(straight)
    run = begin_run(config)
    for _ in range(5):
        run.train_step()
    run.save()
    run.saver.finish()
    train(config.changed(resume=True))
    assert_equal_weights(tmp_path / "straight" / "model", tmp_path / "run" / "model")
    (known,) = (tmp_path / "cache").glob("coverage-*.json")
    assert json.loads(known.read_text()) == {"blocks": 32}


def test_a_run_that_goes_on_with_a_new_cache_covers_nothing(config, tmp_path):
    run = begin_run(config)
    for _ in range(5):
        run.train_step()
    run.save()
    run.saver.finish()
    train(config.changed(resume=True, teacher_cache=str(tmp_path / "other")))
    assert not list((tmp_path / "other").glob("coverage-*.json"))


def test_epochs_that_repeat_are_taught_once(config, tmp_path, lessons):
    (tmp_path / "short.txt").write_text("a few words of a text, \n" * 30)
    train(config.changed(dataset=str(tmp_path / "short.txt"), eval_fraction=0.3, repeat_sequences=True))
    assert 0 < len(lessons) < 8


def test_another_teacher_is_refused(trained, text, tmp_path):
    other = str(save_tiny(tmp_path / "other", "llama", seed=1))
    with pytest.raises(InputError, match=r"another teacher .weights"):
        train(in_folder(trained, tmp_path, "two", model=other))
    with pytest.raises(InputError, match=r"another teacher .top_k 8 -> 4"):
        train(in_folder(trained, tmp_path, "three", teacher_top_k=4))


def test_a_missing_block_stops_a_run_without_a_teacher(trained, tmp_path):
    next((tmp_path / "cache" / "blocks").glob("*/*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"remove .*coverage"):
        train(in_folder(trained, tmp_path, "two"))


def test_a_damaged_block_is_written_again(trained, tmp_path, lessons, capsys):
    block = next((tmp_path / "cache" / "blocks").glob("*/*.safetensors"))
    whole = block.read_bytes()
    block.write_bytes(whole[:-5])
    (known,) = (tmp_path / "cache").glob("coverage-*.json")
    known.unlink()
    train(in_folder(trained, tmp_path, "two"))
    assert len(lessons) == 1
    assert block.read_bytes() == whole
    assert "the teacher reads the sequence again" in capsys.readouterr().err
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "two" / "model")


@pytest.mark.parametrize("change", ["a value", "no checksum"])
def test_a_changed_block_is_not_used(change, tmp_path, capsys):
    cache = TeacherCache(str(tmp_path / "cache"), [], {"weights": "a"}, World(0, 1, torch.device("cpu"), None))
    row = torch.arange(32)
    probabilities = torch.full((32, 8), 0.1).log()
    cache.put(row[None], TopTokens(torch.arange(8, dtype=torch.int32).expand(1, 32, 8), probabilities[None]))
    assert cache.get(row[None]) is not None
    (path,) = (tmp_path / "cache" / "blocks").glob("*/*.safetensors")
    with safe_open(path, "pt") as file:
        metadata, content = file.metadata(), {name: file.get_tensor(name) for name in ("tokens", "log_probs")}
    if change == "a value":
        content["log_probs"][3, 3] -= 0.5
    save_file(content, path, metadata if change == "a value" else None)
    assert cache.get(row[None]) is None
    assert "the teacher reads the sequence again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", slow_but(["{"], ["{", "[]", '{"blocks": "many"}', '{"blocks": -1}', "\xff", "[" * 100_000])
)
def test_corrupt_records_are_named(content, trained, tmp_path):
    (coverage,) = (tmp_path / "cache").glob("coverage-*.json")
    for file in (tmp_path / "cache" / "teacher.json", coverage):
        whole = file.read_text()
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match=file.name if file is coverage or content[0] != "{" else "teacher"):
            train(in_folder(trained, tmp_path, "two", overwrite=True))
        file.write_text(whole)


def test_a_block_is_for_those_who_may_read_the_folder(config, tmp_path):
    train(config.changed(max_steps=1, ignore_decay_budget=True))
    block = next((tmp_path / "cache" / "blocks").glob("*/*.safetensors"))
    assert block.stat().st_mode & 0o666 == block.parent.stat().st_mode & 0o666
    assert sorted(path.suffix for path in block.parent.iterdir()) == [".safetensors"]


def test_a_full_disk_is_told(config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(InputError, match="the disk is full; free some space"):
        train(config)
    assert not list((tmp_path / "cache" / "blocks").glob("*/*"))


def test_what_makes_no_sense_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="set teacher_top_k"):
        config.changed(teacher_top_k=0)
    with pytest.raises(InputError, match="eta > 0"):
        config.changed(eta=0.0)
    with pytest.raises(InputError, match="exceeds the model's 264 tokens"):
        train(config.changed(teacher_top_k=10**6))
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match="taken"):
        train(config.changed(teacher_cache=str(tmp_path / "taken")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="choose another teacher_cache"):
        TeacherCache(str(tmp_path / "mine"), [], {}, World(0, 1, torch.device("cpu"), None))


@pytest.mark.slow
def test_ranks_write_and_read_as_one_rank_does(trained, tmp_path):
    """Two ranks read what one has written, and one rank reads what two have written."""
    ranks = in_folder(trained, tmp_path, "ranks", per_device_train_batch_size=2)
    run_ranks(train, 2, ranks, folder=tmp_path)
    fresh = ranks.changed(output_dir=str(tmp_path / "fresh"), teacher_cache=str(tmp_path / "cache2"))
    run_ranks(train, 2, fresh, folder=tmp_path)
    one = begin_run(in_folder(trained, tmp_path, "one", teacher_cache=fresh.teacher.teacher_cache))
    assert one.objective.teacher is None
    losses = []
    for name in ("run", "ranks", "fresh"):
        rows = metrics(tmp_path / name)
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
