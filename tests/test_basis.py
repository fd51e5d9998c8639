"""A change of basis leaves the function of a model as it is, lowers the error of its pruned layers, or does nothing."""

import itertools

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import sparse_linears
from castlm.oneshot import axes, basis
from castlm.oneshot.axes import Term, find_permutation, learn_rotations, sampled_energies, solved_errors
from castlm.oneshot.basis import Statistic, statistics_of
from castlm.oneshot.families import LAYOUTS, describe
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.options import BasisOptions
from castlm.oneshot.residual import Stream
from castlm.oneshot.solvers import SOLVERS, damped
from castlm.oneshot.source import block_stack
from castlm.oneshot.walk import BlockInputs
from castlm.starts import change_basis_, prune_oneshot_
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, VOCAB_SIZE, linear_model, tiny_model

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def stream(model):
    """The residual stream behind each block but the last."""
    return model(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states[1:-1]


def distance(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


# gemma2 has a norm behind each sublayer; the others put a block together in ways of their own
OTHERS = ("gemma2", "mixtral", "apertus", "cohere2", "glm4", "glm4_moe", "nemotron")
OTHERS += ("olmo2", "phi", "phi3", "qwen2_moe")
QUICK = [("auto", family) for family in ("opt", "gemma2", "olmo2")]
QUICK += [("residual", family) for family in ("llama", "gpt2", "mixtral", "glm4_moe", "phi3")]
QUICK += [("off", "llama")]
ORDER_LOSES = ("gemma2",)  # no order of its random values is better than its own
EVERY = itertools.product(("auto", "residual", "off"), (*FAMILIES, *OTHERS))


@pytest.mark.parametrize(("rotate", "family"), [*QUICK, *(slow(*case) for case in EVERY if case not in QUICK)])
def test_a_model_computes_the_same_in_the_new_basis_and_its_layers_lose_less(rotate, family):
    model = linear_model(family)
    if rotate == "residual" and describe(model).rotation_obstacle:
        pytest.skip("its stream cannot be rotated, see below")
    outputs, streams, tied = logits(model), stream(model), model.config.tie_word_embeddings
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate, rotation_iterations=10, permute_iterations=20))
    assert distance(logits(model), outputs) < 1e-5
    assert report.moved < 1e-5
    assert not report.notes
    kinds = {"MLP neurons permuted", "values permuted" if rotate == "off" else "values rotated"}
    if rotate == "residual":
        kinds.add("residual stream rotated")
        assert report.stream_basis.shape == (model.config.hidden_size,) * 2
    else:
        assert not report.untied
        assert model.config.tie_word_embeddings == tied
    by_kind = {change.what: change for change in report.changes}
    assert by_kind.keys() == kinds
    kept = {what for what, change in by_kind.items() if change.num_kept}
    assert kept == kinds - ({"values permuted"} if rotate == "off" and family in ORDER_LOSES else set())
    assert all(change.after < change.before for change in by_kind.values() if change.num_kept)
    if "moe" in family or family == "mixtral":
        assert by_kind["MLP neurons permuted"].num_tried > 2  # the experts of each of the two blocks
    for old, new in zip(streams, stream(model), strict=True):
        turned = old if report.stream_basis is None else old @ report.stream_basis
        assert distance(turned, new) < 1e-5


NO_LAYOUT_OF_THEIR_OWN = {family for family in LAYOUTS if family.endswith("_vl_text")}


@pytest.mark.parametrize(
    "family", slow_but(("gpt2", "phi3", "qwen3_moe"), sorted(LAYOUTS.keys() - NO_LAYOUT_OF_THEIR_OWN))
)
def test_every_layer_of_a_known_family_reads_or_writes_the_residual_stream(family):
    model = linear_model(family)
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


def test_a_pruned_model_is_closer_to_the_dense_one_in_the_new_basis():
    errors = {}
    for rotate in ("off", "values", "residual"):
        model = linear_model("llama")
        options = BasisOptions(rotate=rotate, permute=rotate != "off", rotation_iterations=20)
        report = prune_oneshot_(model, "sparsegpt", calibration=TOKENS, basis=options)
        errors[rotate] = sum(layer.error for layer in report.layers)
    assert errors["residual"] < errors["values"] < errors["off"]


def test_what_a_family_does_not_allow_is_refused_by_name():
    with pytest.raises(InputError, match=r"gemma2"):
        change_basis_(linear_model("gemma2"), TOKENS, BasisOptions(rotate="residual"))
    with pytest.raises(InputError, match=r"gpt_neox"):
        change_basis_(tiny_model("gpt_neox"), TOKENS, BasisOptions(rotate="values"))
    model = linear_model("llama")
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
    model, said = linear_model("gemma"), []
    before = logits(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate, rotation_iterations=5), say=said.append)
    assert distance(logits(model), before) < 1e-5
    assert sum("would move by" in line for line in said) == (
        3 if rotate == "residual" else 2
    )  # two blocks and the stream
    assert not report.untied
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_only_layers_that_are_pruned_count():
    model = linear_model("llama")
    only_down = lambda module, fqn: fqn.endswith("down_proj")  # noqa: E731
    report = change_basis_(model, TOKENS, BasisOptions(rotate="off"), filter_fn=only_down)
    assert [change.what for change in report.changes] == ["MLP neurons permuted"]


def test_a_stream_that_no_pruned_layer_reads_is_neither_folded_nor_untied():
    model, said = linear_model("gemma"), []
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


def kept_score(score):
    """The sum of the two largest of each four consecutive columns of a score (rows, columns)."""
    return float((score * NM(2, 4).mask(score)).sum())


def test_the_search_finds_the_best_of_all_groupings_of_eight_columns():
    score = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)).square()
    best = max(
        kept_score(score[:, [*group, *(c for c in range(8) if c not in group)]])
        for group in itertools.combinations(range(8), 4)
    )
    order = find_permutation(score, NM(2, 4), rounds=6)
    assert sorted(order.tolist()) == list(range(8))
    assert kept_score(score[:, order]) == pytest.approx(best)


def test_the_search_in_parts_finds_most_of_the_gain(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    score = (torch.randn(64, 256, generator=generator) * torch.randn(256, generator=generator).exp()).square()
    whole = kept_score(score[:, find_permutation(score, NM(2, 4), rounds=6)])
    monkeypatch.setattr(axes, "_MOST_GROUPS", 16)
    order = find_permutation(score, NM(2, 4), rounds=6)
    assert sorted(order.tolist()) == list(range(256))
    start = kept_score(score)
    assert kept_score(score[:, order]) - start > 0.9 * (whole - start)


def test_learned_rotations_are_rotations_and_can_keep_the_mean():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 16, generator=generator), torch.randn(24, 16, generator=generator)
    hessian = x.T @ x
    term = Term(weight, torch.linalg.inv(damped(hessian, 0.01)), float((weight @ hessian * weight).sum()), "in", (0,))
    for keep_mean in (False, True):
        (rotation,) = learn_rotations([term], 1, 16, NM(2, 4), iterations=30, keep_mean=keep_mean)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
        if keep_mean:
            torch.testing.assert_close(rotation.sum(0), torch.ones(16), atol=1e-5, rtol=0)
        energies = sampled_energies([weight], hessian)
        turned = Statistic(rotation.T @ hessian @ rotation, x @ rotation)
        assert sampled_energies([weight @ rotation], turned.hessian) == pytest.approx(energies, rel=1e-5)
        [before] = solved_errors([weight], hessian, Statistic(hessian, x).factor(), NM(2, 4), energies)
        [after] = solved_errors([weight @ rotation], turned.hessian, turned.factor(), NM(2, 4), energies)
        assert after < 0.9 * before


def test_several_threads_learn_the_same_rotations_in_every_run():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 9 * 64, generator=generator)
    term = Term(weight, torch.eye(9 * 64), float(weight.square().sum()), "in", (0, 0, 0, 1, 1, 1, 2, 2, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (learn_rotations([term], 3, 64, NM(2, 4), iterations=2) for _ in range(30))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@torch.no_grad()
def test_experts_count_among_the_readers_of_the_residual_stream():
    model = linear_model("mixtral")
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
