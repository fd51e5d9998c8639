"""Random input for masks, patterns and AdamS: what holds for every weight. `make fuzz` searches for longer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castlm.core.nm import NM, nm_mask, rank_mask
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


@needs_kernels
@few
@given(cases.sweeps())
def test_the_kernel_of_sparsegpt_prunes_like_torch(case):
    cases.check_sweep(case)
