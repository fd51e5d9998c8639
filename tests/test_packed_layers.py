"""The op of packed weights and the layers made of them: shapes, dtypes, compilation, tracers."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from castlm.core.nm import nm_mask
from castlm.inference import native
from castlm.inference.layers import (
    DIRECT_ROWS,
    PackedEmbedding,
    PackedLinear,
    packed_linear,
    prepare_layers_,
)
from castlm.inference.packed import pack, unpack
from tests.packed_weights import buffer_of, random_packed

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)


def test_products_keep_leading_dimensions_and_take_no_rows():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer = buffer_of(packed)
    assert packed_linear(torch.randn(2, 3, 64), buffer, 12).shape == (2, 3, 12)
    assert packed_linear(torch.randn(0, 64), buffer, 12).shape == (0, 12)
    assert packed_linear(torch.randn(2, 64, dtype=torch.float16), buffer, 12).dtype == torch.float16
    assert packed_linear(torch.randn(64, 2).T, buffer, 12).shape == (2, 12)
    assert packed_linear(torch.randn(DIRECT_ROWS + 1, 64).bfloat16(), buffer, 12).dtype == torch.bfloat16


def test_a_layer_multiplies_as_the_one_it_replaces():
    layer = torch.nn.Linear(96, 20)
    layer.weight.data = layer.weight.data.masked_fill(~nm_mask(layer.weight), 0.0)
    packed = pack(layer.weight.detach(), 2, 4)
    made = PackedLinear(packed.spec, layer.bias).hold_(packed)
    prepare_layers_({"made": made})
    x = torch.randn(2, 7, 96)
    torch.testing.assert_close(made(x), layer(x))
    assert dict(made.named_buffers()).keys() == {"packed"}  # the stored tensors are gone


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32", "int8"])
def test_an_embedding_looks_up_what_the_head_multiplies_by(values):
    packed = random_packed(values, 0, 0, 37, 50)
    table, head = PackedEmbedding(packed.spec, torch.float32), PackedLinear(packed.spec)
    table.hold_(packed)
    prepare_layers_({"table": table})
    head.share_(table.packed)
    ids = torch.tensor([[0, 36, 5], [17, 17, 31]])
    assert torch.equal(table(ids), unpack(packed)[ids].float())
    assert head(torch.randn(1, 50)).shape == (1, 37)


def test_torch_compile_traces_the_op():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer = buffer_of(packed)
    compiled = torch.compile(lambda x: packed_linear(x, buffer, 12) * 2, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), packed_linear(x, buffer, 12) * 2)


def test_tracers_and_transforms_see_the_op():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer, x = buffer_of(packed), torch.randn(3, 64)

    def twice(x):
        return packed_linear(x, buffer, 12) * 2

    expected = twice(x)
    graph = make_fx(twice)(x)
    assert "packed_linear" in [node.name for node in graph.graph.nodes]
    traced = torch.jit.trace(twice, (x,), check_trace=False)
    assert "castlm::packed_linear" in [node.kind() for node in traced.graph.nodes()]
    for made in (graph, traced):
        assert torch.equal(made(x), expected)
        assert torch.equal(made(x + 1), twice(x + 1))
    with torch.inference_mode():
        assert torch.equal(torch.func.vmap(twice)(x[None])[0], expected)
