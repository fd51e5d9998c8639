"""`castlm finetune`: a 2:4 model in, a 2:4 model with the same zeros out, whole or through an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import castlm
from castlm.cli.main import main
from castlm.cli.train import parse_finetune
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.training.config import FinetuneConfig, TrainConfig
from castlm.training.train import train
from castlm.world import is_main_rank
from tests.ranks import run_ranks
from tests.runs import (
    assert_equal_weights,
    assert_same_but_for_sums,
    edit_json,
    prune_to,
    record_of,
    stop_and_resume,
    train_until,
    weights,
)
from tests.runs import small as small_run
from tests.slow import slow
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sparse")
    model = tiny_model("llama")
    castlm.prune_(model)
    model.model.layers[0].mlp.up_proj.weight.data[0, :4] = torch.tensor([1.0, 0, 0, 0])  # one zero more than it needs
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def small(model: str, dataset: str, output_dir: Path, **over: Any) -> FinetuneConfig:
    sizes = {"max_steps": 6, "seq_len": 32, "per_device_train_batch_size": 4, "eval_tokens": 512, "eval_steps": 6}
    fields = {**sizes, "save_steps": 0, "learning_rate": 1e-3, "lora_r": 4}
    return FinetuneConfig.of(model, dataset, str(output_dir), **(fields | over))


@pytest.mark.parametrize(
    ("family", "adapter", "moments"),
    [
        *[("llama", "none", "8bit"), ("llama", "shira", "8bit"), slow("llama", "none", "fp32")],
        *[slow("gpt2", "none", "fp32"), slow("gpt2", "shira", "fp32")],  # whose Conv1D layers are stored (in, out)
    ],
)
def test_every_zero_stays_and_every_layer_is_trained(sparse, text, tmp_path, family, adapter, moments):
    if adapter != "none":
        peft = pytest.importorskip("peft")
    if family == "gpt2":
        sparse = prune_to(tmp_path / "sparse", save_tiny(tmp_path / "dense", "gpt2"))
    facts = train(small(sparse, text, tmp_path / "run", adapter=adapter, moments=moments, weight_decay=0.01))
    folder = tmp_path / "run" / "model"
    report = castlm.verify(folder)
    assert report.ok
    layers = {layer.name for layer in report.sparse_layers}
    before, after = weights(sparse), weights(folder)
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0) or name not in layers, name
        assert torch.equal(after[name], weight) == (adapter != "none" and name not in layers), name
    perplexity = facts.perplexity
    assert set(perplexity.known()) == {"start", "pruned"}
    assert perplexity.pruned < perplexity.start
    assert perplexity.pruned == pytest.approx(facts.proof.perplexity_from_disk, rel=1e-5)
    assert facts.verdict.reason.endswith(f"below the model before fine-tuning ({perplexity.start:,.3f})")
    assert facts.num_params == sum(weight.numel() for weight in before.values())
    assert "Fine-tuned with its zeros kept" in (folder / "README.md").read_text()
    again, _ = parse_finetune([sparse, "--config", str(tmp_path / "run" / "config.yaml"), "--output-dir", "again"])
    assert json.loads(json.dumps(again.as_dict())) == {**record_of(folder)["config"], "output_dir": "again"}
    if adapter == "none":
        return
    assert (
        "Fine-tuned with its zeros kept through an adapter" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    )
    base = castlm.load_model(sparse).model
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").merge_and_unload()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["none", slow("shira")])
def test_a_resumed_run_is_the_straight_one(sparse, text, tmp_path, adapter):
    if adapter != "none":
        pytest.importorskip("peft")
    straight = small(sparse, text, tmp_path / "straight", adapter=adapter, save_steps=2)
    train(straight)
    stop_and_resume(straight, 4)


def test_layers_left_dense_in_the_model_stay_dense(llama, text, tmp_path):
    over = {"left_dense": ("layers.1.mlp.up_proj",), "max_steps": 2, "init_from": "magnitude"}
    train(small_run(llama, text, tmp_path / "cast", **over))
    facts = train(small(str(tmp_path / "cast" / "model"), text, tmp_path / "run", max_steps=2))
    assert "model.layers.1.mlp.up_proj.weight" in facts.left_dense
    assert facts.proof.layers == 13


def test_a_dense_model_is_refused_in_one_line_and_nothing_is_written(llama, text, tmp_path, capsys):
    command = ["finetune", llama, "--dataset", text, "--output-dir", str(tmp_path / "run"), "--seq-len", "32"]
    assert main(command) == 2
    assert f"{llama} is not 2:4 in model.layers.0.self_attn.q_proj" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_what_is_not_fine_tuning_is_refused(sparse, text, tmp_path):
    for over, reason in (
        ({"method": "cast"}, "method cast from init_from"),
        ({"init_from": "sparsegpt"}, "init_from sparsegpt: fine-tuning keeps the mask"),
        ({"lora_r": 0}, "lora_r = 0 is out of range"),
    ):
        with pytest.raises(InputError, match=reason):
            small(sparse, text, tmp_path / "run", **over)
    with pytest.raises(InputError, match="use castlm finetune MODEL"):
        train(TrainConfig.of(sparse, text, str(tmp_path / "run"), method="finetune", adapter="shira", seq_len=32))


@pytest.fixture(scope="module")
def on_two_ranks(sparse, text, tmp_path_factory) -> FinetuneConfig:
    """A run of an adapter on two ranks, with a teacher."""
    pytest.importorskip("peft")
    fields = {"adapter": "shira", "sharding": "replicate", "eta": 0.5, "save_steps": 2}
    config = small(sparse, text, tmp_path_factory.mktemp("two") / "run-2", per_device_train_batch_size=2, **fields)
    run_ranks(train, 2, config, folder=Path(config.checkpoint.output_dir).parent)
    return config


def test_an_adapter_on_two_ranks_is_that_of_one(on_two_ranks, sparse, tmp_path):
    """Each rank has a copy of the model, and the gradients of the adapter are averaged."""
    one_rank = {"output_dir": str(tmp_path / "run-1"), "per_device_train_batch_size": 4, "save_steps": 0}
    run_ranks(train, 1, on_two_ranks.changed(**one_rank), folder=tmp_path)
    runs = {1: tmp_path / "run-1", 2: Path(on_two_ranks.checkpoint.output_dir)}
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(runs[ranks] / part) for ranks in (1, 2))
        assert_same_but_for_sums(one, two)
    before, two = weights(sparse), weights(runs[2] / "model")
    assert all(torch.equal(two[name] == 0, before[name] == 0) for name in before if "proj" in name)
    assert any(not torch.equal(two[name], before[name]) for name in before)
    assert castlm.verify(runs[2] / "model").ok
    records = [record_of(run / "model") for run in runs.values()]
    assert records[1]["perplexity"]["pruned"] == pytest.approx(records[0]["perplexity"]["pruned"], rel=1e-4)
    assert records[1]["num_params"] == records[0]["num_params"]


def test_an_adapter_is_resumed_on_two_ranks_bit_for_bit(on_two_ranks, tmp_path):
    config = on_two_ranks.changed(output_dir=str(tmp_path / "resumed"))
    run_ranks(train_until, 2, config, 4, folder=tmp_path)
    run_ranks(train, 2, config.changed(resume=True), folder=tmp_path)
    assert_equal_weights(Path(on_two_ranks.checkpoint.output_dir) / "model", tmp_path / "resumed" / "model")


def train_sharded_adapter(config: FinetuneConfig) -> None:
    """One rank says why."""
    reason = "sharding full: adapter shira needs the whole model on each rank"
    with pytest.raises((InputError, SystemExit), match=reason if is_main_rank() else "2"):
        train(config)


def test_an_adapter_is_not_sharded(sparse, text, tmp_path):
    config = small(sparse, text, tmp_path / "run", adapter="shira")
    run_ranks(train_sharded_adapter, 2, config, folder=tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_command_line_has_the_options_that_matter(capsys):
    given = ["model", "--dataset", "text", "--output-dir", "run"]
    assert parse_finetune(given)[0].optimizer.learning_rate == 5e-5
    assert parse_finetune([*given, "--adapter", "shira"])[0].optimizer.learning_rate == 5e-4
    config, page = parse_finetune([*given, "--adapter", "shira", "--learning-rate", "1e-5", "--no-report"])
    assert (config.optimizer.learning_rate, config.teacher.eta, config.start.init_from, page) == (
        1e-5,
        0.0,
        "model",
        False,
    )
    for option in ("--decay=none", "--no-permute"):
        assert main(["finetune", *given, option]) == 2
        assert "leave it out, or use castlm train" in capsys.readouterr().err


def test_the_model_of_a_run_and_its_recorded_pattern_are_found(sparse, tmp_path):
    model = tmp_path / "run" / "model"
    shutil.copytree(sparse, model)
    given = [str(tmp_path / "run"), "--dataset", "text", "--output-dir", "out"]
    edit_json(model / "castlm.json", pattern="1:4")
    config, _ = parse_finetune(given)
    assert (config.model.model, config.start.init_from, config.model.pattern) == (str(model), str(model), NM(1, 4))
    assert parse_finetune([*given, "--pattern", "4:8"])[0].model.pattern == NM(4, 8)
    edit_json(model / "castlm.json", pattern="channels:0.5")
    with pytest.raises(InputError, match=r"channels:0\.5"):
        parse_finetune(given)
    with pytest.raises(InputError, match="demo"):
        parse_finetune(["demo", "--dataset", "text", "--output-dir", "out"])


def test_a_packed_model_is_fine_tuned_and_its_folder_can_be_overwritten(sparse, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("castlm.training.trainer.longest_free_group", lambda n, m: 32)  # as on a CPU with AVX-512
    castlm.pack_folder(sparse, tmp_path / "packed")
    over = {"adapter": "shira", "max_steps": 2, "overwrite": True, "report_to": ("none",)}
    pytest.importorskip("peft")
    for _ in range(2):
        train(small(str(tmp_path / "packed"), text, tmp_path / "run", **over))
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["adapter", "model"]
    after, before = weights(tmp_path / "run" / "model"), weights(sparse)
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in before if "proj" in name)
    told = capsys.readouterr().err
    assert "Warning" not in told
    assert "--pattern" not in told  # the model has its pattern
