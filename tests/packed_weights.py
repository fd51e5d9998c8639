"""Random packed weights, their buffers and the check of a product, for tests and the fuzzer of the CPU kernels."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castlm.core.nm import nm_mask
from castlm.dtypes import FLOATS
from castlm.packed import native
from castlm.packed.layers import packed_linear
from castlm.packed.tensor import PackedTensor, pack, pack_integers, unpack
from castlm_runtime.formats import FORMATS

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
    assert ((packed_linear(x, buffer, packed.spec.rows).double() - exact).abs() <= bound + 1e-30).all()
