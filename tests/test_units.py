"""Scores of units and what least squares make of the rest, against formulas written out on one layer."""

import json

import pytest
import torch

from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import sparse_linears
from castlm.oneshot.options import Refinements
from castlm.oneshot.start import prune_oneshot_
from castlm.patterns import parse_pattern
from castlm.structured.pattern import SCORED_BY, left_of
from castlm.structured.prune import UnitAccumulator, loss_gradients, solve_columns
from tests.tiny import TEXT, VOCAB_SIZE, save_tiny, tiny_model

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))
NO_REFIT = Refinements(refit_iterations=0)


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


def test_the_variance_of_a_column_with_a_large_mean_is_that_of_the_column():
    x = 1000 + 0.1 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    accumulator = UnitAccumulator()
    statistic = accumulator.zeros(x)
    for part in x.split(1000):
        accumulator.add(statistic, part, 1)
    torch.testing.assert_close(statistic.variance, x.double().var(0, correction=0).float(), rtol=1e-4, atol=0)


def kept_channels(model, block=0):
    return model.model.layers[block].mlp.down_proj.weight.ne(0).any(0)


@pytest.mark.parametrize("score", SCORED_BY)
def test_the_channels_with_the_highest_score_stay(score):
    model = tiny_model("llama")
    best = expected(score, tiny_model("llama")).argsort(descending=True)[:32]
    prune_oneshot_(model, score, pattern="channels:0.5", calibration=TOKENS, refinements=NO_REFIT)
    assert kept_channels(model).nonzero().flatten().tolist() == sorted(best.tolist())


def test_kept_columns_are_the_least_squares_solution():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 12), torch.randn(5, 12)
    kept = torch.arange(12) % 3 > 0
    new = solve_columns(weight, kept, x.T @ x, damping=0.0)
    solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(new, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["channels:0.5", "heads:0.5", "channels:0.75+2:4", "heads:0.5+2:4"])
@pytest.mark.parametrize("score", ["flap", "taylor"])
def test_every_pattern_is_pruned_and_least_squares_lower_the_error(text, score):
    errors = []
    for refinements in (NO_REFIT, Refinements()):
        model = tiny_model("llama")
        pattern = parse_pattern(text).for_model(model)
        report = prune_oneshot_(model, score, pattern=text, calibration=TOKENS, refinements=refinements)
        layers, _ = sparse_linears(model, parse_pattern(text))
        for unit in pattern.joint_layers(layers):
            assert pattern.joint_violations([layers[name].weight for name in unit]) == 0
        errors.append(sum(layer.error for layer in report.layers if ".layers.0." in layer.name))
        assert {layer.name for layer in report.layers} == set(layers)
    assert 0 < errors[1] < errors[0]


def test_n_of_m_is_solved_in_what_is_left():
    model = tiny_model("llama")
    prune_oneshot_(model, "flap", pattern="channels:0.75+2:4", calibration=TOKENS)
    down = model.model.layers[0].mlp.down_proj.weight
    small = left_of(down, kept_channels(model).expand_as(down))
    assert small.shape == (32, 48)
    assert NM(2, 4).violations(small) == 0
    assert torch.equal((small == 0).sum(1), torch.full((32,), 24))


def test_more_damping_than_asked_for_is_said_of_n_of_m_in_what_is_left():
    few = TOKENS[:1, :16]  # too few for a Hessian of full rank
    model = tiny_model("llama")
    report = prune_oneshot_(model, "flap", pattern="channels:0.75+2:4", calibration=few, damping=0.0)
    assert report.raised_damping == dict.fromkeys(sparse_linears(model)[0], 0.01)
    assert "14 of 14 layers took more damping than 0, up to 0.01" in report.notes()
    plain = prune_oneshot_(tiny_model("llama"), "flap", pattern="channels:0.75", calibration=few, damping=0.0)
    assert not plain.raised_damping


def test_gradients_are_those_of_a_plain_backward_pass_that_runs_each_block_again():
    model, plain = tiny_model("llama"), tiny_model("llama")
    layers, _ = sparse_linears(model, parse_pattern("channels:0.5"))
    calls = []
    hook = next(iter(layers.values())).register_forward_pre_hook(lambda *_: calls.append(1))
    found = loss_gradients(model, layers, TOKENS)
    hook.remove()
    assert len(calls) == 2
    plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(torch.equal(found[name], plain.get_submodule(name).weight.grad) for name in layers)
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_gradients_leave_the_model_as_it_was():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    layers, _ = sparse_linears(model, parse_pattern("channels:0.5"))
    found = loss_gradients(model, layers, TOKENS)
    assert found.keys() == layers.keys()
    assert all(p.grad is None for p in model.parameters())
    for layer in layers.values():  # gradients of the caller do not count, and stay
        layer.weight.grad = torch.ones_like(layer.weight)
    again = loss_gradients(model, layers, TOKENS)
    assert all(torch.equal(again[name], gradient) for name, gradient in found.items())
    assert all(bool((layer.weight.grad == 1).all()) for layer in layers.values())
    model.zero_grad()
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_what_cannot_be_scored_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"'sparsegpt' does not rank the units of channels:0\.5"):
        prune_oneshot_(model, "sparsegpt", pattern="channels:0.5", calibration=TOKENS)
    with pytest.raises(InputError, match="score flap needs a calibration text"):
        prune_oneshot_(model, "flap", pattern="channels:0.5")
    with pytest.raises(InputError, match=r"does nothing with channels:0\.5"):
        Refinements(mask_iterations=4).for_solver("flap", parse_pattern("channels:0.5"))
    with pytest.raises(InputError, match="damping = -1 is out of range: it must be between 0 and 1"):
        prune_oneshot_(model, "magnitude", pattern="channels:0.5", damping=-1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="has NaN or infinity"):
        prune_oneshot_(model, "magnitude", pattern="channels:0.5")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    save_tiny(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return folder


def prune(files, out, *arguments):
    calibration = ["--calibration", str(files / "text.txt"), "--num-sequences", "4", "--seq-len", "32"]
    return main(["prune", "--model", str(files / "dense"), "--output-dir", str(out), *calibration, *arguments])


def test_castlm_prune_cuts_and_records_the_score(files, tmp_path, capsys):
    assert prune(files, tmp_path / "out", "--pattern", "channels:0.5") == 0
    record = json.loads((tmp_path / "out" / "castlm.json").read_text())
    assert (record["method"], record["pattern"]) == ("flap", "channels:0.5")
    assert record["cut"]["after"] == {"intermediate_size": 32}
    assert main(["verify", str(tmp_path / "out"), "--base", str(files / "dense")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`intermediate_size` from 64 to 32" in card
    assert "it needs no kernels of its own" in card
    capsys.readouterr()
    for arguments, reason in (
        (["--pattern", "channels:0.5", "--method", "sparsegpt"], "does not rank the units"),
        (["--pattern", "2:4", "--method", "flap"], "there is no one-shot method 'flap'"),
        (["--reconstruct-epochs", "1", "--num-sequences", "1"], "reconstruct_epochs"),
        (["--pattern", "heads:0.9"], "keeps all of 2 units"),
        (["--pattern", "channels:0.5", "--mask-iterations", "4"], "refit_iterations"),
    ):
        assert prune(files, tmp_path / "no", *arguments) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert "rotated" not in said  # no work was done before
        assert not (tmp_path / "no").exists()


def test_what_is_n_of_m_after_the_cut_is_packed_and_quantized(files, tmp_path, capsys):
    assert prune(files, tmp_path / "out", "--pattern", "channels:0.75+2:4", "--method", "flap") == 0
    assert main(["pack", str(tmp_path / "out"), "--output-dir", str(tmp_path / "packed")]) == 0
    assert main(["verify", str(tmp_path / "packed")]) == 0
    assert main(["quantize", str(tmp_path / "out"), "--output-dir", str(tmp_path / "int8")]) == 0
    assert main(["verify", str(tmp_path / "int8")]) == 0
    assert prune(files, tmp_path / "cut", "--pattern", "channels:0.5", "--method", "flap") == 0
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "cut"), "--output-dir", str(tmp_path / "no")]) == 2
    assert "which has no n:m to keep" in capsys.readouterr().err


def test_plans_and_advice_know_the_patterns_or_refuse_them(files, capsys):
    dense = str(files / "dense")
    memory = ["plan", "memory", "--model", dense, "--seq-len", "32", "--pattern"]
    assert main([*memory, "channels:0.5"]) == 0
    assert main([*memory, "channels:0.999"]) == 2
    assert "keeps all of 64 units" in capsys.readouterr().err
    advise = ["advise", dense, "--device", "h100", "--pattern"]
    assert main([*advise, "channels:0.5"]) == 0
    assert "times as fast as those of the whole model" in capsys.readouterr().out
