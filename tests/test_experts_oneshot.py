"""One-shot solvers on experts: each is solved by the tokens that are routed to it, or by all where they are few."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse
from castlm.core.sparsify import sparse_linears
from castlm.export.verify import verify
from castlm.oneshot.inputs import see_inputs
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.options import Refinements
from castlm.oneshot.routed import RoutedInputs, calibrated_on_all_note
from castlm.oneshot.solvers import SOLVERS, whole_hessian
from castlm.oneshot.source import block_stack
from castlm.oneshot.walk import BlockInputs
from tests.runs import prune_to, record_of
from tests.slow import slow, slow_but
from tests.tiny import EXPERTS, linear_model, save_tiny, tiny_model

NAME = "model.layers.0.mlp.experts"


def calibration(num_sequences: int = 8, seq_len: int = 64) -> Tensor:
    return torch.randint(0, 256, (num_sequences, seq_len), generator=torch.Generator().manual_seed(0))


def routed_by_hand(family: str, ids: Tensor, **over) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The inputs of each expert of block 0 and of its down-projection, and all tokens, by transformers' parameters."""
    plain, caught = tiny_model(family, **over), []
    experts = plain.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: caught.append(args))
    with torch.no_grad():
        plain(ids)
        hidden, chosen = (torch.cat([args[i] for args in caught]) for i in (0, 1))
        xs, neurons = [], []
        for e in range(4):
            x = hidden[(chosen == e).any(1)]
            if family == "gpt_oss":
                out = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
                gate, up = out[:, ::2].clamp(max=experts.limit), out[:, 1::2].clamp(-experts.limit, experts.limit)
                inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            else:
                gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=1)
                inner = F.silu(gate) * up
            xs.append(x)
            neurons.append(inner)
    return xs, neurons, hidden


def seen_of_block_0(model, ids: Tensor) -> dict[str, RoutedInputs]:
    layers, _ = sparse_linears(model)
    inside = {name: layer for name, layer in layers.items() if ".layers.0." in name}
    with torch.no_grad():
        inputs = BlockInputs(model, block_stack(model, layers)[1], ids)
        seen = see_inputs(inside, inputs, SOLVERS["sparsegpt"], len(ids))
    assert {name for entry in seen for name in entry.names} == set(inside)
    return {entry.names[0].rpartition(".")[2]: entry for entry in seen if isinstance(entry, RoutedInputs)}


@pytest.mark.parametrize("family", EXPERTS)
def test_an_expert_is_seen_with_the_tokens_that_are_routed_to_it(family):
    ids = calibration()
    xs, neurons, _ = routed_by_hand(family, ids)
    seen = seen_of_block_0(linear_model(family), ids)
    for projection, expected in (("gate_up_proj", xs), ("down_proj", neurons)):
        entry = seen[projection]
        assert not entry.few
        for e, x in enumerate(expected):
            hessian = whole_hessian(entry.experts[e].statistic.clone())
            torch.testing.assert_close(hessian, 2 / len(ids) * x.T @ x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [slow("mixtral"), "qwen3_moe"])
def test_an_expert_with_few_tokens_is_calibrated_on_all(family):
    model, ids = linear_model(family), calibration(2, 32)
    model.model.layers[0].mlp.gate.weight.data[3] *= 0  # rarely among the two best, never the best
    seen = seen_of_block_0(model, ids)
    few = seen["gate_up_proj"].few
    assert few == seen["down_proj"].few
    assert 0 < len(few) <= 4
    _, _, hidden = routed_by_hand(family, ids)
    for e in few:
        hessian = whole_hessian(seen["gate_up_proj"].experts[e].statistic.clone())
        torch.testing.assert_close(hessian, 2 / len(ids) * hidden.T @ hidden, rtol=1e-4, atol=1e-5)
    report = prune_oneshot_(model, "sparsegpt", calibration=ids)
    assert report.calibrated_on_all[f"{NAME}.down_proj"] == len(few)
    assert "calibrated on all tokens" in calibrated_on_all_note(report.calibrated_on_all)


# ---- experts that are called in other ways


OTHERS = ("dbrx", "jetmoe", "llama4_text", "longcat_flash")


def watched_by_hand(family: str, ids: Tensor, **over) -> tuple[dict[str, list[Tensor]], Tensor]:
    """The inputs of each expert of block 0, by the name of the layer, and all tokens, by transformers' code.

    Of JetMoE, those of its experts of attention too.
    """
    plain, calls = tiny_model(family, **over), {}
    block = plain.transformer.blocks[0] if family == "dbrx" else plain.model.layers[0]

    if family == "jetmoe":
        modules = {
            f"{around}.{name}.weight": block.get_submodule(f"{around}.{name}")
            for around in ("mlp", "self_attention.experts")
            for name in ("input_linear", "output_linear")
        }
    else:
        name = {"dbrx": "ffn.experts", "llama4_text": "feed_forward.experts"}.get(family, "mlp.experts")
        experts = block.get_submodule(name)
        modules = {name: experts}
    for module in modules.values():
        module.register_forward_pre_hook(lambda module, args: calls.setdefault(module, []).append(args))
    with torch.no_grad():
        plain(ids)
        if family == "jetmoe":
            found = {}
            for layer, module in modules.items():
                parts = [x.split(sizes) for x, sizes in calls[module]]
                found[layer] = [torch.cat(of_expert) for of_expert in zip(*parts)]
            return found, torch.empty(0)
        if family == "llama4_text":
            hidden = torch.cat([args[0].view(4, -1, args[0].shape[-1]) for args in calls[experts]], dim=1)
            xs = [x[x.any(-1)] for x in hidden]
            pairs = [(x @ weight).chunk(2, dim=-1) for x, weight in zip(xs, experts.gate_up_proj)]
            neurons = [up * F.silu(gate) for gate, up in pairs]
            return {f"{name}.gate_up_proj": xs, f"{name}.down_proj": neurons}, hidden.flatten(0, 1)
        hidden = torch.cat([args[0].flatten(0, -2) for args in calls[experts]])
        chosen = torch.cat([args[1] for args in calls[experts]])
        xs = [hidden[(chosen == expert).any(1)] for expert in range(4)]
        if family == "dbrx":
            w1, v1 = (experts.mlp.get_parameter(which).view(4, -1, hidden.shape[-1]) for which in ("w1", "v1"))
            neurons = [F.silu(x @ gate.T) * (x @ up.T) for x, gate, up in zip(xs, w1, v1)]
            return {f"{name}.mlp.w1": xs, f"{name}.mlp.v1": xs, f"{name}.mlp.w2": neurons}, hidden
        pairs = [(x @ weight.T).chunk(2, dim=-1) for x, weight in zip(xs, experts.gate_up_proj)]
        return {f"{name}.gate_up_proj": xs, f"{name}.down_proj": [F.silu(g) * up for g, up in pairs]}, hidden


def seen_experts(model, ids: Tensor) -> dict[str, RoutedInputs]:
    """The inputs of the experts of block 0, by the name of the layer inside the block."""
    layers, _ = sparse_linears(model)
    inside = {name: layer for name, layer in layers.items() if name.split(".")[2] == "0"}
    with torch.no_grad():
        inputs = BlockInputs(model, block_stack(model, layers)[1], ids)
        seen = see_inputs(inside, inputs, SOLVERS["sparsegpt"], len(ids))
    assert {name for entry in seen for name in entry.names} == set(inside)
    return {entry.names[0].partition(".0.")[2]: entry for entry in seen if isinstance(entry, RoutedInputs)}


OVER: dict[str, dict[str, int]] = {"longcat_flash": {"zero_expert_num": 0}}


@pytest.mark.parametrize("family", OTHERS)
def test_experts_of_any_construction_are_seen_with_their_tokens(family):
    ids, over = calibration(16), OVER.get(family, {})
    expected, _ = watched_by_hand(family, ids, **over)
    seen = seen_experts(linear_model(family, **over), ids)
    assert seen.keys() == expected.keys()
    for layer, xs in expected.items():
        for expert, x in enumerate(xs):
            if len(x) < x.shape[-1]:
                assert expert in seen[layer].few
                continue
            hessian = whole_hessian(seen[layer].experts[expert].statistic.clone())
            torch.testing.assert_close(hessian, 2 / len(ids) * x.T @ x, rtol=1e-4, atol=1e-5)
    assert sum(len(seen[layer].few) for layer in expected) < sum(map(len, expected.values())) / 2


@pytest.mark.parametrize(
    ("family", "precision"),
    # DBRX's code in transformers does not run under autocast
    [*((family, "fp32") for family in OTHERS), *(slow(family, "bf16") for family in OTHERS[1:])],
)
def test_every_solver_makes_experts_of_any_construction_sparse(family, precision):
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        model = linear_model(family)
        report = prune_oneshot_(model, method, calibration=calibration(), precision=precision)
        layers, _ = sparse_linears(model)
        assert {result.name for result in report.layers} == set(layers)
        assert all(is_nm_sparse(layer.weight) for layer in layers.values())
        experts = [result.error for result in report.layers if layers[result.name].weight.dim() == 3]
        errors[method] = sum(experts) / len(experts)
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("family", slow_but(("gpt_oss",), EXPERTS))
def test_every_solver_makes_experts_sparse_and_more_knowledge_loses_less(family):
    errors = {}
    for method in SOLVERS:
        model = linear_model(family)
        report = prune_oneshot_(model, method, calibration=calibration())
        layers, _ = sparse_linears(model)
        assert [result.name for result in report.layers]
        assert {r.name for r in report.layers} == set(layers)
        assert all(is_nm_sparse(layer.weight) for layer in layers.values())
        errors[method] = next(result.error for result in report.layers if result.name == f"{NAME}.down_proj")
    assert errors["sparsegpt"] < errors["magnitude"]
    assert report.zero_fraction == 0.5
    assert report.calibrated_on_all == {}
    assert report.solved().experts_calibrated_on_all_tokens is None
    assert not report.notes()


def test_refinements_and_reconstruction_work_on_experts():
    refined = Refinements(refit_iterations=5, reconstruct_epochs=1)
    model = linear_model("mixtral")
    before = model.model.layers[0].mlp.gate.weight.clone()
    report = prune_oneshot_(model, "sparsegpt", calibration=calibration(), refinements=refined, effort="best")
    layers, _ = sparse_linears(model)
    assert all(is_nm_sparse(layer.weight) for layer in layers.values())
    assert len(report.reconstructions) == 2
    assert torch.equal(model.model.layers[0].mlp.gate.weight, before)


def test_experts_that_compute_their_neurons_otherwise_are_refused(monkeypatch):
    model = linear_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, out: out.chunk(2, dim=-1)[0])
    model.set_experts_implementation("eager")  # whose code does not ask `_apply_gate`
    with pytest.raises(InputError, match="MixtralExperts"):
        prune_oneshot_(model, "sparsegpt", calibration=calibration())


def test_castlm_prune_says_which_experts_saw_few_tokens(text, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", "qwen3_moe", hidden_size=64)
    prune_to(tmp_path / "out", model, text, calibration_sequences=2, device="cpu")
    assert "calibrated on all tokens" in capsys.readouterr().out
    record = record_of(tmp_path / "out")
    assert f"{NAME}.gate_up_proj" in record["experts_calibrated_on_all_tokens"]
    assert verify(tmp_path / "out").ok
