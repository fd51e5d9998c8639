"""The length and the learning rate of a run, and the weight decay of its dense weights."""

import itertools
import json
import math

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.scaling import add_weight_scaling, fold_weight_scaling
from castlm.data.documents import open_documents
from castlm.data.tokens import token_ids
from castlm.distributed.sharding import compile_blocks_, uncompile_blocks_
from castlm.methods.options import SCHEDULES, default_learning_rate
from castlm.models.io import load_model
from castlm.training.config import TrainConfig
from castlm.training.metrics import peak_flops
from castlm.training.train import resolve, train
from castlm.world import init_world
from tests.refusals import refused
from tests.runs import begin_run, metrics, small
from tests.tiny import TEXT, tiny_model


def rates(kind: str, **over) -> list[float]:
    fields = {"max_steps": 100, "learning_rate": 1.0, "warmup_steps": 0.1, "min_lr_ratio": 0.1, **over}
    config = TrainConfig.of("m", "d", "o", lr_scheduler_type=kind, **fields)
    return [config.optimizer.learning_rate_at(step) for step in range(100)] + [config.optimizer.learning_rate_at(100)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_warms_up_and_stays_between_peak_and_end(kind):
    found = rates(kind)
    assert found[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(one >= other - 1e-12 for one, other in itertools.pairwise(found[10:]))
    assert found[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_a_warm_up_is_a_share_of_the_run_or_a_number_of_steps():
    assert rates("cosine", warmup_steps=10) == rates("cosine", warmup_steps=0.1)
    assert rates("cosine", warmup_steps=1)[:2] == pytest.approx([0.5, 1.0])
    with pytest.raises(InputError, match=r"warmup_steps = 1\.5"):
        rates("cosine", warmup_steps=1.5)


def test_schedules_have_the_shape_of_their_name():
    assert rates("linear")[55] == pytest.approx(0.55)
    assert rates("cosine")[55] == pytest.approx(0.55)
    assert rates("cosine")[30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 20 / 90)))
    assert set(rates("constant")[10:]) == {1.0}
    stable = rates("warmup_stable_decay", min_lr_ratio=0.0)
    assert set(stable[10:81]) == {1.0}
    assert stable[90] == pytest.approx(0.5)


def test_weight_decay_is_for_dense_matrices_alone(llama, text, tmp_path):
    run = begin_run(small(llama, text, tmp_path / "run", weight_decay=0.1, init_from="magnitude"))
    groups = run.optimizer.param_groups
    decayed = {run.names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {p for group in groups for p in group["params"]} == set(run.names)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_epochs_are_as_many_steps_as_their_tokens_fill(llama, text, tmp_path):
    config = small(llama, text, tmp_path / "run", eval_dataset=text, max_steps=300, num_train_epochs=2.5)
    tokens = len(token_ids(open_documents(text), load_model(llama).tokenizer))
    found = resolve(config, init_world("cpu", "full")).optimizer
    assert found.max_steps == pytest.approx(2.5 * tokens / (32 * 4), abs=1)
    assert found.num_train_epochs is None
    with pytest.raises(InputError, match="max_steps and num_train_epochs"):
        TrainConfig.of("m", "d", "o", max_steps=10, num_train_epochs=1)


def test_the_default_rate_follows_the_size_of_the_model_and_is_named(llama, text, tmp_path, capsys):
    config = small(llama, text, tmp_path / "run", learning_rate=None, max_steps=1, init_from="magnitude")
    facts = train(config)
    assert facts.config["learning_rate"] == default_learning_rate(facts.num_params) == 3e-3
    assert "learning_rate 0.003, by the size of the model" in capsys.readouterr().err
    rates = [default_learning_rate(round(num)) for num in (135e6, 494e6, 8e9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] < 2e-4


def test_utilization_counts_the_matrices_once_and_needs_a_known_peak(llama, text, tmp_path, monkeypatch):
    run = begin_run(small(llama, text, tmp_path / "run", eta=0.0, init_from="magnitude"))
    config = run.model.config
    linears = sum(m.in_features * m.out_features for m in run.model.modules() if isinstance(m, torch.nn.Linear))
    assert run.flops_per_token == 6 * linears + 12 * config.num_hidden_layers * config.hidden_size * 32
    assert run.peak_flops is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(torch.device("cuda"), "bf16") == 312e12
    for name, peak in {
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA GH200 480GB": 989.4e12,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA A10G": None,
        "NVIDIA RTX A1000": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "fp32") is None
    run.peak_flops = 1e12
    with run.recording():
        run.log(run.train_step())
    row = metrics(tmp_path / "run")[-1]
    assert row["mfu"] == pytest.approx(run.flops_per_token * row["tokens_per_s"] / 1e12)


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_a_cpu_refuses_them(llama, text, tmp_path):
    with pytest.raises(InputError, match="torch_compile"):
        begin_run(small(llama, text, tmp_path / "run", torch_compile=True))
    run = begin_run(small(llama, text, tmp_path / "run"))
    ids = torch.arange(64).view(2, 32)
    eager = run.objective(ids, ids, 64).loss
    graphs = []

    def backend(graph, inputs):  # traced by dynamo, not compiled by inductor
        graphs.append(graph)
        return graph.forward

    compile_blocks_(run.objective, backend=backend)
    compiled = run.objective(ids, ids, 64).loss
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 2  # one for all blocks of the student, which takes gradients, and one for the teacher's


def test_weight_scaling_is_folded_after_compiled_blocks():
    model = tiny_model("llama")
    add_weight_scaling(model, 2)
    compile_blocks_(model, backend="eager")
    layers = [module for module in model.modules() if is_parametrized(module)]
    assert len({type(layer) for layer in layers}) == 1
    uncompile_blocks_(model)
    fold_weight_scaling(model)
    assert all(type(layer) is torch.nn.Linear for layer in layers)


# ------------------------------------------------------------------------------------- the options of other commands


def test_prune_and_verify_take_the_options_of_train(llama, text, tmp_path, capsys):
    base = ["prune", "--model", llama, "--output-dir", str(tmp_path / "out")]
    assert "solver sparsegpt needs a calibration text" in refused(base, capsys)
    assert "revision main is for models of the hub" in refused([*base, "--solver=magnitude", "--revision=main"], capsys)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": TEXT[at : at + 500]}) + "\n" for at in range(0, 8000, 500)))
    wanda = [*base, "--solver", "wanda", "--calibration", str(rows), "--calibration-sequences", "4", "--seq-len", "32"]
    assert "text" in refused(wanda, capsys)  # the default column is not there
    assert main([*wanda, "--column", "body", "--pattern", "4:8"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0  # castlm.json says 4:8
    assert "4:8" in capsys.readouterr().out

    record = json.loads((tmp_path / "out" / "castlm.json").read_text())
    (tmp_path / "out" / "castlm.json").write_text(json.dumps(record | {"pattern": None}))
    assert "names no pattern" in refused(["verify", str(tmp_path / "out")], capsys)


def test_left_dense_that_matches_nothing_is_refused(llama, text, tmp_path):
    with pytest.raises(InputError, match="left_dense dwon"):
        begin_run(small(llama, text, tmp_path / "run", left_dense=("dwon",)))
    run = begin_run(small(llama, text, tmp_path / "run", left_dense=("down_proj",), init_from="magnitude"))
    assert len(run.method.layers) == 12
