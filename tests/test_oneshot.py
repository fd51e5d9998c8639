"""One-shot pruning against the papers' formulas, computed the slow way on inputs taken from whole forward passes."""

import copy
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.nm import count_nm_violations, nm_mask
from castlm.core.sparsify import is_sparse_linear, prune_, sparse_linears
from castlm.data.calibration import draw_calibration
from castlm.oneshot import walk
from castlm.oneshot.draw import calibration_length
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.options import NO_REFINEMENTS, BasisOptions, Refinements
from castlm.oneshot.sparsegpt import sparsegpt
from tests.slow import slow, slow_but
from tests.tiny import FAMILIES, VOCAB_SIZE, linear_model, tiny_model


def tokens(num_sequences: int = 4, seq_len: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (num_sequences, seq_len), generator=generator)


def correlated(num: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(num, columns, generator=generator) @ mix * torch.rand(columns, generator=generator)


def obs_reference(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float = 0.01) -> Tensor:
    """Optimal brain surgery, a weight at a time: the Hessian of the columns still to come is inverted for each column.

    The paper's Eq. 3 without its Cholesky factors, in fp64.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    for row in w:
        for j in range(len(row)):
            if j % m == 0:
                score = [row[j + k] ** 2 / inverses[j + k][0, 0] for k in range(m)]
                gone = sorted(range(m), key=lambda k: score[k])[: m - n]
            if j % m in gone:
                row[j:] -= row[j].clone() / inverses[j][0, 0] * inverses[j][0]
                row[j] = 0
    return w


@torch.no_grad()
def naive_oneshot(model: nn.Module, method: str, calibration: Tensor, n: int, m: int) -> None:
    """Block after block, each with the inputs that it has in the whole model when all before it are pruned."""
    layers, _ = sparse_linears(model, f"{n}:{m}")
    for block in sorted({int(next(p for p in name.split(".") if p.isdigit())) for name in layers}):
        inside = {name: layer for name, layer in layers.items() if f".{block}." in name}
        inputs = inputs_of(model, inside, calibration)
        for name, layer in inside.items():
            x = inputs[name].double()
            if method == "wanda":
                norms = x.norm(dim=0) / len(calibration) ** 0.5
                layer.weight.masked_fill_(~nm_mask(layer.weight.double() * norms, n, m), 0)
            else:
                layer.weight.copy_(obs_reference(layer.weight, 2 / len(calibration) * x.T @ x, n, m))


@torch.no_grad()
def inputs_of(model: nn.Module, layers: dict[str, nn.Linear], calibration: Tensor) -> dict[str, Tensor]:
    """(tokens, in) by name, from forward passes of the whole model, one sequence at a time."""
    seen = defaultdict(list)
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    for row in calibration:
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (4, 8), (7, 8)])
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_sparsegpt_is_obs_column_by_column(n, m, block_size):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    x = correlated(300, 40)
    hessian = 2 * x.T @ x
    expected = obs_reference(weight, hessian, n, m)
    new, damping = sparsegpt(weight, hessian.clone(), n, m, 0.01, block_size)
    assert damping == 0.01
    assert torch.equal(new != 0, expected != 0)
    assert torch.allclose(new.double(), expected, atol=2e-5, rtol=2e-4)
    assert (new != 0).view(6, -1, m).sum(-1).eq(n).all()


def test_sparsegpt_zeroes_dead_columns_and_counts_them_in_the_damping():
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    x = correlated(100, 16)
    x[:, [3, 8]] = 0
    hessian = 2e-3 * x.T @ x  # small, so that the ones put on the diagonal weigh in the damping
    new, _ = sparsegpt(weight, hessian.clone())
    assert (new[:, [3, 8]] == 0).all()
    assert torch.allclose(new.double(), obs_reference(weight, hessian, 2, 4), atol=1e-5)


def test_sparsegpt_reports_the_damping_it_had_to_raise():
    x = correlated(1, 32)  # rank 1
    new, damping = sparsegpt(torch.ones(4, 32), x.T @ x, damping=0.0)
    assert damping == 0.01
    assert new.isfinite().all()
    indefinite = -5 * torch.ones(32, 32) + 6 * torch.eye(32)
    with pytest.raises(InputError, match="damping of 1"):
        sparsegpt(torch.ones(4, 32), indefinite)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 8}
"""Each block has a mask of its own: what the first one is called with would be wrong for the second."""


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", slow_but(("qwen3", "gpt2", "gemma3_text"), [*FAMILIES, "gemma3_text"]))
def test_every_family_equals_the_naive_loop_over_whole_forward_passes(family, method):
    model = linear_model(family, **(SLIDING if family == "gemma3_text" else {}))
    expected = copy.deepcopy(model)
    naive_oneshot(expected, method, tokens(), 2, 4)
    report = prune_oneshot_(model, method, calibration=tokens())
    layers, _ = sparse_linears(model)
    assert {r.name for r in report.layers} == set(layers)
    for (name, got), want in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(got != 0, want != 0), name
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-3), name
        assert name.removesuffix(".weight") not in layers or count_nm_violations(got) == 0


@pytest.mark.parametrize("attention", ["sdpa", slow("eager")])
@pytest.mark.parametrize("pass_tokens", [1, slow(96), 10_000])
def test_sequences_a_pass_do_not_change_the_result(monkeypatch, pass_tokens, attention):
    model = tiny_model("llama", attn_implementation=attention)
    expected = copy.deepcopy(model)
    prune_oneshot_(expected, "sparsegpt", calibration=tokens(7))
    monkeypatch.setattr(walk, "PASS_TOKENS_CPU", pass_tokens)
    prune_oneshot_(model, "sparsegpt", calibration=tokens(7))
    for got, want in zip(model.parameters(), expected.parameters()):
        assert torch.allclose(got, want, atol=1e-5)


def test_passes_in_bf16_multiply_in_it_and_leave_all_else_in_fp32():
    seen = {"bf16": [], "fp32": []}
    for precision, dtypes in seen.items():
        model = linear_model("llama")
        block = model.model.layers[1]
        block.mlp.up_proj.register_forward_hook(lambda _, args, output, to=dtypes: to.append(output.dtype))
        block.register_forward_pre_hook(lambda _, args, to=dtypes: to.append(args[0].dtype))
        report = prune_oneshot_(
            model,
            "sparsegpt",
            calibration=tokens(),
            basis=BasisOptions(),
            refinements=Refinements(reconstruct_epochs=1),
            precision=precision,
        )
        assert report.basis.changes
        assert not report.basis.notes
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        seen[precision] = set(dtypes), report
    assert seen["fp32"][0] == {torch.float32}
    assert seen["bf16"][0] == {torch.float32, torch.bfloat16}
    for narrow, wide in zip(*(report.layers for _, report in seen.values()), strict=True):
        assert narrow.error == pytest.approx(wide.error, rel=0.2)


def test_magnitude_needs_no_calibration_and_measures_with_one():
    model = tiny_model("llama")
    expected, measured = copy.deepcopy(model), copy.deepcopy(model)
    prune_(expected)
    report = prune_oneshot_(model, "magnitude")
    with_errors = prune_oneshot_(measured, "magnitude", calibration=tokens())
    for a, b, c in zip(expected.parameters(), model.parameters(), measured.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(r.error is None for r in report.layers)
    assert all(0 < r.error < 1 for r in with_errors.layers)


def test_the_reported_error_is_that_of_the_layer():
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    name = "model.layers.0.mlp.gate_proj"
    old, new = dense.get_submodule(name), model.get_submodule(name)
    report = prune_oneshot_(model, "wanda", calibration=tokens())
    x = inputs_of(dense, {name: old}, tokens())[name].double()
    lost = (x @ (old.weight - new.weight).double().T).norm() ** 2 / (x @ old.weight.double().T).norm() ** 2
    (result,) = [r for r in report.layers if r.name == name]
    assert result.error == pytest.approx(lost.item(), rel=1e-4)
    assert result.shape == (64, 32)
    assert result.num_zeros == int((new.weight == 0).sum()) == 64 * 32 // 2


def test_the_report_says_what_was_left_dense_and_which_damping_was_raised():
    model = tiny_model("llama", intermediate_size=62)
    report = prune_oneshot_(model, "sparsegpt", calibration=tokens())
    assert "does not divide by m = 4" in report.left_dense["model.layers.0.mlp.down_proj"]
    assert len(report.layers) == 12
    assert report.zero_fraction == 0.5
    assert report.raised_damping == {}
    undamped = replace(NO_REFINEMENTS, damping=0)
    few = prune_oneshot_(tiny_model("llama"), "sparsegpt", calibration=tokens(1, 8), refinements=undamped)  # of rank 8
    solved = few.solved()
    assert solved.damping == 0
    assert solved.raised_damping["model.layers.0.self_attn.q_proj"] == 0.01
    assert any("14 of 14 layers" in line and "0.01" in line for line in few.notes())


def test_dtype_and_modes_stay_and_progress_is_told():
    model = tiny_model("qwen3").to(torch.bfloat16)
    model.train()
    model.model.layers[1].mlp.eval()
    calls = []
    prune_oneshot_(model, "sparsegpt", calibration=tokens(), progress=lambda *done: calls.append(done))
    assert calls == [(0, 2), (1, 2), (2, 2)]
    assert model.training
    assert not model.model.layers[1].mlp.training
    for layer in sparse_linears(model)[0].values():
        assert layer.weight.dtype == torch.bfloat16
        assert count_nm_violations(layer.weight) == 0


def test_a_filter_that_skips_a_block_still_runs_it():
    model = tiny_model("llama", num_hidden_layers=3)
    expected = copy.deepcopy(model)
    report = prune_oneshot_(
        model, "wanda", calibration=tokens(), filter_fn=lambda m, f: is_sparse_linear(m, f) and ".2." in f
    )
    name = "model.layers.2.mlp.down_proj"
    x = inputs_of(expected, {name: expected.get_submodule(name)}, tokens())[name]
    weight = expected.get_submodule(name).weight
    assert torch.equal(model.get_submodule(name).weight, weight * nm_mask(weight.detach() * x.norm(dim=0)))
    assert len(report.layers) == 7


def test_calibration_windows_are_the_published_loaders():
    ids = torch.arange(1000)
    got = draw_calibration(ids, 5, 32, seed=7)
    random.seed(7)
    starts = [random.randint(0, 1000 - 32 - 1) for _ in range(5)]
    assert got.tolist() == [list(range(start, start + 32)) for start in starts]
    assert calibration_length(tiny_model("gpt2")) == 256
    with pytest.raises(InputError, match="31 tokens"):
        draw_calibration(ids[:31], 5, 32)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_weight_or_an_input_that_is_not_finite_is_named(method):
    cases = [("self_attn.o_proj", torch.nan, r"layers\.1\.self_attn\.o_proj")]
    if method != "magnitude":
        cases.append(("mlp.up_proj", 1e38, r"input of model\.layers\.1\.mlp\.down_proj"))
    for layer, factor, named in cases:
        model = tiny_model("llama")
        model.model.layers[1].get_submodule(layer).weight.data.mul_(factor)
        with pytest.raises(InputError, match=named):
            prune_oneshot_(model, method, calibration=tokens())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_whose_input_is_always_zero_is_masked_by_magnitude_and_named(method):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    layer = model.model.layers[0].self_attn.o_proj
    expected = layer.weight * nm_mask(layer.weight)
    refinements = Refinements() if method == "sparsegpt" else NO_REFINEMENTS
    report = prune_oneshot_(model, method, calibration=tokens(), refinements=refinements, effort="best")
    assert torch.equal(layer.weight, expected)
    name = "model.layers.0.self_attn.o_proj"
    assert report.solved().masked_by_magnitude == {name: 1}
    assert any(f"the whole input of {name} at 0" in line for line in report.notes())


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"method": "wnada"}, "choose one of magnitude, wanda, sparsegpt"),
        ({"calibration": None}, "needs a calibration text"),
        ({"calibration": tokens(2, 257)}, "longer than the model's context of 256"),
        ({"pattern": "4:4"}, "pattern 4:4"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_is_touched(over, message):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    arguments = {"method": "sparsegpt", "calibration": tokens()} | over
    with pytest.raises(InputError, match=message):
        prune_oneshot_(model, arguments.pop("method"), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def add_between(model: nn.Module) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))


def call_twice(model: nn.Module) -> None:
    model.model.layers[1] = model.model.layers[0]


def spare_layer(model: nn.Module) -> None:
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)


def feed_with_text(model: nn.Module) -> None:
    seen = {}
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"input_ids": seen["input_ids"]}), with_kwargs=True, prepend=True
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_between, "between its blocks"),
        (call_twice, "between its blocks"),
        (spare_layer, r"model\.layers\.1\.mlp\.spare"),
        (feed_with_text, "change with the text"),
    ],
)
def test_a_model_whose_blocks_are_not_called_one_after_the_other_is_refused(change, reason):
    model = tiny_model("llama")
    change(model)
    with pytest.raises(InputError, match=reason):
        prune_oneshot_(model, "wanda", calibration=tokens(200))


@pytest.mark.parametrize(
    ("named", "over"),
    [
        ("a list", {"calibration": [[1, 2]]}),
        ("torch.float32", {"calibration": torch.zeros(2, 8)}),
        (r"\(8,\)", {"calibration": torch.zeros(8, dtype=torch.int64)}),
        (r"\(0, 8\)", {"calibration": torch.zeros(0, 8, dtype=torch.int64)}),
        ("the token 100000, ", {"calibration": torch.full((2, 8), 100_000)}),
        ("the token -1, ", {"calibration": torch.full((2, 8), -1)}),
        ("'fp8'", {"precision": "fp8"}),
    ],
)
def test_a_calibration_that_is_none_is_refused_before_anything_changes(named, over):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=named):
        prune_oneshot_(model, "sparsegpt", **{"calibration": tokens(), **over})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("other", [4, 3.0, True, None, "3", torch.tensor(3)])
def test_arguments_of_a_block_are_the_same_only_if_their_plain_values_are(other):
    one = {"mask": torch.ones(2), "scale": (3, object())}
    assert walk._same(one, {"mask": torch.ones(2), "scale": (3, object())})
    assert not walk._same(one, {"mask": torch.ones(2), "scale": (other, object())})
