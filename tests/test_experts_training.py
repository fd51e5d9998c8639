"""Runs of `castlm train` on models with experts: to zero violations, over ranks, and resumed as straight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from castlm.cli.main import main
from castlm.core.nm import is_nm_sparse
from castlm.core.sparsify import is_sparse_linear
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.ranks import run_ranks
from tests.runs import assert_same_but_for_sums, stop_and_resume
from tests.slow import slow
from tests.tiny import EXPERTS, save_tiny

OPTIONS = {
    "seq_len": 32,
    "eval_tokens": 300,
    "mask_interval": 3,
    "decay_end": 0.5,
    "max_steps": 6,
    "eval_steps": 3,
    "learning_rate": 1e-3,
    "calibration_sequences": 4,
    "rotation_iterations": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(save_tiny(folder / family, family)) for family in EXPERTS}


def config(model: str, text: str, folder: Path, **over) -> TrainConfig:
    over = {"per_device_train_batch_size": 4, "cross_document_attention": "gpt_oss" in model, **over}
    return TrainConfig.of(model, text, str(folder), **{**OPTIONS, **over})


def assert_sparse(folder: Path) -> None:
    model = load_model(folder).model
    layers = [m for name, m in model.named_modules() if is_sparse_linear(m, name)]
    assert len(layers) == 12
    assert sum(layer.weight.dim() == 3 for layer in layers) == 4
    assert all(is_nm_sparse(layer.weight) for layer in layers)
    report = verify(folder)
    assert report.ok
    assert not report.uncounted
    assert report.totals()["left_dense"] == 0


@pytest.mark.slow
def test_castlm_train_makes_the_experts_sparse_and_transformers_loads_the_same_model(models, text, tmp_path, capsys):
    out = tmp_path / "run"
    options = {**OPTIONS, "per_device_train_batch_size": 4}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["train", "--model", models["mixtral"], "--dataset", text, "--output-dir", str(out), *arguments]) == 0
    assert "model.layers.1.mlp.gate.weight (a router of experts)" in capsys.readouterr().err
    assert_sparse(out / "model")
    record = json.loads((out / "model" / "castlm.json").read_text())
    assert record["proof"]["violations"] == 0
    assert record["proof"]["layers"] == 2 * (4 + 3 * 4)
    router = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("mlp.gate", "block_sparse_moe.gate")}
    assert {name for name in record["left_dense"] if "embed" not in name and "lm_head" not in name} <= router
    ids = torch.arange(24).view(1, 24)
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)(ids).logits
    assert torch.equal(theirs, load_model(out / "model").model(ids).logits)


def as_in_one(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert_same_but_for_sums(ours, theirs)


@pytest.mark.parametrize(("family", "ranks"), [("qwen3_moe", 2), slow("gpt_oss", 3)])
def test_ranks_are_one_rank_each_with_its_experts(family, ranks, models, text, tmp_path):
    """4 experts over 2 ranks, and over 3, where the last one holds none; files as one rank writes them."""
    start = {"qwen3_moe": "sparsegpt", "gpt_oss": "magnitude"}[family]
    over = {"init_from": start, "scale_groups": 2, "per_device_train_batch_size": 12 // ranks}
    run_ranks(train, ranks, config(models[family], text, tmp_path / "many", **over), folder=tmp_path)
    train(config(models[family], text, tmp_path / "one", **over | {"per_device_train_batch_size": 12}))
    as_in_one(tmp_path / "one", tmp_path / "many")
    assert_sparse(tmp_path / "many" / "model")


def test_a_resumed_run_is_a_straight_one_bit_for_bit(models, text, tmp_path):
    """With 8-bit moments, whose state has scales beside all that the state of fp32 ones has."""
    straight = config(models["gpt_oss"], text, tmp_path / "straight", save_steps=2, moments="8bit")
    train(straight)
    assert_sparse(stop_and_resume(straight, 5) / "model")
