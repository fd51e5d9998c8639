"""Random input for masks, patterns and AdamS: what holds for every weight. `make fuzz` searches for longer."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.nm import NM, nm_mask, pack_mask, rank_mask, unpack_mask
from castlm.patterns import parse_pattern
from tests import kernel_cases as cases
from tests.fused import needs_kernels
from tests.reference import keep

pytestmark = pytest.mark.filterwarnings("ignore")
few = settings(max_examples=40, deadline=None, database=None)


@few
@given(st.data(), st.integers(2, 20), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_mask_keeps_the_n_largest_and_the_earlier_of_equals(data, m, dtype):
    n = data.draw(st.integers(1, m - 1))
    weight = data.draw(cases.weights(2, 2 * m)).nan_to_num(nan=-math.inf).to(dtype)
    mask = nm_mask(weight, n, m)
    assert mask.tolist() == [keep(row, n, m) for row in weight.tolist()]
    assert NM(n, m).violations(weight.masked_fill(~mask, 0)) == 0
    assert torch.equal(rank_mask(weight.abs(), n, m), mask)


@few
@given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 2**31))
def test_packed_masks_unpack_to_themselves(rows, width, seed):
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (rows, -(-width // 8))
    assert torch.equal(unpack_mask(packed, width), mask)


@few
@given(st.one_of(st.text(max_size=12), st.from_regex(r"\A-?[0-9]{1,3}:-?[0-9]{1,3}\Z"), st.integers(), st.none()))
def test_any_text_is_a_pattern_or_an_error_of_one_line(text):
    try:
        pattern = parse_pattern(text)
    except InputError as error:
        cases.check_message(error)
        return
    assert parse_pattern(str(pattern)) == pattern
    assert 1 <= pattern.n < pattern.m


@needs_kernels
@settings(max_examples=40, deadline=None, database=None)
@given(
    st.sampled_from(sorted(DECAYS)),
    st.sampled_from([(2, 4), (1, 4), (3, 5), (4, 8)]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
def test_every_way_takes_the_same_steps(decay, pattern, sizes, interval, seed):
    torch.manual_seed(seed)
    n, m = pattern
    plain = [nn.Parameter(torch.randn(rows, groups * m)) for rows, groups in sizes]
    fused = copy.deepcopy(plain)
    options = {"lr": 0.1, "lam": 0.1, "total_steps": 8, "decay_end": 0.5, "decay": decay, "mask_interval": interval}
    optimizers = [
        AdamS([{"params": params, "sparse": True, "pattern": NM(n, m)}], **options, fused=how)
        for params, how in ((plain, False), (fused, True))
    ]
    for _ in range(8):
        for p, q in zip(plain, fused):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, fused):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert NM(n, m).violations(optimizers[1].mask(q)) == 0


@needs_kernels
@few
@given(cases.refreshes())
def test_the_refresh_kernel_makes_the_masks_of_torch(case):
    cases.check_refresh(case)


@needs_kernels
@few
@given(cases.updates())
def test_the_update_kernel_takes_the_steps_of_torch(case):
    cases.check_update(case)


@needs_kernels
@few
@given(cases.broken_updates())
def test_the_update_kernel_refuses_broken_tensors(case):
    cases.check_broken_update(case)
