"""Masks against a weight-by-weight reference, on the inputs where a topk or a threshold goes wrong: ties and NaN."""

import numpy as np
import pytest
import torch
from torch import nn

from castlm.core import native
from castlm.core.adams import AdamS
from castlm.core.errors import InputError
from castlm.core.nm import (
    NM,
    count_nm_violations,
    flip_rate,
    nm_mask,
    pack_mask,
    refresh_mask_,
    sparse_weight_ratio,
    unpack_mask,
)
from castlm.patterns import parse_pattern
from tests.fused import needs_kernels
from tests.reference import keep

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
REAL = (torch.bool, *INTEGERS, *FLOATS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@pytest.mark.parametrize("dtype", REAL)
def test_every_real_dtype_has_the_mask_of_the_reference(dtype):
    for n, m in ((2, 4), (1, 4), (1, 2), (4, 8), (3, 5), (20, 40)):
        weight = bit_patterns(dtype, m)
        assert nm_mask(weight, n, m).tolist() == [keep(row, n, m) for row in weight.tolist()], (n, m)
        nonzero = [[value != 0 for value in row[i : i + m]] for row in weight.tolist() for i in range(0, len(row), m)]
        assert count_nm_violations(weight, n, m) == sum(sum(group) > n for group in nonzero), (n, m)


def bit_patterns(dtype, m):
    """All bit patterns of a dtype, with its extremes in many groups: abs of the smallest integer overflows."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(40, 2 * m, generator=generator) < 0.5
    bits = torch.randint(0, 256, (40, 2 * m * dtype.itemsize), dtype=torch.uint8, generator=generator)
    weight = bits.view(dtype)
    if dtype in INTEGERS:
        ends = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max, 0, 1], dtype=dtype)
        weight[20:] = ends[torch.randint(0, 4, weight[20:].shape, generator=generator)]
    else:
        weight = torch.where(weight.double().isfinite(), weight.double(), 1.0).to(dtype)
        weight[20:, ::3] = -0.0
    return weight


def test_complex_weights_are_ranked_by_their_magnitude():
    assert nm_mask(torch.tensor([[3 + 4j, 0.5j, 1, 6j]])).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_raises_in_every_dtype_that_has_one(dtype):
    weight = torch.ones(4, 8).index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(float("nan"))).to(dtype)
    with pytest.raises(InputError, match="NaN"):
        nm_mask(weight)


@pytest.mark.parametrize("function", [nm_mask, count_nm_violations])
def test_a_weight_without_values_is_refused(function):
    with pytest.raises(InputError, match="meta device"):
        function(torch.empty(4, 8, device="meta"))


@pytest.mark.parametrize(("n", "m"), [(4, 2), (0, 4), (4, 4), (2, 0), (-1, 4), (2.0, 4), (True, 4)])
def test_bad_pattern_raises(n, m):
    with pytest.raises(InputError, match=f"{n}:{m}"):
        nm_mask(torch.ones(4, 4), n, m)


def test_rates():
    old = torch.tensor([True, True, False, False])
    new = torch.tensor([True, False, True, False])
    assert flip_rate(old, new) == 0.5
    assert sparse_weight_ratio(torch.tensor([3.0, -1.0, 0.0, 0.0]), old) == 1.0
    assert sparse_weight_ratio(torch.tensor([3.0, -1.0, 0.0, 0.0]), new) == 0.75
    assert sparse_weight_ratio(torch.zeros(4), new) == 1.0


@pytest.mark.parametrize("shape", [(24,), (5, 12), (3, 2, 8), (1, 4), (0, 8), (7, 64)])
def test_packed_bits_are_numpys(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_mask(packed, shape[-1]), mask)
    assert torch.equal(pack_mask(mask.mT.contiguous().mT) if mask.dim() > 1 else packed, packed)


def kernel_refresh_(weight, packed, n, m):
    return native.refresh_([weight], [packed], n, m)


REFRESHES = [refresh_mask_, pytest.param(kernel_refresh_, marks=needs_kernels)]


@pytest.mark.parametrize("refresh_", REFRESHES)
@pytest.mark.parametrize(
    ("n", "m", "width"),
    [(2, 4, 24), (2, 4, 12), (1, 2, 10), (3, 8, 40), (2, 3, 33), (5, 16, 48), (2, 4, 70_004), (1, 3, 70_002)],
)
def test_refresh_equals_reference_and_counts_flips(refresh_, n, m, width):
    torch.manual_seed(0)
    rows = 40 if width < 100 else 2
    old, normal = torch.randn(rows, width), torch.randn(rows, width)
    ties, infinite = torch.randint(-2, 3, (rows, width)).float(), normal.masked_fill(normal > 0.5, float("inf"))
    for kind, weight in {"normal": normal, "ties": ties, "infinite": infinite}.items():
        packed = pack_mask(nm_mask(old, n, m))
        flips, has_nan = refresh_(weight, packed, n, m)
        mask = torch.tensor([keep(row, n, m) for row in weight.tolist()])
        assert torch.equal(unpack_mask(packed, width), mask), kind
        assert int(flips) == int((mask != nm_mask(old, n, m)).sum()) > 0, kind
        assert not has_nan, kind


@pytest.mark.parametrize("refresh_", REFRESHES)
@pytest.mark.parametrize("position", [(0, 0), (2, 9), (4, 15)])
@pytest.mark.parametrize("value", ["nan", "-nan"])
def test_refresh_sees_nan_anywhere(refresh_, position, value):
    weight = torch.randn(5, 16)
    packed = pack_mask(nm_mask(weight))
    weight[position] = float(value)
    assert refresh_(weight, packed, 2, 4)[1]


@needs_kernels
def test_a_kernel_takes_no_subclass_and_nothing_that_is_traced():
    class Elsewhere(torch.Tensor):
        """As DTensor, whose numbers are not where it points."""

    weight = torch.randn(4, 8)
    assert native.runs_on(weight)
    assert not native.runs_on(weight.as_subclass(Elsewhere))
    assert torch.equal(nm_mask(weight.as_subclass(Elsewhere)), nm_mask(weight))
    traced = torch.compile(lambda x: x * native.runs_on(x), backend="eager", fullgraph=True)
    assert not traced(weight).any()


# ---- patterns


def test_parse_names_the_text_and_every_form():
    with pytest.raises(InputError, match=r"'nothing'.*n:m"):
        parse_pattern("nothing")
    with pytest.raises(InputError, match=r"'channels:0\.5'.*n:m"):
        NM.parse("channels:0.5")
    assert parse_pattern(NM(1, 4)) == NM(1, 4)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2", "2:4:8", "", "2:", "-2:4", "2.0:4", "٢:٤", " 2:4", 124, None])
def test_other_things_than_a_pattern_are_refused_in_one_line(text):
    with pytest.raises(InputError, match="2:4") as raised:
        parse_pattern(text)
    assert "\n" not in str(raised.value)


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


@needs_kernels
def test_a_transposed_or_expanded_weight_has_the_mask_of_its_copy():
    weight = torch.randn(1, 8).expand(4, 8)
    assert torch.equal(nm_mask(weight), nm_mask(weight.contiguous()))
    weight = torch.randn(9, 16)[:, 1:9]
    assert torch.equal(nm_mask(weight), nm_mask(weight.contiguous()))
