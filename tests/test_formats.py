"""The table of numeric formats and the masks of the packed file: the codes of its groups."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from castlm.core.errors import InputError
from castlm.core.nm import nm_mask, pack_mask, unpack_mask
from castlm.dtypes import STORED
from castlm.export.packed import pack_folder
from castlm.export.verify import verify
from castlm.inference import native
from castlm.inference.formats import FILE, METADATA_KEY, PackedSpec, mask_bits
from castlm.inference.packed import pack, pack_integers
from tests.test_packed import pruned_folder

PATTERNS = [(n, m) for m in (2, 3, 4, 8, 16) for n in range(1, m) if m != 16 or n == 8]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_a_stored_mask_comes_back_bit_for_bit(pattern, rows, groups, seed):
    n, m = pattern
    weight = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    bits = pack_mask(nm_mask(weight, n, m)).numpy()
    spec = PackedSpec(rows, groups * m, n, m, "bf16")
    stored = spec.mask_to_stored(bits)
    assert stored.shape == spec.tensors()["mask"][1]
    assert np.array_equal(spec.mask_to_bits(stored), bits)


def test_codes_number_the_masks_of_a_group_in_order():
    masks = [m for m in itertools.product((0, 1), repeat=4) if sum(m) == 2]
    masks.sort(key=lambda m: sum(bit << i for i, bit in enumerate(m)))  # column 0 is the lowest bit
    weight = torch.tensor([mask for code in range(6) for mask in (masks[code], masks[0])], dtype=torch.float32)
    spec = PackedSpec(12, 4, 2, 4, "bf16")
    stored = spec.mask_to_stored(pack_mask(weight.bool()).numpy())
    assert stored[:, 0].tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0]


@pytest.mark.parametrize(
    ("pattern", "bits"),
    [((2, 4), 3), ((1, 4), 2), ((3, 4), 2), ((4, 8), 7), ((6, 8), 5), ((5, 8), 6), ((2, 8), 5), ((1, 2), 1)],
)
def test_a_group_takes_as_few_bits_as_its_masks_need(pattern, bits):
    n, m = pattern
    assert mask_bits(n, m) * m // 8 == bits
    assert PackedSpec(1, 64 * m, n, m, "bf16").tensors()["mask"][1] == (1, 8 * bits)


def test_2_4_int4_takes_three_bits_a_weight():
    spec = PackedSpec(64, 1024, 2, 4, "int4")
    stored = sum(STORED[dtype].itemsize * rows * width for dtype, (rows, width) in spec.tensors().values())
    assert 8 * stored / (64 * 1024) == 3.0


def test_a_code_that_no_mask_has_keeps_nothing():
    spec = PackedSpec(1, 8, 2, 4, "bf16")
    for code in range(64):
        kept = unpack_mask(torch.from_numpy(spec.mask_to_bits(np.array([[code]], np.uint8))), 8).view(2, 4).sum(1)
        assert bool((kept == 2).all()) == (code % 8 < 6 and code // 8 < 6)


def test_every_format_with_kernels_is_one_of_matrix_h():
    assert native.VALUES == {"bf16": 0, "fp16": 1, "fp32": 2, "int8": 3, "int4": 4}


def test_another_packed_format_is_refused(tmp_path):
    pack_folder(pruned_folder(tmp_path / "source"), tmp_path / "packed")
    with safe_open(tmp_path / "packed" / FILE, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    content = json.loads(metadata[METADATA_KEY])
    save_file(tensors, tmp_path / "packed" / FILE, {METADATA_KEY: json.dumps(content | {"version": 1})})
    with pytest.raises(InputError, match=r"packed format 1, .* castlm pack"):
        verify(tmp_path / "packed")


def test_integers_keep_a_given_mask():
    mask = torch.tensor([[True, True, False, False]])
    codes = torch.tensor([[3, 0, 0, 0]], dtype=torch.int8)
    packed = pack_integers(codes, torch.ones(1, 1), "int8", 2, 4, mask)
    assert torch.equal(unpack_mask(packed.mask_bits, 4), mask)
    assert torch.equal(packed.mask, pack(codes.float() + torch.tensor([[0.0, 1.0, 0.0, 0.0]]), 2, 4).mask)
