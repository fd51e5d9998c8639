"""Random inputs for the C++ kernels and what torch makes of them: for `fuzz_kernels.py` and `test_fuzz_core.py`."""

import contextlib
import math

import torch
from hypothesis import strategies as st

from castlm.core import native
from castlm.core.errors import InputError
from castlm.core.moments import MOMENT_KEYS, new_moments
from castlm.core.nm import NM, nm_mask, pack_mask, refresh_mask_
from castlm.core.update import adams_update
from castlm.oneshot.sparsegpt import sweep_by_kernel_, sweep_by_torch_

VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38, 3.4e38, math.inf, -math.inf, math.nan]


@st.composite
def weights(draw, rows, width, special=True):
    """(rows, width) fp32 in memory of its own: normal, with many ties, or with the values at which floats end."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", *(["special"] if special else [])]))
    if kind == "normal":
        return torch.randn(rows, width, generator=generator)
    if kind == "ties":
        return torch.randint(-2, 3, (rows, width), generator=generator).float()
    choice = torch.randint(len(VALUES), (rows, width), generator=generator)
    return torch.tensor(VALUES)[choice]


@st.composite
def refreshes(draw):
    """Several weights of one pattern with older masks: what one call of the refresh kernel takes."""
    m = draw(st.one_of(st.sampled_from([2, 4, 8]), st.integers(2, 20)))
    if draw(st.integers(0, 20)) == 0:
        m = draw(st.sampled_from([31, 64, 255, 256]))
    n = draw(st.integers(1, m - 1))
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        rows, groups = draw(st.integers(0, 6)), draw(st.integers(0, 9))
        if draw(st.integers(0, 40)) == 0:
            groups = 70_000 // m  # more than a thread takes at a time
        weight = draw(weights(rows, groups * m))
        old = torch.randn(weight.shape, generator=torch.Generator().manual_seed(rows))
        pairs.append((weight, pack_mask(nm_mask(old, n, m))))
    return pairs, n, m


def check_refresh(case):
    pairs, n, m = case
    filled = [(weight, mask, mask.clone()) for weight, mask in pairs if mask.numel()]
    expected = [refresh_mask_(weight, clone, n, m) for weight, _, clone in filled]
    flips, has_nan = native.refresh_(*map(list, zip(*pairs)), n, m)
    assert has_nan == any(bool(nan) for _, nan in expected)
    if not has_nan:
        assert flips == sum(int(count) for count, _ in expected)
        assert all(torch.equal(mask, clone) for _, mask, clone in filled)


@st.composite
def updates(draw, special=True):
    """Several parameters with their state: what one call of the update kernel takes."""
    moments, sparse = draw(st.sampled_from(["fp32", "8bit"])), draw(st.booleans())
    params = []
    for _ in range(draw(st.integers(1, 3))):
        if moments == "8bit":
            rows, width = draw(st.sampled_from([(64, 64), (32, 128), (16, 256), (8, 512), (43, 96), (130, 32)]))
        else:
            rows, width = draw(st.integers(0, 6)), 4 * draw(st.integers(0, 12))
        weight, grad = draw(weights(rows, width, special)), draw(weights(rows, width, special))
        state = new_moments(weight, moments)
        if draw(st.booleans()):
            _fill(state, draw(st.integers(0, 2**31)))
        params.append((weight, grad, state, pack_mask(nm_mask(grad.nan_to_num())) if sparse else None))
    lr, eps, pull = (draw(st.floats(0, 1, width=32)) for _ in range(3))
    unit = [draw(st.floats(0, 1, width=32)) for _ in range(4)]
    hyper = [lr, max(eps, 1e-8), unit[0], unit[1], pull, unit[2], unit[3]]
    return params, hyper, draw(st.sampled_from(["gradient", "mix"])), moments


def _fill(state, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        else:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))


def run_update(case):
    params, hyper, second_moment, _ = case
    keys = [key for key in MOMENT_KEYS if key in params[0][2]]
    weight, grads, states, masks = map(list, zip(*params))
    moments = {key: [state[key] for state in states] for key in keys}
    native.update_(native.Batch(weight, grads, moments, masks), hyper, second_moment)


def check_update(case):
    """Runs the kernel; where its arithmetic is that of fp32 moments on moderate values, compares it with torch's."""
    params, hyper, second_moment, moments = case
    expected = []
    for weight, grad, state, packed in params if moments == "fp32" else ():
        mask = None if packed is None else nm_mask(grad.nan_to_num())
        new = adams_update(
            weight, grad, state["exp_avg"], state["exp_avg_sq"], mask, torch.tensor(hyper), second_moment
        )
        expected.append(new)
    run_update(case)
    for (weight, _, state, _), new in zip(params, expected):
        pairs = zip((weight, state["exp_avg"], state["exp_avg_sq"]), new)
        if all(
            bool(value.isfinite().all()) and float(value.abs().amax() if value.numel() else 0) < 1e6 for value in new
        ):
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


BREAKS = [
    lambda tensor: tensor.reshape(-1)[:-1].clone(),  # shorter
    lambda tensor: torch.cat([tensor, tensor]),  # longer
    lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],  # of other strides
    lambda tensor: tensor.double(),
    lambda tensor: tensor.to(torch.int8),
    lambda tensor: tensor.to("meta"),
]


@st.composite
def sweeps(draw):
    """The tensors of one call of the kernel that prunes by SparseGPT, its columns, and its pattern."""
    m = draw(st.one_of(st.sampled_from([4, 8]), st.integers(2, 20)))
    if draw(st.integers(0, 20)) == 0:
        m = draw(st.sampled_from([64, 255, 256]))
    n = draw(st.integers(1, m - 1))
    groups, rows = draw(st.integers(1, 256 // m + 3)), draw(st.sampled_from([0, 1, 7, 8, 15, 16, 17, 40, 200]))
    first = draw(st.integers(0, groups))
    last = draw(st.integers(first, min(groups, first + 256 // m)))
    weight = draw(weights(groups * m, rows))
    generator = torch.Generator().manual_seed(rows)
    lost = weight.clone()
    lost[: first * m] = torch.randn(first * m, rows, generator=generator)
    pull = torch.randn(groups * m, groups * m, generator=generator).div_(groups * m)
    scale = torch.rand(groups * m, generator=generator) + 0.5
    inverse = torch.randn(groups, m, m, generator=generator).div_(m)
    return (weight, lost, pull, scale, inverse), range(first * m, last * m), n, m


def check_sweep(case):
    """Runs the kernel; where no scores are close and all values are moderate, compares it with torch's operators."""
    tensors, columns, n, m = case
    weight, lost, *others = tensors
    expected, expected_lost = weight.clone(), lost.clone()
    sweep_by_torch_(expected, expected_lost, *others, columns, n, m)
    before = weight.clone()
    sweep_by_kernel_(*tensors, columns, n, m)
    outside = torch.ones(len(weight), dtype=torch.bool)
    outside[columns.start : columns.stop] = False
    assert torch.equal(weight[outside].nan_to_num(), before[outside].nan_to_num())
    assert NM(n, m).violations(weight[~outside].T.contiguous()) == 0 or not bool(before.isfinite().all())
    same_masks = torch.equal(weight == 0, expected == 0)  # rounding decides between scores that are close
    if same_masks and all(bool(t.isfinite().all()) and float(t.abs().sum()) < 1e6 for t in (expected, expected_lost)):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lost, expected_lost, rtol=1e-4, atol=1e-4)


@st.composite
def broken_updates(draw):
    """An update in which one tensor is not what the kernel reads."""
    params, hyper, second_moment, moments = draw(updates())
    index = draw(st.integers(0, len(params) - 1))
    weight, grad, state, mask = params[index]
    which = draw(st.sampled_from(["weight", "grad", *state, *(["mask"] if mask is not None else [])]))
    change = draw(st.sampled_from(BREAKS))
    weight, grad = (change(t) if which == name else t for name, t in (("weight", weight), ("grad", grad)))
    mask = change(mask) if which == "mask" and mask is not None else mask
    params[index] = weight, grad, {name: change(t) if name == which else t for name, t in state.items()}, mask
    return params, hyper, second_moment, moments


def check_broken_update(case):
    """The call is refused, unless the change left the tensor as the kernel reads it (an empty one, of any shape)."""
    with contextlib.suppress(InputError, AssertionError):  # the latter of the number of scales
        run_update(case)
