"""Random packed weights, their buffers and the check of a product, for tests and the fuzzer of the CPU kernels."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.nm import nm_mask
from castlm.dtypes import FLOATS
from castlm.packed import native
from castlm.packed.in_engine import MemoryWeights
from castlm.packed.in_engine import _array as as_array
from castlm.packed.layers import packed_linear
from castlm.packed.tensor import PackedTensor, pack, pack_integers, unpack
from castlm_runtime.families import describe
from castlm_runtime.formats import FORMATS
from castlm_runtime.model import Model, Prepared, Rows
from castlm_runtime.packed import PackedArray, PackedSpec

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)
DENSE_ONLY = {name for name, form in FORMATS.items() if form.of_tables}
PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (8, 16), (2, 3), (7, 16), (20, 32), (32, 64), (0, 0)]


@contextlib.contextmanager
def kernels_of(level: str) -> Iterator[None]:
    before = native.level()
    native.use_level(level)
    try:
        yield
    finally:
        native.use_level(before)


def random_packed(values: str, n: int, m: int, rows: int, columns: int, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = nm_mask(weight, n, m) if m else torch.ones_like(weight, dtype=torch.bool)
    weight = weight.masked_fill(~mask, 0.0)
    if values in FLOATS:
        return pack(weight.to(FLOATS[values]), n, m)
    form = FORMATS[values]
    end = int(form.largest) + 1
    codes = torch.randint(-end, end, (rows, columns), generator=generator).to(torch.int8) * mask
    scales = torch.rand(rows, form.num_scales(columns), generator=generator) + 0.1
    return pack_integers(codes, scales, values, n, m, mask if m else None)


def buffer_of(packed: PackedTensor, layout: str = "best") -> Tensor:
    spec = packed.spec
    size = native.packed_bytes(spec.values, spec.n, spec.m, spec.rows, spec.columns, layout)
    buffer = native.allocate(size)
    packed.repack_(buffer, layout)
    return buffer


@torch.no_grad()
def packed_in_engine(model: PreTrainedModel, values: str, n: int, m: int) -> Model:
    """A model whose layers are packed, experts too, in the engine; the model gets the values that the layers hold."""
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() > 1:
            for weight in parameter if parameter.dim() == 3 else [parameter]:
                weight.copy_(unpack(_packed(weight, values, n, m), torch.float32))
    return Model(describe(model.config.to_dict()), _PackedWeights(model, values, n, m))


def _packed(weight: Tensor, values: str, n: int, m: int) -> PackedTensor:
    if m:
        weight = weight * nm_mask(weight, n, m)
    if values in FLOATS:
        return pack(weight.to(FLOATS[values]), n, m)
    form, columns = FORMATS[values], weight.shape[1]
    groups = F.pad(weight, (0, -columns % (form.group or columns))).unflatten(1, (-1, form.group or columns))
    scales = (groups.abs().amax(2) / form.largest).clamp(min=1e-30).bfloat16().float()
    codes = (groups / scales[..., None]).round().clamp(-form.largest, form.largest).flatten(1)[:, :columns]
    return pack_integers(codes.to(torch.int8), scales, values, n, m)


class _PackedWeights(MemoryWeights):
    def __init__(self, model: PreTrainedModel, *form: Any):
        super().__init__(model)
        self.form = form

    def spec(self, name: str) -> PackedSpec | None:
        found, (values, n, m) = super().spec(name), self.form
        return found and (replace(found, values=values, n=n, m=m) if ".layers." in name else found)

    def matrix(self, name: str, rows: Rows) -> PackedArray | Prepared:
        found = super().matrix(name, rows)
        if ".layers." not in name:
            return found
        assert isinstance(found, PackedArray)
        packed = _packed(torch.from_numpy(found.values), *self.form)
        arrays = {suffix: as_array(tensor) for suffix, tensor in packed.tensors().items()}
        return PackedArray(packed.spec, arrays["values"], arrays.get("mask"), arrays.get("scales"))


def check_product(packed: PackedTensor, buffer: Tensor, x: Tensor) -> None:
    weight = unpack(packed).double()
    exact = x.double() @ weight.T
    in_two_parts = native.level() == "amx" and packed.spec.values == "bf16"  # of many rows: each keeps 17 bits
    bound = (2**-17 * in_two_parts + 2e-6) * x.double().abs() @ weight.abs().T
    if packed.spec.values not in FLOATS:  # activations are rounded to int8, a block of 64 at a time
        blocks = F.pad(x.double().abs(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 64)).amax(2, keepdim=True)
        step = blocks.expand(-1, -1, 64).flatten(1)[:, : x.shape[1]] / 127
        bound += 0.501 * step @ weight.abs().T
    if x.dtype == torch.bfloat16:
        bound += 2**-8 * (exact.abs() + bound)
    product = packed_linear(x, buffer, packed.spec.rows).double()
    assert ((product - exact).abs() <= bound + 1e-30).all(), (packed.spec, len(x))
