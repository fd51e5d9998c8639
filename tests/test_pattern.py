"""A pattern is one class: toy patterns work with AdamS, prune_ and violations, and n:m is one of them."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern, nm_mask
from castlm.core.sparsify import prune_, sparse_linears, sparse_param_groups
from castlm.patterns import parse_pattern
from tests.fused import needs_kernels
from tests.reference import keep
from tests.tiny import tiny_model


@dataclass(frozen=True)
class ColumnBlocks(Pattern):
    """Every row keeps the block with the larger sum from each pair of neighbouring blocks of `size` columns."""

    size: int

    def __str__(self):
        return f"columns:{self.size}"

    def misfit(self, shape):
        return f"its width {shape[-1]} does not divide by {2 * self.size}" if shape[-1] % (2 * self.size) else None

    def mask(self, weight):
        self.check_shape(weight.shape)
        pairs = weight.detach().abs().unflatten(-1, (-1, 2, self.size))
        if pairs.isnan().any():
            raise InputError("a weight contains NaN")
        sums = pairs.sum(-1, keepdim=True)
        return (sums == sums.amax(-2, keepdim=True)).expand_as(pairs).flatten(-3)

    def violations(self, weight):
        return int((weight.unflatten(-1, (-1, 2, self.size)).ne(0).any(-1).sum(-1) > 1).sum())


@dataclass(frozen=True)
class Channels(Pattern):
    """Half of the channels of an MLP: a channel is a row of gate and up, and a column of down."""

    def __str__(self):
        return "channels"

    def misfit(self, shape):
        return None

    def joint_layers(self, names):
        gates = [name for name in names if name.endswith("gate_proj")]
        return [tuple(gate.replace("gate", part) for part in ("gate", "up", "down")) for gate in gates]

    def joint_masks(self, weights):
        gate, up, down = (weight.detach().abs() for weight in weights)
        scores = gate.sum(1) + up.sum(1) + down.sum(0)
        kept = scores >= scores.median()
        return [kept[:, None].expand_as(gate), kept[:, None].expand_as(up), kept.expand_as(down)]

    def joint_violations(self, weights):
        gate, up, down = weights
        alive = gate.ne(0).any(1) | up.ne(0).any(1) | down.ne(0).any(0)
        return max(0, int(alive.sum()) - (len(alive) // 2 + 1))

    def mask(self, weight):
        raise NotImplementedError

    def violations(self, weight):
        return 0


def steps(optimizer, params, count):
    for _ in range(count):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def test_a_pattern_that_is_one_class_works_everywhere():
    pattern = ColumnBlocks(16)
    model = tiny_model("llama")
    layers, dense = sparse_linears(model, pattern)
    assert len(layers) == 14
    assert sparse_linears(tiny_model("llama", intermediate_size=72), pattern)[1] == {
        **dense,
        **{f"model.layers.{i}.mlp.down_proj": "its width 72 does not divide by 32" for i in (0, 1)},
    }
    optimizer = AdamS(sparse_param_groups(model, pattern), lr=0.1, total_steps=20, decay_end=0.5, mask_interval=3)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["pattern"] == "columns:16"
    optimizer.load_state_dict(saved)
    before = optimizer.masks()
    steps(optimizer, list(model.parameters()), 20)
    weight = layers["model.layers.0.mlp.up_proj"].weight
    assert optimizer.param_groups[0]["pattern"] == pattern
    assert optimizer.flips() >= 0
    assert any(not torch.equal(before[p], optimizer.mask(p)) for p in optimizer.sparse_params())
    assert torch.equal(optimizer.mask(weight), pattern.mask(weight))
    assert pattern.violations(weight) == 0
    model = tiny_model("llama")
    assert pattern.violations(model.model.layers[1].mlp.up_proj.weight) > 0
    prune_(model, pattern)
    assert all(pattern.violations(layer.weight) == 0 for layer in sparse_linears(model, pattern)[0].values())


def test_a_pattern_masks_several_weights_together():
    model = tiny_model("llama")

    def is_mlp(module, fqn):
        return ".mlp." in fqn and isinstance(module, nn.Linear)

    groups = sparse_param_groups(model, Channels(), is_mlp)
    assert sorted(i for unit in groups[0]["joint"] for i in unit) == list(range(6))
    optimizer = AdamS(groups, lr=0.1, total_steps=10, decay_end=0.5, mask_interval=2)
    optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, list(model.parameters()), 10)
    for block in model.model.layers:
        weights = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight]
        gate, up, down = (optimizer.mask(weight) for weight in weights)
        assert torch.equal(gate[:, 0], up[:, 0])
        assert torch.equal(gate[:, 0], down[0])
        assert Channels().joint_violations(weights) == 0
    model = tiny_model("llama")
    prune_(model, Channels(), filter_fn=is_mlp)
    mlp = model.model.layers[0].mlp
    assert torch.equal(mlp.gate_proj.weight.ne(0).any(1), mlp.down_proj.weight.ne(0).any(0))


def test_parse_names_the_text_and_every_form():
    with pytest.raises(InputError, match=r"'nothing'.*channels:SHARE.*heads:SHARE"):
        parse_pattern("nothing")
    with pytest.raises(InputError, match=r"'channels:0\.5'.*n:m"):
        NM.parse("channels:0.5")
    assert parse_pattern(NM(1, 4)) == NM(1, 4)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2", "2:4:8", "", "2:", "-2:4", "2.0:4", "٢:٤", " 2:4", 124, None])
def test_other_things_than_a_pattern_are_refused_in_one_line(text):
    with pytest.raises(InputError, match="2:4") as raised:
        parse_pattern(text)
    assert "\n" not in str(raised.value)


def test_a_pattern_is_frozen_hashed_and_compared_by_value():
    pattern = parse_pattern("2:4")
    assert str(parse_pattern("12:16")) == "12:16"
    with pytest.raises(AttributeError):
        pattern.n = 3
    assert {pattern, NM(2, 4)} == {NM(2, 4)}
    assert str(pattern) == "2:4"


@pytest.mark.parametrize(("n", "m"), [(1, 300), (255, 257), (256, 512), (3, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_groups_have_the_mask_of_the_reference(n, m, dtype):
    torch.manual_seed(0)
    weight = torch.randint(-40, 40, (2, 2 * m)).to(dtype)
    assert nm_mask(weight, n, m).tolist() == [keep(row, n, m) for row in weight.tolist()]
    optimizer = AdamS([{"params": [nn.Parameter(weight)], "sparse": True, "pattern": NM(n, m)}], total_steps=10)
    param = next(iter(optimizer.sparse_params()))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(optimizer.mask(param), nm_mask(weight, n, m))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 4)])
def test_empty_weights_have_empty_masks(shape):
    assert nm_mask(torch.empty(shape)).shape == shape
    assert NM(2, 4).violations(torch.empty(shape)) == 0


@needs_kernels
def test_a_transposed_or_expanded_weight_has_the_mask_of_its_copy():
    weight = torch.randn(1, 8).expand(4, 8)
    assert torch.equal(nm_mask(weight), nm_mask(weight.contiguous()))
    weight = torch.randn(9, 16)[:, 1:9]
    assert torch.equal(nm_mask(weight), nm_mask(weight.contiguous()))


def test_what_parses_a_pattern_does_not_import_torch():
    code = "import sys, castlm.patterns, castlm.core.decay, castlm.core.blocks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
