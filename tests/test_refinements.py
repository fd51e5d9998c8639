"""Refinements of SparseGPT: refit, ADMM, staged statistics and block reconstruction."""

import collections
import copy

import pytest
import torch

from castlm.core.cholesky import upper_factor
from castlm.core.errors import InputError
from castlm.core.nm import NM, nm_mask
from castlm.oneshot import ranks as division
from castlm.oneshot import refine
from castlm.oneshot.draw import default_sequences
from castlm.oneshot.methods import applied, prune_oneshot_
from castlm.oneshot.options import EFFORTS, NO_REFINEMENTS, Refinements, with_effort
from castlm.oneshot.refine import FIRST_PENALTY, LAST_PENALTY, Eigenvectors, Inverses, improve_masks, refit
from castlm.oneshot.solvers import damped, whole_hessian
from castlm.oneshot.sparsegpt import sparsegpt, sparsegpt_by_factor
from castlm.oneshot.steps import solve
from castlm.oneshot.steps.reconstruct import reconstruct_
from castlm.world import World
from tests.fused import needs_kernels, threads
from tests.tiny import VOCAB_SIZE, linear_model

OFF = {"mask_iterations": 0, "refit_iterations": 0}
TOKENS = torch.randint(0, VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


def layer(seed: int = 0):
    """Inputs (tokens, 16) and a weight (12, 16)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 16, generator=generator)
    return torch.randn(200, 16, generator=generator) @ mix, torch.randn(12, 16, generator=generator)


@needs_kernels
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 24)])
def test_the_kernel_of_sparsegpt_prunes_like_torch_on_any_number_of_threads(n, m, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 240, generator=generator), torch.randn(330, 240, generator=generator)
    factor, _ = upper_factor(x.T @ x, 0.01)
    few = 5 * m  # columns of one call of the kernel, without torch's products between calls
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(sparsegpt_by_factor(weight[:, :few], factor[:few, :few], n, m))
    assert torch.equal(*found)
    by_kernel = sparsegpt_by_factor(weight, factor, n, m)
    monkeypatch.setattr("castlm.oneshot.sparsegpt.kernel_runs_on", lambda weight, columns: False)
    by_torch = sparsegpt_by_factor(weight, factor, n, m)
    assert torch.equal(by_kernel != 0, by_torch != 0)
    torch.testing.assert_close(by_kernel, by_torch, rtol=1e-4, atol=1e-4)


def test_refit_reaches_least_squares_on_the_kept_weights():
    x, weight = layer()
    hessian = damped(x.T @ x, 0.01)
    pruned, _ = sparsegpt(weight.clone(), (x.T @ x).clone())
    found = refit(pruned, weight, hessian, 40)
    assert torch.equal(found != 0, pruned != 0)
    for row, target in zip(found, weight):
        kept = row != 0
        best = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ target)
        torch.testing.assert_close(row[kept], best, rtol=1e-3, atol=1e-3)


def test_refit_leaves_rows_alone_where_the_hessian_is_singular():
    _, weight = layer()
    pruned = weight * (torch.arange(16) % 4 < 2)
    assert torch.equal(refit(pruned, weight, torch.zeros(16, 16), 20), pruned)


def by_the_letter(weight, target, hessian, iterations):
    """ADMM with a linear system for each iteration, in the coordinates of the inputs."""
    scale = hessian.diagonal().sqrt()
    scaled, sparse, goal = hessian / scale / scale[:, None], weight * scale, target * scale
    dual, last = torch.zeros_like(sparse), None
    for step in range(iterations):
        penalty = FIRST_PENALTY * (LAST_PENALTY / FIRST_PENALTY) ** (step / (iterations - 1))
        dual *= (last or penalty) / penalty
        last = penalty
        system = scaled + penalty * torch.eye(len(scaled), dtype=scaled.dtype)
        dense = torch.linalg.solve(system, goal @ scaled + penalty * (sparse - dual), left=False)
        sparse = torch.where(nm_mask(dense + dual, 2, 4), dense + dual, 0)
        dual += dense - sparse
    return sparse / scale


@pytest.mark.parametrize("system", [Eigenvectors, Inverses])  # a CPU's, and a GPU's
def test_masks_are_those_of_admm_by_the_letter_where_that_is_better(system, monkeypatch):
    monkeypatch.setattr(refine, "system_of", system)
    monkeypatch.setattr(division, "MIN_ROWS", 4)  # three panels
    monkeypatch.setattr(refine, "share_each", lambda world, makers, like: (make() for make in makers))
    improved = 0
    for seed in range(6):
        x, weight = (tensor.double() for tensor in layer(seed))
        hessian = damped(x.T @ x, 0.01)
        start = sparsegpt(weight.clone(), (x.T @ x).clone())[0]
        found = improve_masks(start, weight, hessian, NM(2, 4), 12)
        letter = by_the_letter(start, weight, hessian, 12)
        errors = [((found_ - weight) @ hessian * (found_ - weight)).sum(1) for found_ in (start, letter)]
        expected = torch.where((errors[1] < errors[0])[:, None], letter, start)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert NM(2, 4).violations(found) == 0
        assert not found[found == 0].signbit().any()
        improved += int((errors[1] < errors[0]).sum())
        second = SecondOfTwo(1, 2, torch.device("cpu"), None)
        of_second = improve_masks(start, weight, hessian, NM(2, 4), 12, second)[4:8]  # its only panel
        assert torch.equal(of_second, found[4:8])
    assert improved > 6 * 12 / 2


class SecondOfTwo(World):
    """Rank 1 of two ranks that send nothing."""


def test_an_input_that_is_always_zero_gets_no_place_in_a_better_mask():
    model = linear_model("llama")
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[::4] = 0
        up.weight[:, ::4] = 100.0
    prune_oneshot_(model, "sparsegpt", calibration=TOKENS, refinements=Refinements())
    assert not up.weight[:, ::4].any()
    assert NM(2, 4).violations(up.weight) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_refinement_brings_the_pruned_model_closer_to_the_dense_one(family):
    model = linear_model(family)
    with torch.no_grad():
        dense = model(input_ids=TOKENS, use_cache=False).logits

    def distance(**refinements) -> float:
        pruned = copy.deepcopy(model)
        report = prune_oneshot_(pruned, "sparsegpt", calibration=TOKENS, refinements=Refinements(**OFF | refinements))
        assert report.zero_fraction == 0.5
        with torch.no_grad():
            return float((pruned(input_ids=TOKENS, use_cache=False).logits - dense).square().mean())

    plain, refitted = distance(), distance(refit_iterations=20)
    assert refitted < plain
    assert distance(mask_iterations=16) < refitted
    assert distance(refit_iterations=20, reconstruct_epochs=4) < refitted


def test_staged_statistics_are_those_of_the_layers_pruned_before(monkeypatch):
    seen = {}

    def spy(layers, inputs, solver, num_sequences):
        found = original(layers, inputs, solver, num_sequences)
        if solver is not None:
            seen.update({name: whole_hessian(entry.statistic.clone()) for entry in found for name in entry.names})
        return found

    original = solve.see_inputs
    monkeypatch.setattr(solve, "see_inputs", spy)
    model, name = linear_model("llama"), "model.layers.0.mlp.down_proj"
    prune_oneshot_(model, "sparsegpt", calibration=TOKENS, refinements=Refinements(), effort="best")
    entered = []
    with torch.no_grad(), model.get_submodule(name).register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        model(input_ids=TOKENS, use_cache=False)
    x = entered[0].flatten(0, 1)
    torch.testing.assert_close(seen[name], 2 / len(TOKENS) * x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("epochs", "skipped"), [(0, 2), (1, 1)])
def test_attention_runs_no_more_once_it_is_pruned_until_the_block_is_trained(epochs, skipped):
    model, runs = linear_model("llama"), collections.Counter()
    block = model.model.layers[0]
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj):
        layer.register_forward_hook(lambda layer, *_: runs.update([layer]))
    refinements = Refinements(reconstruct_epochs=epochs)
    prune_oneshot_(model, "sparsegpt", calibration=TOKENS[:2], refinements=refinements, effort="best")
    # The pass for the statistics of `down_proj`; without training, also the one for the outputs of the pruned block.
    assert runs[block.mlp.gate_proj] - runs[block.self_attn.q_proj] == skipped
    assert "forward" not in vars(block.self_attn)


@pytest.mark.parametrize("learning_rate", [1e-2, 10.0])
def test_reconstruction_never_ends_above_where_it_began(learning_rate):
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    dense = copy.deepcopy(block)
    weight = block[0].weight
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.view(-1, 4)[:, :2] = True
    weight.data.mul_(mask)
    mix = torch.randn(6, 16)  # correlated inputs: the kept weights can take over from the masked ones
    inputs = [torch.randn(4, 6) @ mix for _ in range(16)]
    with torch.no_grad():
        targets = [dense(x) for x in inputs]
    report = reconstruct_(
        block, lambda x, _: block(x), inputs, targets, {weight: mask}, epochs=5, learning_rate=learning_rate
    )
    assert report.after <= report.before
    assert not (weight[~mask]).any()
    assert all(p.requires_grad and p.grad is None for p in block.parameters())
    if learning_rate == 10.0:
        assert report.epochs == 1  # the held-out error rose
    else:
        assert report.after < 0.8 * report.before


def test_reconstruction_holds_a_sequence_out_of_a_single_batch():
    torch.manual_seed(0)
    block = torch.nn.Linear(4, 4, bias=False)
    inputs = [torch.zeros(4, 3, 4)]
    inputs[0][1:] = torch.randn(3, 3, 4)
    targets = [torch.randn(4, 3, 4)]
    before = block.weight.detach().clone()
    mask = torch.ones_like(before, dtype=torch.bool)
    report = reconstruct_(
        block, lambda x, _: block(x), inputs, targets, {block.weight: mask}, epochs=3, learning_rate=0.1
    )
    assert report.after == report.before  # the held-out sequence is zero, whatever the weights are
    assert report.epochs == 1
    assert torch.equal(block.weight, before)


def test_refinements_are_checked():
    model = linear_model("llama")
    with pytest.raises(InputError, match=r"refit_iterations = 1 .* wanda for 2:4"):
        prune_oneshot_(model, "wanda", calibration=TOKENS, refinements=Refinements(refit_iterations=1))
    with pytest.raises(InputError, match=r"reconstruct_epochs = 1 .* wanda"):
        applied(Refinements(reconstruct_epochs=1), "wanda", NM(2, 4))
    with pytest.raises(InputError, match="reconstruct_epochs"):
        prune_oneshot_(model, "sparsegpt", calibration=TOKENS[:1], refinements=Refinements(reconstruct_epochs=1))
    assert applied(Refinements(), "magnitude", NM(2, 4)) == NO_REFINEMENTS
    assert applied(NO_REFINEMENTS, "wanda", NM(2, 4)) == NO_REFINEMENTS
    with pytest.raises(InputError, match=r"mask_iterations = -1 is out of range"):
        prune_oneshot_(model, "sparsegpt", calibration=TOKENS, refinements=Refinements(mask_iterations=-1))
    with pytest.raises(InputError, match=r"damping = 1\.5 is out of range: it must be between 0 and 1"):
        Refinements(damping=1.5)
    with pytest.raises(InputError, match=r"damping = 0.1 .* wanda"):
        applied(Refinements(damping=0.1), "wanda", NM(2, 4))


def test_an_effort_sets_options_that_are_not_given():
    given = {"start_effort": "quick", "refit_iterations": 3}
    assert with_effort(given) == {**EFFORTS["quick"].options, **given}
    assert with_effort({}) == {}
    assert with_effort({"start_effort": "best"}) == {"start_effort": "best"}


def test_a_quick_start_does_not_ask_other_solvers_for_its_refinements():
    quick = EFFORTS["quick"].options
    assert applied(Refinements(**quick), "sparsegpt", NM(2, 4)) == Refinements(**quick)
    assert applied(Refinements(**quick), "wanda", NM(2, 4), "quick") == NO_REFINEMENTS
    with pytest.raises(InputError, match="refit_iterations"):
        applied(Refinements(**quick), "wanda", NM(2, 4))


@pytest.mark.parametrize(
    ("effort", "width", "num_sequences"), [("best", 64, 64), ("best", 4096, 128), ("quick", 64, 16)]
)
def test_the_default_calibration_text_counts_tokens(effort, width, num_sequences):
    layers = {"layer": torch.nn.Linear(width, 8)}
    assert default_sequences(layers, 512, EFFORTS[effort]) == num_sequences
