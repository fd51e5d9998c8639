"""A change of basis leaves the function of a model as it is, lowers the error of its pruned layers, or does nothing."""

import itertools

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import sparse_linears
from castlm.oneshot import axes, basis
from castlm.oneshot.axes import Term, find_permutation, learn_rotations, sampled_energies, solved_errors
from castlm.oneshot.basis import Statistic
from castlm.oneshot.families import LAYOUTS, describe
from castlm.oneshot.methods import change_basis_, prune_oneshot_
from castlm.oneshot.options import EFFORTS, BasisOptions
from castlm.oneshot.solvers import damped
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, VOCAB_SIZE, linear_model, tiny_model

TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def thorough(monkeypatch):
    """More rounds of the searches than users have: the permutations of a tiny random model are hard to find."""
    monkeypatch.setitem(EFFORTS, "best", EFFORTS["best"]._replace(rotation_iterations=10, permute_iterations=20))


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
QUICK = [("auto", family) for family in ("llama", "opt", "gpt2", "gemma2", "mixtral", "glm4_moe", "olmo2", "phi3")]
QUICK += [("off", "llama")]
ORDER_LOSES = ("gemma2",)  # no order of its random values is better than its own
EVERY = itertools.product(("auto", "off"), (*FAMILIES, *OTHERS))


@pytest.mark.parametrize(("rotate", "family"), [*QUICK, *(slow(*case) for case in EVERY if case not in QUICK)])
def test_a_model_computes_the_same_in_the_new_basis_and_its_layers_lose_less(rotate, family, thorough):
    model = linear_model(family)
    outputs, streams = logits(model), stream(model)
    report = change_basis_(model, TOKENS, BasisOptions(rotate=rotate))
    assert distance(logits(model), outputs) < 1e-5
    assert report.moved < 1e-5
    assert not report.notes
    kinds = {"MLP neurons permuted", "values permuted" if rotate == "off" else "values rotated"}
    by_kind = {change.what: change for change in report.changes}
    assert by_kind.keys() == kinds
    kept = {what for what, change in by_kind.items() if change.num_kept}
    assert kept == kinds - ({"values permuted"} if rotate == "off" and family in ORDER_LOSES else set())
    assert all(change.after < change.before for change in by_kind.values() if change.num_kept)
    if "moe" in family or family == "mixtral":
        assert by_kind["MLP neurons permuted"].num_tried > 2  # the experts of each of the two blocks
    for old, new in zip(streams, stream(model), strict=True):
        assert distance(old, new) < 1e-5


NO_LAYOUT_OF_THEIR_OWN = {family for family in LAYOUTS if family.endswith("_vl_text")}


@pytest.mark.parametrize(
    "family", slow_but(("gpt2", "phi3", "qwen3_moe"), sorted(LAYOUTS.keys() - NO_LAYOUT_OF_THEIR_OWN))
)
def test_every_layer_of_a_known_family_but_queries_and_keys_is_on_an_axis_of_its_block(family):
    model = linear_model(family)
    attentions, mlps = [], []
    for block in describe(model):
        attentions.append(block.attention)
        mlps += block.mlps
    readers = [attention.value for attention in attentions] + [part for mlp in mlps for part in mlp.inner]
    writers = [attention.output for attention in attentions] + [mlp.down for mlp in mlps]
    layers, _ = sparse_linears(model)
    stacked = {name: {f"{name}.{i}" for i in range(4)} for name in layers if ".experts." in name}
    expected = {part for name in layers for part in stacked.get(name, {name})}
    others = expected - {matrix.layer for matrix in readers + writers}
    assert all(name.endswith(("q_proj", "k_proj")) for name in others)
    assert all(matrix.weight.shape[1] == 32 for matrix in readers)
    assert all(matrix.weight.shape[0] == 32 for matrix in writers)
    assert all(len(part.weight) == mlp.down.weight.shape[1] for mlp in mlps for part in mlp.inner)
    for attention in attentions:  # as many heads read a KV head as any other
        readers_of = [attention.kv_head_of.count(head) for head in range(attention.num_kv_heads)]
        assert len(set(readers_of)) == 1
        assert readers_of[0] > 0


def test_a_pruned_model_is_closer_to_the_dense_one_in_the_new_basis(users_effort):
    errors = {}
    for rotate in ("off", "values"):
        model = linear_model("llama")
        options = BasisOptions(rotate=rotate, permute=rotate != "off")
        report = prune_oneshot_(model, "sparsegpt", calibration=TOKENS, basis=options)
        errors[rotate] = sum(layer.error for layer in report.layers)
    assert errors["values"] < errors["off"]


def test_what_a_family_does_not_allow_is_refused_by_name():
    with pytest.raises(InputError, match=r"gpt_neox"):
        change_basis_(tiny_model("gpt_neox"), TOKENS, BasisOptions(rotate="values"))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_oss"])
def test_auto_leaves_an_unknown_family_as_it_is_and_says_so(family):
    model, said = linear_model(family), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = change_basis_(model, TOKENS, say=said.append)
    assert not report.changes
    assert said == report.notes
    assert family in said[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_change_that_moves_the_outputs_is_undone_and_said(monkeypatch):
    monkeypatch.setattr(basis, "TOLERANCE", -1.0)  # nothing is within it
    model, said = linear_model("gemma"), []
    before = logits(model)
    report = change_basis_(model, TOKENS, say=said.append)
    assert torch.equal(logits(model), before)
    assert sum("would move by" in line for line in said) == 2  # the blocks
    assert report.moved == 0


def test_the_basis_of_an_opt_that_normalizes_after_its_sublayers_changes_too(thorough):
    model = linear_model("opt", do_layer_norm_before=False)
    before = logits(model)
    report = change_basis_(model, TOKENS)
    assert all(change.num_kept for change in report.changes)
    assert 0 < distance(logits(model), before) < 1e-5


def test_only_layers_that_are_pruned_count():
    model = linear_model("llama")
    only_down = lambda module, fqn: fqn.endswith("down_proj")  # noqa: E731
    report = change_basis_(model, TOKENS, BasisOptions(rotate="off"), filter_fn=only_down)
    assert [change.what for change in report.changes] == ["MLP neurons permuted"]


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
    monkeypatch.setattr(axes, "_MAX_GROUPS", 16)
    order = find_permutation(score, NM(2, 4), rounds=6)
    assert sorted(order.tolist()) == list(range(256))
    start = kept_score(score)
    assert kept_score(score[:, order]) - start > 0.9 * (whole - start)


def test_learned_rotations_are_rotations_in_which_pruning_loses_less():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 16, generator=generator), torch.randn(24, 16, generator=generator)
    hessian = x.T @ x
    term = Term(weight, torch.linalg.inv(damped(hessian, 0.01)), float((weight @ hessian * weight).sum()), "in", (0,))
    (rotation,) = learn_rotations([term], 1, 16, NM(2, 4), iterations=30)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
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
