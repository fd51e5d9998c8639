"""Moments in fewer bits: the codes are torchao's, the steps stay close to fp32's, and a resume is exact."""

import copy

import pytest
import torch
from torch import nn

from castlm.core.adams import AdamS
from castlm.core.moments import block_size, from_codes, to_codes_

SHAPES = [(64, 128), (128, 64), (32, 192), (64, 20), (64,)]  # the last two are kept in fp32


def optimizer_of(params, moments, *, compile=False):
    groups = [{"params": params[:2], "sparse": True}, {"params": params[2:]}]
    return AdamS(groups, lr=1e-2, total_steps=20, mask_interval=5, moments=moments, compile=compile)


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
def test_codes_are_those_of_torchao(signed):
    subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
    torch.manual_seed(0)
    values = torch.randn(64, 256) * torch.logspace(-6, 2, 64)[:, None]
    values = values if signed else values.square()
    theirs = subclass_8bit.OptimState8bit.zeros(values.shape, signed=signed, block_size=64)
    theirs.copy_(values)
    codes, scale = torch.zeros(values.numel() // 64, 64, dtype=torch.uint8), torch.zeros(values.numel() // 64)
    to_codes_(values.view(-1, 64), codes, scale, signed)
    differ = codes.view_as(values) != theirs.codes
    assert differ.float().mean() < 1e-3  # a tie may go either way
    mine = from_codes(codes, scale, signed).view_as(values)
    torch.testing.assert_close(mine[~differ], theirs.dequantize()[~differ], rtol=1e-5, atol=0)


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


@pytest.mark.parametrize(("moments", "bytes_a_weight"), [("bf16", 6 + 1 / 8), ("8bit", 2 + 8 / 128 + 1 / 8)])
def test_bytes_of_state(moments, bytes_a_weight):
    weight = parameters()[0]
    state = optimizer_of([weight, parameters()[1]], moments).state[weight]
    held = sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
    assert held == weight.numel() * bytes_a_weight


@pytest.mark.parametrize(("moments", "tolerance"), [("bf16", 0.01), ("8bit", 0.05)])
def test_steps_stay_close_to_those_with_fp32_moments(moments, tolerance):
    exact, coarse = parameters(), parameters()
    start = parameters()
    one, other = optimizer_of(exact, "fp32"), optimizer_of(coarse, moments)
    steps(exact, one, 0, 20)
    steps(coarse, other, 0, 20)
    for a, b, first in zip(exact, coarse, start):
        assert (a - b).norm() <= tolerance * (a - first).norm()
        torch.testing.assert_close(one.momentum(a), other.momentum(b), rtol=0.05, atol=0.05)
    assert torch.equal(other.mask(coarse[0]), coarse[0] != 0)


def test_compiled_steps_equal_the_plain_ones():
    plain, compiled = parameters()[:1], parameters()[:1]
    steps(plain, optimizer_of(plain, "8bit"), 0, 10)
    steps(compiled, optimizer_of(compiled, "8bit", compile=True), 0, 10)
    for a, b in zip(plain, compiled):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_state_dict_resumes_bitwise(moments):
    straight, resumed = parameters(), parameters()
    first, second = optimizer_of(straight, moments), optimizer_of(resumed, moments)
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
