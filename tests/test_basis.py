"""A change of basis leaves the function of a model as it is, lowers the error of its pruned layers, or does nothing."""

import itertools

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import sparse_linears
from castlm.models.architecture import linearize_, linearize_conv1d_
from castlm.oneshot import axes, basis
from castlm.oneshot.axes import Term, find_permutation, kept_score, learn_rotations, sampled_energies, solved_errors
from castlm.oneshot.basis import Statistic, statistics_of
from castlm.oneshot.families import LAYOUTS, describe
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.options import BasisOptions
from castlm.oneshot.residual import Stream
from castlm.oneshot.solvers import SOLVERS, damped
from castlm.oneshot.source import block_stack
from castlm.oneshot.start import change_basis_, prune_oneshot_
from castlm.oneshot.walk import BlockInputs
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, VOCAB_SIZE, linear_model, tiny_model

WITH_EXPERTS = {"mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}}
WITH_POST_NORMS = {"gemma2": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}}
OVER = WITH_EXPERTS | WITH_POST_NORMS

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


def family_model(family: str, **over):
    model = tiny_model(family, **OVER.get(family, {}) | over)
    linearize_conv1d_(model)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def stream(model):
    """The residual stream behind each block but the last."""
    return model(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states[1:-1]


def distance(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", slow_but(("llama", "gpt2", "mixtral"), [*FAMILIES, *WITH_EXPERTS]))
def test_a_rotated_model_computes_what_it_did_and_its_layers_lose_less(family):
    model = family_model(family)
    before = logits(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate="residual", rotation_iterations=10))
    assert distance(logits(model), before) < 1e-5
    assert report.moved < 1e-5
    by_kind = {change.what: change for change in report.changes}
    assert {"values rotated", "residual stream rotated"} <= by_kind.keys()
    assert all(change.after < change.before and change.num_kept for change in report.changes)


@pytest.mark.parametrize("family", slow_but(("llama", "opt", "gemma2"), [*FAMILIES, *OVER]))
@pytest.mark.parametrize("rotate", ["auto", slow("off")])
def test_the_default_and_permutations_alone_leave_every_family_as_it_computes_and_keep_its_embeddings_tied(
    family, rotate
):
    model = family_model(family)
    tied = model.config.tie_word_embeddings
    before = logits(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate, rotation_iterations=10))
    assert distance(logits(model), before) < 1e-5
    assert any(change.num_kept for change in report.changes)
    assert not report.untied
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("family", slow_but(("opt", "mixtral"), [*FAMILIES, *OVER]))
@pytest.mark.parametrize("rotate", [slow("auto"), "residual"])
def test_the_report_says_in_which_basis_the_residual_stream_is(family, rotate):
    if (family, rotate) == ("gemma2", "residual"):
        pytest.skip("its stream cannot be rotated, see below")
    model = family_model(family)
    before = stream(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate, rotation_iterations=10))
    assert before
    assert rotate == "auto" or report.stream_basis.shape == (model.config.hidden_size,) * 2
    for old, new in zip(before, stream(model)):
        turned = old if report.stream_basis is None else old @ report.stream_basis
        assert distance(turned, new) < 1e-5


NO_LAYOUT_OF_THEIR_OWN = {family for family in LAYOUTS if family.endswith("_vl_text")}


def model_of(family: str):
    model = family_model(family)
    linearize_(model)
    return model


@pytest.mark.parametrize(
    "family", slow_but(("gpt2", "phi3", "qwen3_moe"), sorted(LAYOUTS.keys() - NO_LAYOUT_OF_THEIR_OWN))
)
def test_every_layer_of_a_known_family_reads_or_writes_the_residual_stream(family):
    model = model_of(family)
    wiring = describe(model)
    readers = {matrix.layer for _, matrices in wiring.reads for matrix in matrices}
    writers = {matrix.layer for matrix in wiring.writes}
    layers, _ = sparse_linears(model)
    stacked = {name: {f"{name}.{i}" for i in range(4)} for name in layers if ".experts." in name}
    expected = {part for name in layers for part in stacked.get(name, {name})}
    assert expected <= readers | writers
    assert not readers & writers
    assert all(matrix.weight.shape[1] == 32 for _, matrices in wiring.reads for matrix in matrices)
    assert all(matrix.weight.shape[0] == 32 for matrix in wiring.writes)


BLOCKS = ("apertus", "cohere2", "glm4", "glm4_moe", "nemotron", "olmo2", "phi", "phi3", "qwen2_moe", "starcoder2")


@pytest.mark.parametrize("family", slow_but(("glm4_moe", "olmo2", "phi3"), BLOCKS))
def test_each_way_to_put_a_block_together_computes_the_same_in_a_new_basis(family):
    model = model_of(family)
    before = logits(model)
    rotates = describe(model).rotation_obstacle is None
    options = BasisOptions(rotate="residual" if rotates else "auto", rotation_iterations=3)
    report = change_basis_(model, TOKENS, options)
    assert distance(logits(model), before) < 1e-5
    assert not report.notes
    kept = {change.what for change in report.changes if change.num_kept}
    assert kept == {"values rotated", "MLP neurons permuted"} | ({"residual stream rotated"} if rotates else set())


def test_a_pruned_model_is_closer_to_the_dense_one_in_the_new_basis():
    errors = {}
    for rotate in ("off", "values", "residual"):
        model = family_model("llama")
        options = BasisOptions(rotate=rotate, permute=rotate != "off", rotation_iterations=20)
        report = prune_oneshot_(model, "sparsegpt", calibration=TOKENS, basis=options)
        errors[rotate] = sum(layer.error for layer in report.layers)
    assert errors["residual"] < errors["values"] < errors["off"]


def test_what_a_family_does_not_allow_is_refused_by_name():
    with pytest.raises(InputError, match=r"gemma2"):
        change_basis_(family_model("gemma2"), TOKENS, BasisOptions(rotate="residual"))
    with pytest.raises(InputError, match=r"gpt_neox"):
        change_basis_(tiny_model("gpt_neox"), TOKENS, BasisOptions(rotate="values"))
    model = family_model("llama")
    model.model.norm.weight.data[3] = 0
    with pytest.raises(InputError, match="gain of 0"):
        change_basis_(model, TOKENS, BasisOptions(rotate="residual"))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_oss"])
def test_auto_leaves_an_unknown_family_as_it_is_and_says_so(family):
    model, said = linear_model(family), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = change_basis_(model, TOKENS, say=said.append)
    assert not report.changes
    assert said == report.notes
    assert family in said[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("rotate", ["values", "residual"])
def test_a_change_that_moves_the_outputs_is_undone_and_said(rotate, monkeypatch):
    monkeypatch.setattr(basis, "TOLERANCE", -1.0)  # nothing is within it
    model, said = family_model("gemma"), []
    before = logits(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate, rotation_iterations=5), say=said.append)
    assert distance(logits(model), before) < 1e-5
    assert sum("would move by" in line for line in said) == (
        3 if rotate == "residual" else 2
    )  # two blocks and the stream
    assert not report.untied
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_only_layers_that_are_pruned_count():
    model = family_model("llama")
    only_down = lambda module, fqn: fqn.endswith("down_proj")  # noqa: E731
    report = change_basis_(model, TOKENS, BasisOptions(rotate="off"), filter_fn=only_down)
    assert [change.what for change in report.changes] == ["MLP neurons permuted"]


def test_a_stream_that_no_pruned_layer_reads_is_neither_folded_nor_untied():
    model, said = family_model("gemma"), []
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    writers = lambda module, fqn: fqn.endswith(("o_proj", "down_proj"))  # noqa: E731
    options = BasisOptions(rotate="residual", rotation_iterations=5)
    report = change_basis_(model, TOKENS, options, filter_fn=writers, say=said.append)
    assert any(line.startswith("residual stream: not rotated") for line in said)
    assert not report.untied
    assert report.stream_basis is None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p, before[name])


def test_the_search_finds_the_best_of_all_groupings_of_eight_columns():
    score = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)).square()
    best = max(
        kept_score(score[:, [*group, *(c for c in range(8) if c not in group)]], NM(2, 4))
        for group in itertools.combinations(range(8), 4)
    )
    order = find_permutation(score, NM(2, 4))
    assert sorted(order.tolist()) == list(range(8))
    assert kept_score(score[:, order], NM(2, 4)) == pytest.approx(best)


def test_the_search_in_parts_finds_most_of_the_gain(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    score = (torch.randn(64, 256, generator=generator) * torch.randn(256, generator=generator).exp()).square()
    whole = kept_score(score[:, find_permutation(score, NM(2, 4))], NM(2, 4))
    monkeypatch.setattr(axes, "_MOST_GROUPS", 16)
    order = find_permutation(score, NM(2, 4))
    assert sorted(order.tolist()) == list(range(256))
    start = kept_score(score, NM(2, 4))
    assert kept_score(score[:, order], NM(2, 4)) - start > 0.9 * (whole - start)


def test_learned_rotations_are_rotations_and_can_keep_the_mean():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 16, generator=generator), torch.randn(24, 16, generator=generator)
    hessian = x.T @ x
    term = Term(weight, torch.linalg.inv(damped(hessian, 0.01)), float((weight @ hessian * weight).sum()), "in", (0,))
    for keep_mean in (False, True):
        (rotation,) = learn_rotations([term], 1, 16, NM(2, 4), iterations=30, learning_rate=0.05, keep_mean=keep_mean)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
        if keep_mean:
            torch.testing.assert_close(rotation.sum(0), torch.ones(16), atol=1e-5, rtol=0)
        energies = sampled_energies([weight], hessian)
        turned = Statistic(rotation.T @ hessian @ rotation, x @ rotation)
        assert sampled_energies([weight @ rotation], turned.hessian) == pytest.approx(energies, rel=1e-5)
        [before] = solved_errors([weight], hessian, Statistic(hessian, x).factor(), NM(2, 4), energies)
        [after] = solved_errors([weight @ rotation], turned.hessian, turned.factor(), NM(2, 4), energies)
        assert after < 0.9 * before


@torch.no_grad()
def test_experts_count_among_the_readers_of_the_residual_stream():
    model = family_model("mixtral")
    linearize_(model)
    layers, _ = sparse_linears(model)
    wiring = describe(model)
    stream = Stream(model, wiring, NM(2, 4))
    inputs = BlockInputs(model, block_stack(model, layers)[1], TOKENS)
    inside = {name: layer for name, layer in layers.items() if name.startswith("model.layers.0.")}
    seen: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    entries = see_inputs(inside, inputs, SOLVERS["sparsegpt"], len(TOKENS))
    stream.add_statistics(wiring.blocks[0], statistics_of(entries))
    hook.remove()
    _, of_mlp = stream._readers()
    assert len(of_mlp[1]) == 2 * 4  # gate and up of four experts; the router stays dense
    x = torch.cat(seen[: len(inputs)])
    torch.testing.assert_close(of_mlp[0].hessian, 2 * 2 / len(TOKENS) * x.T @ x, rtol=1e-4, atol=1e-4)  # two a token
