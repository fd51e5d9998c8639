"""Channels and heads are cut out: scores, least squares, configs, logits, and families that are refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import castlm
from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.sparsify import sparse_linears
from castlm.data.calibration import CalibrationText
from castlm.models.io import load_model
from castlm.patterns import parse_pattern
from castlm.structured.cut import TOLERANCE, check_cut, cut_units, without_zero_units
from castlm.structured.prune_units import loss_gradients, solve_columns
from castlm.structured.scores import SCORES
from castlm.structured.units import CHANNELS, HEADS, Units
from castlm.training.config import TrainConfig
from castlm.training.train import train
from tests.runs import record_of, small
from tests.slow import slow
from tests.tiny import VOCAB_SIZE, linear_model, save_tiny, tiny_model

QUICK = ("llama", "gemma2", "gpt2")
"""Families that `make test` tries."""

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


# ---- the text of units


def test_the_text_of_units_parses_back():
    for text in ("channels:0.5", "heads:0.25"):
        assert str(Units.parse(text)) == text
    assert Units.parse("channels:.25") == Units("channels", 0.25)


NO_UNITS = (
    *("channels", "channels:", "channels:1", "channels:1.5", "channels:-0.5", "channels:0.0", "channels:0.5:1"),
    *("heads:half", "heads:0.5 ", "blocks:32x32:0.5", "2:4", "channels:0.75+2:4"),
    *("channels:0.50000", "channels:\u0660.5", "channels:5e-1", "channels:nan"),
)


@pytest.mark.parametrize("text", NO_UNITS)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(InputError) as raised:
        Units.parse(text)
    assert repr(text) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["channels:0.5", "heads:0.5", "channels:0.75+2:4"])
def test_a_pattern_of_units_is_refused_with_the_two_commands(text):
    with pytest.raises(InputError, match=r"castlm cut .* castlm train --method dense .* --teacher") as raised:
        parse_pattern(text)
    assert f"--units {text.partition('+')[0]} " in str(raised.value)
    with pytest.raises(InputError, match="castlm cut"):
        TrainConfig.of("model", "text", "run", pattern=text)
    for command in (["train", "--model=m", "--dataset=t"], ["prune", "--model=m", "--calibration=t"]):
        assert main([*command, "--output-dir=o", f"--pattern={text}"]) == 2


def test_the_number_that_stays_is_the_nearest_to_the_share_and_neither_0_nor_all():
    assert [Units("channels", 0.7).num_kept(number) for number in (1536, 172, 7)] == [1075, 120, 5]
    with pytest.raises(InputError, match="none of 2 units"):
        Units("heads", 0.2).num_kept(2)
    with pytest.raises(InputError, match="all of 4 units"):
        Units("channels", 0.9).num_kept(4)


# ---- scores of units, and least squares on the rest


def mlp_inputs(model):
    """The input of down_proj in block 0, (tokens, channels)."""
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].flatten(0, 1)


def expected(score, model):
    """The score of each channel of block 0."""
    mlp = model.model.layers[0].mlp
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    if score == "magnitude":
        return gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
    if score == "taylor":
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        parts = [(w * w.grad).abs() for w in (gate, up, down)]
        return parts[0].sum(1) + parts[1].sum(1) + parts[2].sum(0)
    x = mlp_inputs(model)
    return x.var(0, correction=0) * down.square().sum(0)


@pytest.mark.parametrize("score", SCORES)
def test_the_channels_with_the_highest_score_stay(score):
    model, plain = tiny_model("llama"), tiny_model("llama")
    best = expected(score, tiny_model("llama")).argsort(descending=True)[:32].sort().values
    small, cut, _ = cut_units(model, "channels:0.5", score, calibration=TOKENS, refits=False)
    assert (cut.before, cut.after) == ({"intermediate_size": 64}, {"intermediate_size": 32})
    for name in ("gate_proj", "up_proj"):
        weights = [each.model.layers[0].mlp.get_submodule(name).weight for each in (small, plain)]
        assert torch.equal(weights[0], weights[1][best])
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight[:, best])


def test_a_kv_head_is_cut_with_its_query_heads():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)  # heads of 8
    plain = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    for each in (model, plain):
        for block in each.model.layers:
            block.self_attn.v_proj.weight.data[16:24] *= 100  # KV head 2, which query heads 4 and 5 read
    small, cut, _ = cut_units(model, "heads:0.25", "magnitude")
    assert cut.after == {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}
    kept = {"q_proj": slice(32, 48), "k_proj": slice(16, 24), "v_proj": slice(16, 24)}
    for name, rows in kept.items():
        dense = plain.model.layers[1].self_attn.get_submodule(name).weight
        assert torch.equal(small.model.layers[1].self_attn.get_submodule(name).weight, dense[rows])
    o = plain.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(small.model.layers[1].self_attn.o_proj.weight, o[:, 32:48])


def test_kept_columns_are_the_least_squares_solution():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 12), torch.randn(5, 12)
    kept = torch.arange(12) % 3 > 0
    new = solve_columns(weight, kept, x.T @ x, damping=0.0)
    solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(new, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("units", ["channels:0.5", slow("heads:0.5")])
@pytest.mark.parametrize("score", ["flap", "taylor"])
def test_least_squares_lower_the_error(units, score):
    reports = [cut_units(tiny_model("llama"), units, score, calibration=TOKENS, refits=refits)[2] for refits in (0, 1)]
    plain, solved = ([layer.error for layer in report.layers if layer.error is not None] for report in reports)
    assert len(plain) == len(solved) == 2  # the output layer of each block
    assert 0 < solved[0] < plain[0]


def test_gradients_are_those_of_a_plain_backward_pass_that_runs_each_block_again():
    model, plain = tiny_model("llama"), tiny_model("llama")
    layers, _ = sparse_linears(model)
    calls = []
    hook = next(iter(layers.values())).register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = loss_gradients(model, layers, CalibrationText(TOKENS))
    hook.remove()
    assert len(calls) == 2
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(torch.equal(gradients[name], plain.get_submodule(name).weight.grad) for name in layers)
    assert all("forward" not in vars(block) for block in model.model.layers)


# ---- the cut


@torch.no_grad()
def difference(one, other):
    """The largest difference of the logits, relative to the largest logit."""
    a, b = one(IDS).logits, other(IDS).logits
    return float((a - b).abs().max() / a.abs().max())


CUTS = [("channels", family) for family in sorted(CHANNELS)] + [("heads", family) for family in sorted(HEADS)]


@pytest.mark.parametrize(("kind", "family"), [case if case[1] in QUICK else slow(*case) for case in CUTS])
def test_units_are_cut_out_and_the_folder_loads_as_it_is(kind, family, tmp_path):
    save_tiny(tmp_path / "dense", family)
    arguments = ["--model", str(tmp_path / "dense"), "--score", "magnitude", "--output-dir", str(tmp_path / "cut")]
    assert main(["cut", *arguments, "--units", f"{kind}:0.5"]) == 0
    model = load_model(str(tmp_path / "dense")).model.eval()  # Seed-OSS has dropout
    num_weights = model.num_parameters()
    small, cut, _ = cut_units(model, f"{kind}:0.5", "magnitude")  # whose lost units are zero in `model` now
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert record_of(tmp_path / "cut")["num_params"] == loaded.num_parameters() < num_weights
    assert difference(model, small.eval()) <= TOLERANCE
    assert difference(small, loaded) <= TOLERANCE
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    if kind == "channels":
        field = CHANNELS[family]
        assert (cut.before, cut.after) == ({field: 64}, {field: 32})
        assert config[field] == getattr(loaded.config, field) == 32
    else:
        heads = {name: config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        assert heads == cut.after
        assert 2 * heads["num_key_value_heads"] == cut.before["num_key_value_heads"]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        *[(family, "heads:0.5") for family in ("gpt2", "opt", "olmo2")],
        *[("phi3", "channels:0.5"), ("mixtral", "channels:0.5")],
    ],
)
def test_families_without_a_config_for_it_are_refused_by_name(family, text):
    with pytest.raises(InputError, match=f"out of {family}"):
        check_cut(linear_model(family), Units.parse(text))


def test_what_no_config_can_describe_is_refused_before_anything_is_changed():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(InputError, match=r"3 of 4 KV heads.*heads:0\.25, heads:0\.5$"):
        check_cut(model, Units("heads", 0.75))  # 32 channels do not divide by 6 heads
    check_cut(model, Units("heads", 0.5))


def test_nan_a_score_without_its_text_and_units_that_are_not_zero_are_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="flap needs a calibration text"):
        cut_units(model, "channels:0.5")
    with pytest.raises(InputError, match="'wanda'"):
        cut_units(model, "channels:0.5", "wanda", calibration=TOKENS)
    with pytest.raises(InputError, match=r"channels:0\.5 out moves the logits"):
        without_zero_units(model, Units("channels", 0.5))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="holds NaN or infinity"):
        cut_units(model, "channels:0.5", "magnitude")


# ---- the command, and training after it


@pytest.fixture
def cut(llama, text):
    """`castlm cut` of a tiny LLaMA; gives the exit code."""
    command = ["cut", "--model", llama, "--calibration", text, "--calibration-sequences", "4", "--seq-len", "32"]
    return lambda out, *arguments: main([*command, "--output-dir", str(out), *arguments])


def test_a_cut_is_trained_on_as_a_dense_model_and_its_result_tells_how_it_was_made(cut, llama, text, tmp_path, capsys):
    assert cut(tmp_path / "cut", "--units", "channels:0.5") == 0
    said = capsys.readouterr().out
    assert "intermediate_size 64 -> 32" in said
    assert f"--method dense --model {tmp_path / 'cut'} --teacher {llama}" in said
    record = record_of(tmp_path / "cut")
    assert (record["method"], record["pattern"]) == ("flap", None)
    assert record["cut"]["logits_moved"] <= TOLERANCE
    options = {"max_steps": 2, "method": "dense", "teacher": llama}
    facts = train(small(str(tmp_path / "cut"), text, tmp_path / "run", **options))
    assert facts.base_model == llama
    assert [step.cut.units for step in facts.earlier] == ["channels:0.5"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.intermediate_size == 32
    train(small(str(tmp_path / "cut"), text, tmp_path / "sparse", max_steps=2))  # and 2:4 fits into it
    card = (tmp_path / "sparse" / "model" / "README.md").read_text()
    assert "Cut to channels:0.5 by FLAP" in card
    assert castlm.verify(tmp_path / "sparse" / "model").ok


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--score", "sparsegpt"], "sparsegpt"),
        (["--units", "heads:0.9"], "all of 2 units"),
        (["--units", "2:4"], "'2:4'"),
    ],
)
def test_castlm_cut_refuses_what_does_not_fit_before_any_work(arguments, named, cut, tmp_path, capsys):
    assert cut(tmp_path / "no", *arguments) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_castlm_cut_says_which_text_is_missing_or_without_effect(llama, tmp_path, capsys):
    command = ["cut", "--model", llama, "--output-dir", str(tmp_path / "no")]
    assert main(command) == 2
    assert "flap needs a calibration text" in capsys.readouterr().err
    assert main([*command, "--score", "magnitude", "--seq-len", "8"]) == 2
    assert "--seq-len" in capsys.readouterr().err
