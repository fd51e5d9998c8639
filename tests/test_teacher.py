"""Distillation from another model than the dense one: `teacher`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.models.io import load_model
from castlm.planning.memory import Settings, plan_memory
from castlm.training import source
from castlm.training.config import FinetuneConfig, TrainConfig
from castlm.training.train import train
from tests.ranks import run_ranks
from tests.runs import (
    assert_equal_weights,
    assert_same_runs_but_for_sums,
    begin_run,
    metrics,
    small,
    train_until,
)
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
    config = run_in(tmp_path, llama, text, wider, save_steps=2, max_steps=4)
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
    config = run_in(tmp_path, llama, text, wider, **cache)
    train(config)
    assert len(lessons) == 8
    train(config.changed(output_dir=str(tmp_path / "again")))
    assert len(lessons) == 8
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "again" / "model")
    with pytest.raises(InputError, match=r"another teacher .weights"):
        train(config.changed(output_dir=str(tmp_path / "own"), teacher=None))


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
    monkeypatch.setattr("castlm.training.source.open_source", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=says):
        train(run_in(tmp_path, llama, text, teacher, hidden_weight=2.0))


def test_memory_of_a_larger_teacher(llama, wider):
    run = Settings(seq_len=32, micro_batch=4, hidden_states=False)
    own, other = (plan_memory(llama, run, teacher=teacher, world_size=2) for teacher in (None, wider))
    number = sum(parameter.numel() for parameter in load_model(wider).model.parameters())
    assert other.components["teacher"] == number  # bf16, on two ranks
    assert other.components["gathered weights"] > own.components["gathered weights"]
    assert other.components["weights"] == own.components["weights"]


def train_with_a_whole_teacher(config: TrainConfig) -> None:
    """Trains; the teacher's files cannot be read by rows, as those of GGUF."""
    original = source.open_sharded
    source.open_sharded = lambda name, **options: None if name == config.teacher.teacher else original(name, **options)
    train(config)


@pytest.mark.slow
def test_ranks_have_the_teacher_of_one_rank(llama, text, wider, tmp_path):
    config = run_in(tmp_path, llama, text, wider)
    train(config)
    for name, run in (("rows", train), ("whole", train_with_a_whole_teacher)):
        ranks = config.changed(output_dir=str(tmp_path / name), per_device_train_batch_size=2)
        run_ranks(run, 2, ranks, folder=tmp_path)
        assert_same_runs_but_for_sums(tmp_path / "run" / "model", tmp_path / name / "model")
