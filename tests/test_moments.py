"""Moments in fewer bits: the codes are torchao's, the steps stay close to fp32's, and a resume is exact."""

import copy

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.moments import block_size, code_values, from_codes, to_codes_
from tests.fused import needs_kernels, through_torch_compile

SHAPES = [(64, 128), (128, 64), (32, 192), (64, 20), (64,)]  # the last two are kept in fp32


def optimizer_of(params, moments, *, fused=False):
    groups = [{"params": params[:2], "sparse": True}, {"params": params[2:]}]
    return AdamS(groups, lr=1e-2, total_steps=20, mask_interval=5, moments=moments, fused=fused)


def steps(params, optimizer, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) + 0.5
        optimizer.step()


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(code_values(signed), functional.create_dynamic_map(signed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_to_its_value(signed):
    every = torch.arange(256, dtype=torch.uint8)[None]
    values = from_codes(every, torch.ones(1), signed)
    assert (values.diff() > 0).all()
    codes, scale = torch.zeros_like(every), torch.zeros(1)
    to_codes_(values, codes, scale, signed)
    assert torch.equal(codes, every)


def test_blocks_lie_within_rows():
    sizes = [block_size(torch.empty(64, width)) for width in (576, 1536, 96, 80, 8192)]
    assert sizes == [64, 256, 32, 0, 256]
    assert block_size(torch.empty(4096)) == block_size(torch.empty(8, 64)) == 0


def test_bytes_of_state():
    weight = parameters()[0]
    state = optimizer_of([weight, parameters()[1]], "8bit").state[weight]
    held = sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
    assert held == weight.numel() * (2 + 8 / 128 + 1 / 8)


def test_steps_stay_close_to_those_with_fp32_moments():
    exact, coarse = parameters(), parameters()
    start = parameters()
    one, other = optimizer_of(exact, "fp32"), optimizer_of(coarse, "8bit")
    steps(exact, one, 0, 20)
    steps(coarse, other, 0, 20)
    for a, b, first in zip(exact, coarse, start):
        assert (a - b).norm() <= 0.05 * (a - first).norm()
        torch.testing.assert_close(one.momentum(a), other.momentum(b), rtol=0.05, atol=0.05)
    assert torch.equal(other.mask(coarse[0]), coarse[0] != 0)


@needs_kernels
@pytest.mark.parametrize(("moments", "tolerance"), [("fp32", 1e-5), ("8bit", 1e-3)])
def test_fused_steps_equal_the_plain_ones(moments, tolerance):
    plain, fused = parameters(), parameters()
    one, other = optimizer_of(plain, moments), optimizer_of(fused, moments, fused=True)
    steps(plain, one, 0, 20)
    steps(fused, other, 0, 20)
    for a, b in zip(plain, fused):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)
        for name in ("exp_avg", "exp_avg_sq"):
            if one.state[a][name].dtype == torch.uint8:  # a tie may go either way
                far = (one.state[a][name].int() - other.state[b][name].int()).abs()
                assert far.max() <= 1
                assert far.float().mean() < 1e-2
            else:
                torch.testing.assert_close(one.state[a][name], other.state[b][name], rtol=1e-2, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_writes_the_codes_that_torch_writes(signed):
    """One step from moments of 0 at `betas = 0` codes the gradient, or its square, as it stands."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256) * torch.logspace(-6, 2, 64)[:, None]
    optimizer = AdamS(
        [{"params": [weight], "sparse": False}], betas=(0.0, 0.0), total_steps=1, moments="8bit", fused=True
    )
    optimizer.step()
    values = weight.grad if signed else weight.grad.square()
    codes, scale = torch.zeros(64, 256, dtype=torch.uint8), torch.zeros(64)
    to_codes_(values, codes, scale, signed)
    name = "exp_avg" if signed else "exp_avg_sq"
    assert (optimizer.state[weight][name] != codes).float().mean() < 1e-3
    torch.testing.assert_close(optimizer.state[weight][f"{name}_scale"].view(-1), scale, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_compiled_steps_equal_the_plain_ones(monkeypatch):
    """The path of a GPU: 8-bit moments with masks as words."""
    plain, other = parameters()[:1], parameters()[:1]
    steps(plain, optimizer_of(plain, "8bit"), 0, 10)
    optimizer = optimizer_of(other, "8bit")
    through_torch_compile(optimizer, monkeypatch)
    steps(other, optimizer, 0, 10)
    torch.testing.assert_close(plain[0], other[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_kernels)])
def test_state_dict_resumes_bitwise(fused):
    straight, resumed = parameters(), parameters()
    first, second = (optimizer_of(params, "8bit", fused=fused) for params in (straight, resumed))
    steps(straight, first, 0, 7)
    for a, b in zip(straight, resumed):
        b.data.copy_(a.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(straight, resumed):
        for name, value in first.state[a].items():
            assert value.dtype == second.state[b][name].dtype, name
            assert torch.equal(value, second.state[b][name]), name
    steps(straight, first, 7, 20)
    steps(resumed, second, 7, 20)
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)
