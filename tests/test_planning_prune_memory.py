"""The memory plan of `castlm prune`: what it depends on and what it refuses. `benchmarks.prune_memory` measures it."""

import pytest
from transformers import AutoConfig

from castlm.cli import plan as command
from castlm.core.errors import InputError
from castlm.lab.planning.prune_memory import plan_prune_memory
from castlm.oneshot.options import NO_REFINEMENTS, BasisOptions
from tests.tiny import save_tiny

HIDDEN, NEURONS, LAYERS = 64, 176, 3
CONFIG = AutoConfig.for_model(
    "llama",
    hidden_size=HIDDEN,
    intermediate_size=NEURONS,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=LAYERS,
    vocab_size=256,
)
PLAIN = {"basis": BasisOptions(rotate="off", permute=False), "refinements": NO_REFINEMENTS, "effort": "published"}


def test_the_defaults_are_those_of_castlm_prune():
    plan, named = plan_prune_memory(CONFIG), plan_prune_memory(CONFIG, num_sequences=16, seq_len=2048)
    assert plan.disk == named.disk == 4 * plan_prune_memory(CONFIG, effort="quick").disk
    assert plan.components["activations"] == named.components["activations"]


def test_more_blocks_cost_no_memory_by_block():
    deeper = AutoConfig.for_model(**{**CONFIG.to_dict(), "num_hidden_layers": 30})
    plans = [plan_prune_memory(config, num_sequences=4, seq_len=32) for config in (CONFIG, deeper)]
    few, many = (plan.peak - plan.components["process"] for plan in plans)
    assert few == many


def test_wanda_needs_vectors_only_where_the_basis_stays_and_magnitude_has_no_plan():
    plain = plan_prune_memory(CONFIG, method="wanda", num_sequences=4, seq_len=32, **PLAIN)
    assert plain.components["statistics"] == 4 * (3 * HIDDEN + NEURONS)
    turned = plan_prune_memory(CONFIG, method="wanda", num_sequences=4, seq_len=32)
    assert turned.components["statistics"] == plain.components["statistics"]
    of_sparsegpt = plan_prune_memory(CONFIG, num_sequences=4, seq_len=32, effort="quick")
    for phase in ("basis", "statistics"):
        without_process = (plan.phases[phase] - plan.components["process"] for plan in (turned, of_sparsegpt))
        assert len({*without_process}) == 1, phase
    with pytest.raises(InputError, match="magnitude"):
        plan_prune_memory(CONFIG, method="magnitude")


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_families_with_other_names_are_planned(tmp_path, family):
    folder = save_tiny(tmp_path, family)
    assert plan_prune_memory(folder, num_sequences=1, seq_len=16).components["statistics"] > 0


def test_the_command_prints_the_phases_and_the_peak(llama, capsys):
    arguments = ["--model", llama, "--prune", "--seq-len", "32", "--calibration-sequences", "4"]
    assert command.memory(arguments) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("phase: solve", "phase: enter", "peak", "hidden states on disk"))
    assert command.memory([*arguments, "--memory", "model"]) == 0
    assert "phase: verify" in capsys.readouterr().out
    assert command.memory([*arguments, "--reconstruct-epochs", "2"]) == 0
    assert "phase: reconstruction" in capsys.readouterr().out
    assert command.memory([*arguments[:2], "--quantize", "int4"]) == 0
    assert "phase: round" in capsys.readouterr().out
    with pytest.raises(InputError, match="--quantize int4"):
        command.memory([*arguments, "--quantize", "int4"])
    with pytest.raises(InputError, match="--quantize FORMAT"):
        command.memory([*arguments, "--packed"])
    with pytest.raises(InputError, match="reconstruct-epochs = -1"):
        command.memory([*arguments, "--reconstruct-epochs", "-1"])
