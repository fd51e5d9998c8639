"""The memory plan of `castlm prune` and `quantize`: what it depends on. `benchmarks.prune_memory` measures it."""

import pytest
from transformers import AutoConfig

from castlm.cli import plan as command
from castlm.core.errors import InputError
from castlm.lab.planning.one_shot import plan_one_shot
from castlm.oneshot.options import EFFORTS
from tests.tiny import save_tiny, tiny_model

CONFIG = AutoConfig.for_model(
    "llama",
    hidden_size=64,
    intermediate_size=176,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    vocab_size=256,
)


def test_the_text_is_that_of_castlm_prune_and_more_blocks_cost_no_memory_by_block():
    plan, named = (plan_one_shot(CONFIG, effort=EFFORTS["best"]), plan_one_shot(CONFIG, num_sequences=16, seq_len=2048))
    assert plan.disk == named.disk == 4 * plan_one_shot(CONFIG, effort=EFFORTS["quick"]).disk
    deeper = AutoConfig.for_model(**{**CONFIG.to_dict(), "num_hidden_layers": 30})
    plans = [plan_one_shot(config, num_sequences=4, seq_len=32) for config in (CONFIG, deeper)]
    few, many = (plan.peak - plan.components["process"] for plan in plans)
    assert few == many


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_families_with_other_names_are_planned(tmp_path, family):
    assert plan_one_shot(save_tiny(tmp_path, family), num_sequences=1, seq_len=16).phases["block"] > 0


def test_the_command_prints_the_phases_and_the_peak(llama, capsys):
    arguments = ["--model", llama, "--prune", "--seq-len", "32", "--calibration-sequences", "4"]
    assert command.memory(arguments) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("phase: block", "phase: outside", "peak", "hidden states on disk"))
    assert command.memory([*arguments, "--memory", "model"]) == 0
    assert "phase: verify" in capsys.readouterr().out
    assert command.memory([*arguments[:2], "--quantize", "int8"]) == 0
    assert "hidden states" not in capsys.readouterr().out
    with pytest.raises(InputError, match="--quantize int4"):
        command.memory([*arguments, "--quantize", "int4"])
    with pytest.raises(InputError, match="reconstruct-epochs = -1"):
        command.memory([*arguments, "--reconstruct-epochs", "-1"])
    with pytest.raises(InputError, match="experts is not known"):
        plan_one_shot(tiny_model("mixtral").config, num_sequences=4)
