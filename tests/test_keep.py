"""The zeros of a sparse model survive every optimizer, and what breaks them raises at the step where it happens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import castlm
from castlm.cli.main import main
from castlm.core.errors import InputError
from castlm.core.keep import KeptPattern
from tests.tiny import save_tiny, sparse_model, tiny_model

IDS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))


def step(model, optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def zeros(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if "layers" in name and p.dim() == 2}


def torch_adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)


def bnb(name):
    def make(parameters):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, lr=1e-2, weight_decay=0.1)

    return make


OPTIMIZERS = {
    "AdamW": torch_adamw,
    "fused AdamW": lambda parameters: torch_adamw(parameters, fused=True),
    "AdamW of one tensor after the other": lambda parameters: torch_adamw(parameters, foreach=False, amsgrad=True),
    "8-bit AdamW of bitsandbytes": bnb("AdamW8bit"),
    "8-bit Lion of bitsandbytes": bnb("Lion8bit"),
    "8-bit AdEMAMix of bitsandbytes": bnb("AdEMAMix8bit"),
    "AdamS with 8-bit moments": lambda parameters: castlm.AdamS(
        [{"params": list(parameters), "sparse": False}], lr=1e-2, total_steps=9, moments="8bit", weight_decay=0.1
    ),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_in_weights_gradients_and_moments(name):
    model = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16)  # large enough for bitsandbytes' 8 bits
    before = zeros(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = castlm.keep_pattern_(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        for layer, mask in kept.masks().items():
            assert not model.get_submodule(layer).weight.grad[~mask].any()
        optimizer.step()
        optimizer.zero_grad()
    for n, p in model.named_parameters():
        assert not torch.equal(p, start[n]), f"{n} was not trained"
        if n in before:
            assert torch.equal(p[before[n]], torch.zeros(int(before[n].sum()))), n
            assert torch.signbit(p[before[n]]).sum() == 0, f"{n} holds -0.0"
    assert kept.num_checks == 4
    for n, p in model.named_parameters():
        for value in optimizer.state[p].values() if n in before else ():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.dtype.is_floating_point:
                assert not value[before[n]].any(), n


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_eight_bit_moments_of_masked_weights_are_zero(name):
    model = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16)
    kept = castlm.keep_pattern_(model)
    optimizer = bnb(name)(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    layer = "model.layers.0.mlp.up_proj"
    state, mask = optimizer.state[model.get_submodule(layer).weight], kept.masks()[layer]
    assert state["state1"].dtype == torch.uint8
    moments = state["qmap1"][state["state1"].long()]
    assert not moments[~mask].any()
    assert moments[mask].any()


def test_eight_bit_moments_of_bitsandbytes_need_the_guard():
    """Else the test above would pass without it."""
    model = sparse_model(hidden_size=64, intermediate_size=128, head_dim=16)
    kept = castlm.keep_pattern_(model)
    kept.remove()
    weight = model.model.layers[0].mlp.up_proj.weight
    masked = weight.detach() == 0
    optimizer = bnb("AdamW8bit")([weight])
    for _ in range(2):
        weight.grad = torch.ones_like(weight).masked_fill_(masked, 0)
        optimizer.step()
    if not weight[masked].any():
        pytest.skip("this bitsandbytes rounds zero to zero")


def test_an_optimizer_that_mixes_weights_raises_at_its_first_step():
    model = sparse_model()
    castlm.keep_pattern_(model)
    matrices = [layer.weight for layer in castlm.sparse_linears(model)[0].values()]
    with pytest.raises(
        InputError, match=r"after step 1 of Muon, [\d,]+ masked weights of model.layers.0.self_attn.q_proj"
    ):
        step(model, torch.optim.Muon(matrices, lr=1e-2))


def test_moments_from_before_raise_and_the_message_counts_the_weights():
    model = tiny_model("llama")
    optimizer = torch_adamw(model.parameters())
    step(model, optimizer)
    castlm.prune_(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    num_masked = int((weight == 0).sum())
    castlm.keep_pattern_(model)
    with pytest.raises(InputError, match=rf"AdamW, {num_masked} masked weights of model.layers.0.self_attn.q_proj"):
        step(model, optimizer)


def test_clipping_sees_the_kept_weights_alone():
    model = sparse_model()
    model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {n: p.grad.masked_fill(m, 0) for (n, m) in zeros(model).items() for p in [model.get_parameter(n)]}
    model.zero_grad()
    castlm.keep_pattern_(model)
    for _ in range(2):  # two micro-batches
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


def test_a_model_that_is_not_sparse_is_refused_by_layer():
    with pytest.raises(InputError, match=r"14 of 14 layers are not 2:4, first model.layers.0.self_attn.q_proj"):
        castlm.keep_pattern_(tiny_model("llama"))
    model = sparse_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:8] = 1.0
    with pytest.raises(InputError, match=r"1 of 14 layers are not 2:4, first model.layers.1.mlp.up_proj with 1 place"):
        castlm.keep_pattern_(model)
    with pytest.raises(InputError, match="4:8"):
        castlm.keep_pattern_(tiny_model("llama"), "4:8")


def test_a_gpt2_with_conv1d_is_refused_with_the_loader_that_helps(tmp_path):
    folder, sparse = save_tiny(tmp_path / "dense", "gpt2"), tmp_path / "sparse"
    assert main(["prune", "--model", str(folder), "--output-dir", str(sparse), "--method", "magnitude"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(sparse)
    for refused in (castlm.keep_pattern_, castlm.prune_, castlm.sparse_linears):
        with pytest.raises(InputError, match=r"Conv1D.*: load it with castlm\.load_model"):
            refused(plain)
    castlm.keep_pattern_(castlm.load_model(sparse).model).check("now")


def test_layers_left_dense_are_those_of_the_filter_or_of_castlm_json(tmp_path):
    model = sparse_model()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    kept = castlm.keep_pattern_(model, filter_fn=lambda module, fqn: "layers" in fqn and "up_proj" not in fqn)
    assert len(kept.weights) == 12
    (tmp_path / "castlm.json").write_text('{"left_dense": {"model.layers.1.mlp.up_proj": "excluded"}}')
    model.config._name_or_path = str(tmp_path)
    kept = castlm.keep_pattern_(model)
    assert len(kept.weights) == 13
    assert "model.layers.1.mlp.up_proj" not in kept.weights


def test_a_weight_that_was_flattened_is_refused():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(64))
    with pytest.raises(InputError, match=r"layers.0 has a weight of shape \(64,\), not \(out, in\)"):
        KeptPattern({"layers.0": layer})


def test_a_weight_that_was_replaced_raises():
    model = sparse_model()
    castlm.keep_pattern_(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(InputError, match=r"the weight of model.layers.0.mlp.up_proj is another tensor"):
        step(model, torch_adamw(model.parameters()))


def test_the_guard_lives_and_ends_with_the_model():
    model = sparse_model()
    guard = weakref.ref(castlm.keep_pattern_(model))
    gc.collect()
    assert guard() is not None
    del model
    gc.collect()
    assert guard() is None


def test_remove_ends_the_guard():
    model = sparse_model()
    kept = castlm.keep_pattern_(model)
    kept.remove()
    step(model, torch_adamw(model.parameters()))
    with pytest.raises(InputError, match="masked weights of"):
        kept.check("training")


def test_another_model_is_not_checked():
    kept = castlm.keep_pattern_(sparse_model())
    other = tiny_model("llama")
    step(other, torch_adamw(other.parameters()))
    assert kept.num_checks == 0


def test_experts_keep_their_zeros():
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    castlm.linearize_experts_(model)
    castlm.prune_(model)
    kept = castlm.keep_pattern_(model)
    experts = model.get_submodule("model.layers.1.mlp.experts.down_proj").weight
    before = experts.detach().clone()
    optimizer = bnb("AdamW8bit")(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    assert experts.dim() == 3
    assert "model.layers.1.mlp.experts.down_proj" in kept.weights
    assert torch.equal(experts == 0, before == 0)
    assert not torch.equal(experts, before)


def test_sparse_experts_that_are_no_layers_are_refused():
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    castlm.prune_(model)  # the other layers
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    castlm.keep_pattern_(model).remove()
    experts.data *= castlm.nm_mask(experts)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts.down_proj holds sparse experts.*linearize_experts_"):
        castlm.keep_pattern_(model)
