"""Scores of units and what least squares make of the rest, against formulas written out on one layer."""

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.pattern import NM, Pattern
from castlm.core.sparsify import sparse_linears
from castlm.core.structured import cut
from castlm.oneshot.options import UNIT_SCORES, Refinements
from castlm.oneshot.prune import prune_oneshot_
from castlm.oneshot.units import SCORES, loss_gradients, solve_columns
from tests.tiny import VOCAB_SIZE, tiny_model

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))
NO_REFIT = Refinements(refit_iterations=0)


def mlp_inputs(model):
    """What enters down_proj of block 0, (tokens, channels)."""
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
    return (x.square().mean(0) if score == "wanda" else x.var(0, correction=0)) * down.square().sum(0)


def kept_channels(model, block=0):
    return model.model.layers[block].mlp.down_proj.weight.ne(0).any(0)


def test_the_names_of_the_scores_are_known_without_torch():
    assert tuple(SCORES) == UNIT_SCORES


@pytest.mark.parametrize("score", [name for name in UNIT_SCORES if name != "random"])
def test_the_channels_with_the_highest_score_stay(score):
    model = tiny_model("llama")
    best = expected(score, tiny_model("llama")).argsort(descending=True)[:32]
    prune_oneshot_(model, score, pattern="channels:0.5", calibration=TOKENS, refinements=NO_REFIT)
    assert kept_channels(model).nonzero().flatten().tolist() == sorted(best.tolist())


def test_the_random_choice_depends_on_the_seed_alone():
    kept = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        prune_oneshot_(model, "random", pattern="channels:0.5", seed=seed)
        kept.append(kept_channels(model))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_kept_columns_are_the_least_squares_solution():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 12), torch.randn(5, 12)
    kept = torch.arange(12) % 3 > 0
    new = solve_columns(weight, kept, x.T @ x, damping=0.0)
    solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(new, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["channels:0.5", "heads:0.5", "blocks:8x16:0.5", "channels:0.75+2:4", "heads:0.5+2:4"])
@pytest.mark.parametrize("score", ["flap", "taylor"])
def test_every_pattern_is_pruned_and_least_squares_lower_the_error(text, score):
    errors = []
    for refinements in (NO_REFIT, Refinements()):
        model = tiny_model("llama")
        pattern = Pattern.parse(text).for_model(model)
        report = prune_oneshot_(model, score, pattern=text, calibration=TOKENS, refinements=refinements)
        layers, _ = sparse_linears(model, text)
        for unit in pattern.units(layers):
            assert pattern.unit_violations([layers[name].weight for name in unit]) == 0
        errors.append(sum(layer.error for layer in report.layers if ".layers.0." in layer.name))
        assert {layer.name for layer in report.layers} == set(layers)
    assert 0 < errors[1] < errors[0]


def test_n_of_m_is_solved_in_what_is_left():
    model = tiny_model("llama")
    prune_oneshot_(model, "flap", pattern="channels:0.75+2:4", calibration=TOKENS)
    down = model.model.layers[0].mlp.down_proj.weight
    small = cut(down, kept_channels(model).expand_as(down))
    assert small.shape == (32, 48)
    assert NM(2, 4).violations(small) == 0
    assert torch.equal((small == 0).sum(1), torch.full((32,), 24))


def test_gradients_leave_the_model_as_it_was():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    layers, _ = sparse_linears(model, "channels:0.5")
    found = loss_gradients(model, layers, TOKENS)
    assert found.keys() == layers.keys()
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_what_cannot_be_scored_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"'sparsegpt' does not rank the units of channels:0\.5"):
        prune_oneshot_(model, "sparsegpt", pattern="channels:0.5", calibration=TOKENS)
    with pytest.raises(InputError, match="score flap needs a calibration text"):
        prune_oneshot_(model, "flap", pattern="channels:0.5")
    with pytest.raises(InputError, match=r"only refit_iterations is for channels:0\.5"):
        Refinements(target_asymmetry=0.5).for_solver("flap", Pattern.parse("channels:0.5"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="has NaN or infinity"):
        prune_oneshot_(model, "magnitude", pattern="channels:0.5")
