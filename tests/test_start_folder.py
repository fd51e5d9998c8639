"""A run that starts from a model folder takes that model, in whatever basis it is written."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from castlm.core.errors import InputError
from castlm.models.io import load_model
from castlm.oneshot.folder import StartFolder
from castlm.training import start
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.faults import train_as_a_command
from tests.ranks import said, start_ranks, wait_ranks
from tests.runs import (
    assert_equal_weights,
    begin_run,
    edit_weights,
    killed_in,
    metrics,
    prune_to,
    small,
    stop_and_resume,
)
from tests.slow import slow
from tests.tiny import save_tiny


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2 * 16).view(2, 16)).logits


@pytest.fixture(scope="module")
def rotated(llama, text, tmp_path_factory) -> str:
    """`llama` at 2:4, its values rotated."""
    return prune_to(tmp_path_factory.mktemp("rotated") / "pruned", llama, text, rotate="values")


def assert_starts_from(given: str, model: str, text: str, folder: Path) -> None:
    run = begin_run(small(model, text, folder, init_from=given))
    torch.testing.assert_close(logits(run.model), logits(load_model(given).model))
    assert all(torch.equal(weight != 0, mask) for weight, mask in run.method.masks().items())


def test_a_pruned_model_in_this_or_another_basis_is_where_the_run_starts(sparse, rotated, llama, text, tmp_path):
    assert_starts_from(sparse, llama, text, tmp_path / "plain")
    assert_starts_from(rotated, llama, text, tmp_path / "turned")


@pytest.mark.parametrize("family", ["gemma", slow("qwen2")], ids=["tied embeddings", "biases"])
def test_a_model_with_tied_embeddings_or_biases_is_where_the_run_starts_too(family, text, tmp_path):
    model = str(save_tiny(tmp_path / "dense", family))
    given = prune_to(tmp_path / "pruned", model, text)
    assert_starts_from(given, model, text, tmp_path / "run")


def test_a_model_far_from_the_dense_one_is_no_start_where_hidden_states_are_compared(rotated, llama, text, tmp_path):
    """Such as one whose residual stream another program has rotated."""
    given = tmp_path / "far"
    shutil.copytree(rotated, given)
    edit_weights(given, lambda weights: weights["model.embed_tokens.weight"].neg_())
    with pytest.raises(InputError, match=r"far: its embeddings .*hidden_weight 0"):
        begin_run(small(llama, text, tmp_path / "run", init_from=str(given)))
    begin_run(small(llama, text, tmp_path / "run", init_from=str(given), hidden_weight=0.0))


def test_the_result_of_a_run_is_where_the_next_one_starts(llama, text, tmp_path):
    """With its embeddings and norms, which training has moved."""
    train(small(llama, text, tmp_path / "first", learning_rate=1e-2))
    given = str(tmp_path / "first" / "model")
    run = begin_run(small(llama, text, tmp_path / "second", init_from=given))
    torch.testing.assert_close(logits(run.model), logits(load_model(given).model))


def test_a_run_from_a_folder_in_another_basis_resumes_exactly(rotated, llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", init_from=rotated, max_steps=4, save_steps=2)
    train(config)
    stop_and_resume(config, 3)


def test_a_given_model_whose_files_cannot_be_read_by_rows_is_copied_once(rotated, llama, text, tmp_path, monkeypatch):
    config = small(llama, text, tmp_path / "run", init_from=rotated)
    train(config)
    monkeypatch.setattr(start, "open_sharded", lambda *_, **__: None)
    other = config.changed(output_dir=str(tmp_path / "other"))
    begin_run(other)
    assert (tmp_path / "other.partial" / "copy.safetensors").is_file()
    train(other)
    assert not (tmp_path / "other.partial").exists()
    assert_equal_weights(tmp_path / "run" / "model", tmp_path / "other" / "model")


def train_without_a_whole_model(config: TrainConfig) -> int:
    start.load_model = None  # what a rank that reads the whole model would call
    return train_as_a_command(config)


def test_two_ranks_start_from_a_folder_in_another_basis_and_read_their_own_rows(rotated, llama, text, tmp_path):
    """A folder of another pattern is refused by all."""
    one, two = (small(llama, text, tmp_path / name, init_from=rotated, device="cpu") for name in ("one", "two"))
    train(one)
    halves = two.changed(per_device_train_batch_size=2)
    for config, codes in ((halves, [0, 0]), (halves.changed(pattern="1:4", output_dir=str(tmp_path / "no")), [2, 2])):
        ranks = start_ranks(train_without_a_whole_model, 2, config, log=tmp_path / "log")
        assert wait_ranks(ranks, 240) == codes, said(tmp_path / "log", 2)
    assert "is not 1:4 in model.layers." in said(tmp_path / "log", 2)
    rows = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


def test_masked_weights_without_dense_values_in_the_given_basis_are_refused(rotated, llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", init_from=rotated, decay="proportional")
    with pytest.raises(InputError, match=r"another basis .*values rotated"):
        begin_run(config)


@pytest.mark.parametrize(
    ("moment", "decay"),
    [
        ("write_block", "horizon"),
        slow("record", "proportional"),
        slow("record", "horizon"),
        slow("write_block", "proportional"),
    ],
)
def test_a_run_killed_in_its_start_continues_to_the_same_result(moment, decay, llama, text, tmp_path):
    over = {"decay": decay, "init_from": "sparsegpt", "ignore_decay_budget": True}
    train(small(llama, text, tmp_path / "straight", **over))
    with killed_in(StartFolder, moment, call=2):
        train(small(llama, text, tmp_path / "run", **over))
    assert json.loads((tmp_path / "run.partial" / "progress.json").read_text())["done"] == 1
    train(small(llama, text, tmp_path / "run", **over))
    assert_equal_weights(tmp_path / "straight" / "model", tmp_path / "run" / "model")
    assert not (tmp_path / "run.partial").exists()


def test_ctrl_c_in_the_start_names_the_folder_where_it_continues(llama, text, tmp_path, monkeypatch, capsys):
    record = StartFolder.record

    def stopped(self, *args, **more):
        record(self, *args, **more)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StartFolder, "record", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(small(llama, text, tmp_path / "run", init_from="sparsegpt"))
    assert f"{tmp_path}/run.partial: the same command continues" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.partial" / "progress.json").read_text())["done"] == 1
