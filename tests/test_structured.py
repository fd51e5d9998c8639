"""Channels, heads and their combinations with n:m: grammar, masks, AdamS, the methods' forward masks."""

import itertools

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.shards import local
from castlm.core.sparsify import prune_, sparse_linears, sparse_param_groups
from castlm.models.architecture import linearize_conv1d_
from castlm.patterns import parse_pattern
from castlm.structured.pattern import Channels, left_of
from tests.fused import needs_kernels
from tests.tiny import tiny_model

TEXTS = ("channels:0.5", "heads:0.5", "channels:0.75+2:4", "heads:0.5+2:4")


def weights_of(model, *names, layer=0):
    block = model.model.layers[layer]
    return [block.get_submodule(name).weight for name in names]


MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def stepped(model, text, steps=10, seed=0, **options):
    """A model after some steps of AdamS with random gradients, and the optimizer."""
    torch.manual_seed(seed)
    groups = sparse_param_groups(model, parse_pattern(text))
    optimizer = AdamS(groups, lr=0.05, total_steps=steps, mask_interval=3, **{"decay_end": 0.5, **options})
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_pattern_parses_back(text):
    assert str(parse_pattern(text)) == text
    assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)


def test_a_share_may_begin_with_the_point():
    assert parse_pattern("channels:.25") == Channels(0.25)
    assert parse_pattern("channels:0.75+2:4") == Channels(0.75, NM(2, 4))


NO_PATTERNS = (
    *("channels", "channels:", "channels:1", "channels:1.5", "channels:-0.5", "channels:0.0", "channels:0.5:1"),
    *("heads:half", "heads:0.5 ", "blocks:32x32:0.5"),
    *("channels:0.5+", "channels:0.5+heads:0.5", "2:4+channels:0.5", "channels:0.5+4:2", "channels:0.5+2:4+2:4"),
    *("channels:0.50000", "channels:\u0660.5", "channels:5e-1", "channels:nan"),
)


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(InputError) as raised:
        parse_pattern(text)
    assert "\n" not in str(raised.value)


def test_a_channel_is_masked_in_all_its_weights_by_its_norm():
    gate, up, down = weights_of(tiny_model("llama"), *MLP)
    norms = [float(sum(w.detach().square().sum() for w in (gate[i], up[i], down[:, i]))) for i in range(64)]
    best = sorted(range(64), key=lambda i: -norms[i])[:32]
    for mask, axis in zip(Channels(0.5).joint_masks([gate, up, down]), (0, 0, 1)):
        rows = mask if axis == 0 else mask.T
        assert [i for i in range(64) if rows[i].all()] == sorted(best)
        assert not rows[[i for i in range(64) if i not in best]].any()


def test_a_kv_head_is_masked_with_its_query_heads():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    pattern = parse_pattern("heads:0.25").for_model(model)
    q, k, v, o = weights_of(model, *ATTENTION)  # 8 heads of 8, 4 KV heads
    with torch.no_grad():
        v[16:24] *= 100  # KV head 2, which query heads 4 and 5 read
    masks = pattern.joint_masks([q, k, v, o])
    kept_q = torch.zeros(64, dtype=torch.bool)
    kept_q[32:48] = True
    kept_kv = torch.zeros(32, dtype=torch.bool)
    kept_kv[16:24] = True
    assert torch.equal(masks[0], kept_q[:, None].expand_as(q))
    assert torch.equal(masks[1], kept_kv[:, None].expand_as(k))
    assert torch.equal(masks[2], kept_kv[:, None].expand_as(v))
    assert torch.equal(masks[3], kept_q.expand_as(o))


def test_n_of_m_is_counted_in_what_is_left_after_the_cut():
    model = tiny_model("llama")
    pattern = parse_pattern("channels:0.75+2:4")
    prune_(model, pattern)
    gate, up, down = weights_of(model, *MLP)
    kept = pattern.kept_units([gate, up, down])
    assert int(kept.sum()) == 48
    for weight, mask in zip((gate, up, down), pattern.expand(kept, (gate, up, down))):
        assert NM(2, 4).violations(left_of(weight, mask)) == 0
        assert int((left_of(weight, mask) == 0).sum()) == left_of(weight, mask).numel() // 2
    assert NM(2, 4).violations(down) > 0  # in the layout before the cut
    for weight in weights_of(model, *ATTENTION):
        assert NM(2, 4).violations(weight) == 0


@pytest.mark.parametrize("text", TEXTS)
def test_pruned_weights_have_no_violation_and_the_dense_ones_have(text):
    model = tiny_model("llama")
    pattern = parse_pattern(text).for_model(model)
    layers, dense = sparse_linears(model, parse_pattern(text))

    def violations():
        return [
            pattern.joint_violations([layers[name].weight for name in unit]) for unit in pattern.joint_layers(layers)
        ]

    assert min(violations()) > 0
    assert sorted(prune_(model, parse_pattern(text))) == sorted(layers)
    assert max(violations()) == 0
    assert any(name.startswith("model.layers") for name in dense) == (text in ("channels:0.5", "heads:0.5"))


@pytest.mark.parametrize("text", TEXTS)
def test_adams_leaves_nothing_of_a_masked_unit(text):
    model = tiny_model("llama")
    optimizer = stepped(model, text)
    pattern = optimizer.param_groups[0]["pattern"]
    layers, _ = sparse_linears(model, parse_pattern(text))
    assert optimizer.flips() >= 0
    for unit in pattern.joint_layers(layers):
        weights = [layers[name].weight for name in unit]
        assert pattern.joint_violations(weights) == 0
        assert pattern.joint_violations([optimizer.mask(weight) for weight in weights]) == 0
    optimizer.load_state_dict(optimizer.state_dict())


@needs_kernels
@pytest.mark.parametrize(("text", "decay"), itertools.product(("channels:0.5", "heads:0.5+2:4"), DECAYS))
def test_every_decay_runs_fused_with_the_result_of_the_operators(text, decay):
    models = [tiny_model("llama"), tiny_model("llama")]
    options = {"decay": decay, "lam": 0.0 if decay in ("horizon", "none") else 1e-2}
    one, other = (stepped(model, text, fused=fused, **options) for model, fused in zip(models, (None, False)))
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(one.sparse_params(), other.sparse_params()):
        assert torch.equal(one.mask(a), other.mask(b))


def test_a_saved_mask_that_parts_a_unit_is_refused():
    model = tiny_model("llama")
    optimizer = AdamS(sparse_param_groups(model, parse_pattern("channels:0.5")), total_steps=10)
    saved = optimizer.state_dict()
    mask = saved["state"][0]["mask"]
    mask.fill_(255)
    with pytest.raises(InputError, match=r"are not channels:0\.5 together"):
        optimizer.load_state_dict(saved)


def test_prune_refuses_masks_that_part_a_unit_and_changes_nothing():
    model = tiny_model("llama")
    optimizer = AdamS(sparse_param_groups(model, parse_pattern("channels:0.5")), total_steps=10)
    masks = optimizer.masks()
    first = next(iter(masks))
    masks[first] = torch.ones_like(masks[first])
    before = first.detach().clone()
    with pytest.raises(InputError, match=r"are not channels:0\.5 together"):
        prune_(model, parse_pattern("channels:0.5"), masks=masks)
    assert torch.equal(before, first)


def test_layers_that_are_no_unit_or_have_lost_a_part_of_theirs_stay_dense():
    model = tiny_model("llama")

    def not_down_0(module, fqn):
        return isinstance(module, nn.Linear) and "layers" in fqn and "layers.0.mlp.down" not in fqn

    layers, dense = sparse_linears(model, parse_pattern("channels:0.5"), not_down_0)
    assert sorted(layers) == [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert dense["model.layers.0.mlp.gate_proj"] == Channels.outside
    assert dense["model.layers.0.self_attn.q_proj"] == Channels.outside


@pytest.mark.parametrize(("family", "parts"), [("gpt2", ("mlp.c_fc", "mlp.c_proj")), ("opt", ("fc1", "fc2"))])
def test_the_channels_of_gpt2_and_opt_are_found(family, parts):
    model = tiny_model(family)
    linearize_conv1d_(model)
    blocks = "transformer.h" if family == "gpt2" else "model.decoder.layers"
    layers, _ = sparse_linears(model, parse_pattern("channels:0.5"))
    assert sorted(layers) == [f"{blocks}.{i}.{part}" for i in (0, 1) for part in parts]


def test_heads_without_q_k_and_v_of_their_own_are_refused():
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        sparse_linears(tiny_model("gpt2"), parse_pattern("heads:0.5"))
    with pytest.raises(AssertionError, match="call for_model"):
        parse_pattern("heads:0.5").joint_masks([torch.ones(8, 8)] * 4)


def test_shares_that_keep_all_or_nothing_and_nan_are_refused():
    with pytest.raises(InputError, match="keeps none of 2 units"):
        stepped(tiny_model("llama"), "heads:0.2", steps=1)
    with pytest.raises(InputError, match="keeps all of 4 units"):
        Channels(0.9).num_kept(4)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="contains NaN"):
        prune_(model, parse_pattern("channels:0.5"))


def test_masks_of_units_may_be_written_to():
    optimizer = AdamS(sparse_param_groups(tiny_model("llama"), parse_pattern("channels:0.5")), total_steps=10)
    param = next(iter(optimizer.sparse_params()))
    optimizer.set_mask(param, optimizer.mask(param))
    assert local(optimizer.state[param]["mask"]).is_contiguous()
