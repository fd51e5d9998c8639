"""The memory plan of `castlm prune` against the closed form of a LLaMA block, and the limits between its two ways."""

import pytest
from transformers import AutoConfig

from castlm.cli import plan as command
from castlm.core.errors import InputError
from castlm.lab.planning.prune_memory import MALLOC, plan_prune_memory
from castlm.lab.planning.quantize_memory import plan_quantize_memory
from castlm.oneshot.options import NO_REFINEMENTS, BasisOptions, Refinements
from tests.tiny import save_tiny

HIDDEN, NEURONS, KEYS, VOCAB, LAYERS = 64, 176, 32, 256, 3
CONFIG = AutoConfig.for_model(
    "llama",
    hidden_size=HIDDEN,
    intermediate_size=NEURONS,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=LAYERS,
    vocab_size=VOCAB,
)
BLOCK = 2 * HIDDEN**2 + 2 * HIDDEN * KEYS + 3 * HIDDEN * NEURONS + 2 * HIDDEN
PLAIN = {"basis": BasisOptions(rotate="off", permute=False), "refinements": NO_REFINEMENTS}


def test_the_defaults_are_those_of_castlm_prune():
    plan, named = plan_prune_memory(CONFIG), plan_prune_memory(CONFIG, num_sequences=16, seq_len=2048)
    assert plan.disk == named.disk == 4 * plan_prune_memory(CONFIG, effort="quick").disk
    assert plan.components["activations"] == named.components["activations"]


def test_a_block_and_its_statistics_have_the_closed_form():
    plan = plan_prune_memory(CONFIG, num_sequences=4, seq_len=32, **PLAIN)
    assert plan.components["weights"] == 4 * BLOCK
    assert plan.components["statistics"] == 4 * (3 * HIDDEN**2 + NEURONS**2)
    assert plan.components["solver"] == 4 * (4 * HIDDEN * NEURONS + 2 * NEURONS**2)
    assert plan.disk == 2 * 4 * 4 * 32 * HIDDEN
    assert plan.peak == max(plan.phases.values())


def test_the_whole_model_takes_all_blocks_the_text_and_a_second_model():
    block = plan_prune_memory(CONFIG, memory="block", num_sequences=4, seq_len=32, **PLAIN)
    model = plan_prune_memory(CONFIG, memory="model", num_sequences=4, seq_len=32, **PLAIN)
    total = LAYERS * BLOCK + 2 * VOCAB * HIDDEN + HIDDEN
    assert model.components["weights"] == 4 * total
    read_back = 2 * 4 * total + model.components["activations"]  # from fp32 files, which stay mapped
    assert model.phases["verify"] - model.components["process"] == int((4 * total + read_back) * (1 + MALLOC))
    assert model.disk == block.disk == 2 * 4 * 4 * 32 * HIDDEN


def test_only_a_model_in_memory_keeps_the_outputs_of_attention():
    staged = PLAIN | {"refinements": Refinements()}
    block, model = (
        plan_prune_memory(CONFIG, memory=memory, num_sequences=4, seq_len=32, **staged) for memory in ("block", "model")
    )
    outputs = 4 * 4 * 32 * HIDDEN
    assert model.components["attention outputs"] == outputs
    assert "attention outputs" not in block.components
    tensors = [(plan.phases["solve"] - plan.components["process"]) / (1 + MALLOC) for plan in (block, model)]
    beside_weights = [size - plan.components["weights"] for size, plan in zip(tensors, (block, model))]
    assert beside_weights[1] - beside_weights[0] == pytest.approx(outputs, abs=2)


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
    of_sparsegpt = plan_prune_memory(
        CONFIG, num_sequences=4, seq_len=32, refinements=Refinements(staged_statistics=False)
    )
    for phase in ("basis", "statistics"):
        without_process = (plan.phases[phase] - plan.components["process"] for plan in (turned, of_sparsegpt))
        assert len({*without_process}) == 1, phase
    with pytest.raises(InputError, match="magnitude"):
        plan_prune_memory(CONFIG, method="magnitude")


def test_quantizing_holds_a_block_its_statistics_and_the_layers_that_read_one_input():
    total = LAYERS * BLOCK + 2 * VOCAB * HIDDEN + HIDDEN
    plan = plan_quantize_memory(CONFIG, "int4", num_sequences=4, seq_len=32)
    assert plan.components["weights"] == 4 * BLOCK
    assert plan.components["statistics"] == 4 * (3 * HIDDEN**2 + NEURONS**2)
    # gate and up together, and target, updated, codes and errors of them; the mask in bytes; R and U
    gate_up = 5 * 2 * HIDDEN * NEURONS + 2 * HIDDEN * NEURONS // 4 + 2 * HIDDEN**2
    down = 3 * HIDDEN * NEURONS + HIDDEN * NEURONS // 4 + 3 * NEURONS**2
    assert plan.components["rounding"] == 4 * max(gate_up, down)
    assert plan.disk == 2 * 4 * 4 * 32 * HIDDEN
    whole = plan_quantize_memory(CONFIG, "int4", memory="model", seq_len=32)
    assert whole.components["weights"] == 4 * total
    of_round = [each.phases["round"] - each.components["process"] for each in (whole, plan)]  # processes differ
    assert of_round[0] - of_round[1] == pytest.approx(4 * (total - BLOCK) * (1 + MALLOC), abs=2)
    nearest = plan_quantize_memory(CONFIG, "int8")
    assert nearest.phases.keys() == {"round", "finish"}
    packed = plan_quantize_memory(CONFIG, "int8", packed=True)
    of_finish = [each.phases["finish"] - each.components["process"] for each in (packed, nearest)]
    assert of_finish[0] == pytest.approx(2 * of_finish[1], abs=2)  # the table of embeddings as it is written
    assert nearest.components["weights"] == 4 * BLOCK


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
