"""Distillation from another model than the dense one, `teacher`, and from the tokens of a teacher on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.models.io import load_model
from castlm.training import teacher_cache
from castlm.training.config import FinetuneConfig, TrainConfig
from castlm.training.teacher_cache import TeacherCache
from castlm.training.train import train
from castlm.world import World
from tests.refusals import disk_full
from tests.runs import (
    assert_equal_weights,
    begin_run,
    metrics,
    small,
    take_steps,
    teacher_batches,
    train_until,
)
from tests.slow import slow_but
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def wider(tmp_path_factory) -> Path:
    """A larger model with the tokenizer of `llama`, whose vocabulary is padded to more rows."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 272}
    return save_tiny(tmp_path_factory.mktemp("wider"), "llama", seed=3, **sizes)


def run_in(folder: Path, model: str, text: str, teacher: Path, **over: object) -> TrainConfig:
    return small(model, text, folder / "run", teacher=str(teacher), **over)


def test_the_loss_is_the_distance_to_that_model(llama, text, wider, tmp_path):
    run = begin_run(run_in(tmp_path, llama, text, wider))
    assert run.config.teacher.hidden_weight == 0
    batch = next(run.text.loader)
    batch.pop("position_ids")
    loss = run.objective(num_tokens=batch["labels"].numel(), **batch)
    with torch.no_grad():
        theirs = load_model(wider).model(batch["input_ids"]).logits[..., :264].log_softmax(-1)
        ours = run.model(batch["input_ids"]).logits.log_softmax(-1)
    expected = F.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss.kl, expected)
    own = begin_run(small(llama, text, tmp_path / "own", init_from="magnitude"))
    assert run.flops_per_token > own.flops_per_token


def test_a_resumed_run_has_the_same_teacher(llama, text, wider, tmp_path, capsys):
    config = run_in(tmp_path, llama, text, wider, save_steps=2, max_steps=4, init_from="magnitude")
    train(config)
    assert f"teacher: {wider}" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "model" / "castlm.json").read_text())
    assert record["config"]["teacher"] == str(wider)
    assert "distilled from" in (tmp_path / "run" / "model" / "README.md").read_text()

    stopped = config.changed(output_dir=str(tmp_path / "stopped"))
    train_until(stopped, 3)
    other = save_tiny(tmp_path / "other", "llama", seed=4)
    with pytest.raises(InputError, match=r"teacher_fingerprint"):
        train(stopped.changed(resume=True, teacher=str(other)))
    with pytest.raises(InputError, match=r"teacher_fingerprint"):
        train(stopped.changed(resume=True, teacher=None, hidden_weight=0.0))
    moved = shutil.copytree(wider, tmp_path / "moved")
    train(stopped.changed(resume=True, teacher=str(moved)))
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "stopped" / "model")


def test_a_cache_holds_the_tokens_of_that_model(llama, text, wider, tmp_path, lessons):
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 8}
    config = run_in(tmp_path, llama, text, wider, **cache, init_from="magnitude")
    train(config)
    assert len(lessons) == 8
    train(config.changed(output_dir=str(tmp_path / "again")))
    assert len(lessons) == 8
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "again" / "model")


def test_a_sparse_model_is_fine_tuned_towards_the_dense_one(llama, text, tmp_path):
    train(small(llama, text, tmp_path / "run", init_from="magnitude"))
    options = {"eta": 0.5, "hidden_weight": 1.0, "max_steps": 2, "seq_len": 32, "eval_tokens": 256, "save_steps": 0}
    tuned = FinetuneConfig.of(tmp_path / "run" / "model", text, tmp_path / "tuned", teacher=llama, **options)
    assert tuned.is_finetuning
    train(tuned)
    assert all(row["kl"] > 0 and row["hidden"] > 0 for row in metrics(tmp_path / "tuned") if "loss" in row)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"max_position_embeddings": 16}, "16 positions"),
        ({"vocab_size": 250}, "250 logits"),
        ({"num_hidden_layers": 3}, r"hidden_weight 2: .*\(3, 32\)"),
        ({}, "cuts text into other tokens than the model, first '[!\"]'"),
    ],
)
def test_a_model_that_cannot_teach_is_refused_before_any_weights_are_read(
    over, says, llama, text, tmp_path, monkeypatch
):
    teacher = save_tiny(tmp_path / "teacher", "llama", **over)
    if not over:
        tokenizer = json.loads((teacher / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
        (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("castlm.training.trainer.open_dense", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=says):
        train(run_in(tmp_path, llama, text, teacher, hidden_weight=2.0))


# ---- its most probable tokens on disk: a run from them equals the run with the teacher, bit for bit


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


@pytest.fixture
def begun(config):
    """`config` as a kill leaves it that comes after a save of step 5."""
    run = begin_run(config)
    with run.recording():
        take_steps(run, 5)
        run.save()
        run.saver.finish()
    return config


def test_resumed_run_is_the_straight_run_and_covers_it(begun, tmp_path, lessons):
    train(in_folder(begun, tmp_path, "straight", teacher_cache=None, hidden_weight=0.0))
    train(begun.changed(resume=True))
    assert_equal_weights(tmp_path / "straight" / "model", tmp_path / "run" / "model")
    (known,) = (tmp_path / "cache").glob("coverage-*.json")
    assert json.loads(known.read_text()) == {"blocks": 32}


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


def test_damaged_and_changed_blocks_are_written_again(trained, tmp_path, lessons, capsys):
    cut, changed, unsigned = blocks = sorted((tmp_path / "cache" / "blocks").glob("*/*.safetensors"))[:3]
    whole = [block.read_bytes() for block in blocks]
    cut.write_bytes(whole[0][:-5])
    changed.write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    save_file(load_file(unsigned), unsigned)  # without its checksum
    (known,) = (tmp_path / "cache").glob("coverage-*.json")
    known.unlink()
    train(in_folder(trained, tmp_path, "two"))
    assert 1 <= len(lessons) <= 3  # batches
    assert [block.read_bytes() for block in blocks] == whole
    assert capsys.readouterr().err.count("the teacher reads the sequence again") == 3
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "two" / "model")


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


def test_a_full_disk_is_told(config, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "save_file", disk_full)
    with pytest.raises(InputError, match="the disk is full; free some space"):
        train(config)
    assert not list((tmp_path / "cache" / "blocks").glob("*/*"))


def test_what_makes_no_sense_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="set teacher_top_k"):
        config.changed(teacher_top_k=0)
    with pytest.raises(InputError, match="eta > 0"):
        config.changed(eta=0.0)
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError, match="taken"):
        train(config.changed(teacher_cache=str(tmp_path / "taken")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="choose another teacher_cache"):
        TeacherCache(str(tmp_path / "mine"), [], {}, World(0, 1, torch.device("cpu"), None))
