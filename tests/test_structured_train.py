"""Structured patterns through the loop: what is masked is cut out, with every kind of decay; bad runs are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.sparsify import prune_
from castlm.export.verify import verify
from castlm.models.io import load_model
from castlm.patterns import parse_pattern
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.runs import small
from tests.slow import slow, slow_but
from tests.tiny import save_tiny


@pytest.mark.parametrize(
    "fields",
    [
        slow({"pattern": "channels:0.5"}),
        slow({"pattern": "heads:0.5", "init_from": "magnitude"}),
        {"pattern": "channels:0.75+2:4", "init_from": "flap"},
        slow({"pattern": "channels:0.5", "method": "finetune"}),
        {"pattern": "heads:0.5+2:4", "method": "ste"},
    ],
)
def test_a_run_ends_in_a_verified_model(fields, llama, text, tmp_path):
    record = train(small(llama, text, tmp_path / "run", max_steps=4, eval_steps=4, **fields))
    folder = tmp_path / "run" / "model"
    assert verify(folder, fields["pattern"]).ok
    assert record["pattern"] == fields["pattern"]
    # measured before the cut, and after it from the disk
    assert record["perplexity"]["pruned"] == pytest.approx(record["proof"]["perplexity_from_disk"], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert record["cut"]["logits_moved"] <= 1e-4
    assert record["num_params"] == model.num_parameters() < load_model(llama).model.num_parameters()


@pytest.mark.parametrize("decay", slow_but(["horizon"], sorted(DECAYS)))
def test_every_decay_trains_channels_that_are_refreshed(decay, llama, text, tmp_path):
    fields = {"decay": decay, "lam": 1.0, "ignore_decay_budget": True, "init_from": "magnitude"}
    config = small(llama, text, tmp_path / "run", max_steps=7, pattern="channels:0.5", **fields)
    record = train(config)
    assert verify(tmp_path / "run" / "model", "channels:0.5").ok
    assert (record["mask"]["largest_masked"] == 0) == (decay == "horizon")
    assert record["mask"]["initial_flip_rate"] >= 0


def test_a_run_may_start_from_a_model_whose_units_are_zero(llama, text, tmp_path):
    pattern = parse_pattern("channels:0.5")
    model = load_model(llama).model
    prune_(model, pattern)
    model.save_pretrained(tmp_path / "zeros")
    load_model(llama).tokenizer.save_pretrained(tmp_path / "zeros")
    config = small(
        llama, text, tmp_path / "run", max_steps=2, pattern="channels:0.5", init_from=str(tmp_path / "zeros")
    )
    train(config.changed(learning_rate=1e-9))
    small_model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    kept = model.model.layers[0].mlp.down_proj.weight.ne(0).any(0)
    expected = model.model.layers[0].mlp.down_proj.weight[:, kept]
    torch.testing.assert_close(small_model.model.layers[0].mlp.down_proj.weight, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"is not heads:0\.5 in"):
        train(config.changed(pattern="heads:0.5", output_dir=str(tmp_path / "other")))


def test_runs_that_could_not_be_exported_are_refused_before_they_train(llama, text, tmp_path):
    gpt2 = str(save_tiny(tmp_path / "gpt2", "opt"))
    for model, fields, reason in (
        (gpt2, {"pattern": "heads:0.5"}, "cannot cut heads out of opt"),
        (llama, {"pattern": "channels:0.5", "left_dense": ("layers.1.mlp.up",)}, "each of the 2 transformer blocks"),
        (llama, {"pattern": "channels:0.5", "init_from": "sparsegpt"}, "neither one of magnitude, flap"),
        (llama, {"pattern": "channels:0.5", "rotate": "values", "init_from": "flap"}, "rotate values"),
        (llama, {"pattern": "heads:0.9"}, "keeps all of 2 units"),
    ):
        with pytest.raises(InputError, match=reason):
            train(small(model, text, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_default_start_of_structured_patterns_is_calibrated():
    config = TrainConfig.of("model", "text", "run", pattern="channels:0.5", calibration_sequences=8)
    assert config.start.init_from == "flap"
    starts = {"heads:0.5": "taylor", "2:4": "sparsegpt"}
    assert {text: config.changed(pattern=text).start.init_from for text in starts} == starts
    assert config.without_effect() == {}
    methods = {"finetune": "flap", "srste": "magnitude"}
    assert {name: config.changed(method=name).start.init_from for name in methods} == methods
