"""Rounding of weights: zeros stay, errors are bounded, and GPTQ beats the nearest grid point on the layer's output."""

import pytest
import torch

from castlm.core.errors import InputError
from castlm.core.nm import nm_mask
from castlm.inference.packed import pack_integers, unpack
from castlm.inference.rounding import INT4_GROUP, Rounded, round_in_groups, round_rows


def sparse_weight(rows=24, columns=160, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~nm_mask(weight), 0)


def correlated_inputs(columns=160, tokens=2000, seed=1):
    """Most of the variance in 20 directions, as in the inputs of a language model's layers."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 20, generator=generator) @ torch.randn(20, columns, generator=generator)
    return shared + 0.3 * torch.randn(tokens, columns, generator=generator)


def plain_gptq(weight, hessian, scales, damping=0.01):
    """GPTQ as published, one row and one column at a time, with the given scales (rows, groups)."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    left, kept, codes = weight.double().clone(), weight != 0, torch.zeros_like(weight, dtype=torch.int8)
    for j in range(weight.shape[1]):
        scale = scales[:, j // INT4_GROUP].double()
        code = (left[:, j] / scale).round().clamp(-8, 7) * kept[:, j]
        codes[:, j] = code.to(torch.int8)
        error = (left[:, j] - code * scale) / upper[j, j]
        left[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return codes


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_zeros_stay_exactly_zero_and_no_group_gains_a_weight(kind):
    weight = sparse_weight()
    rounded = round_in_groups(weight) if kind == "int4" else round_rows(weight, kind)
    assert (rounded.dequantized()[weight == 0] == 0).all()
    x = correlated_inputs()
    rounded = round_in_groups(weight, x.T @ x) if kind == "int4" else rounded
    assert (rounded.dequantized()[weight == 0] == 0).all()


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_zero_is_positive_whatever_the_sign_of_its_scale(kind):
    weight = sparse_weight()
    weight[:, ::7] = -0.0
    rounded = round_in_groups(weight) if kind == "int4" else round_rows(weight, kind)
    found = rounded.dequantized()
    assert kind != "int4" or (rounded.scales < 0).any()
    assert not torch.signbit(found[found == 0]).any()
    if kind != "fp8":
        scales = rounded.scales.bfloat16() if kind == "int4" else rounded.scales
        unpacked = unpack(pack_integers(rounded.codes, scales, kind, 2, 4))
        assert torch.equal(unpacked.view(torch.int32), found.view(torch.int32))


def test_int8_errs_by_half_a_step_and_fp8_by_a_sixteenth():
    weight = sparse_weight()
    int8 = round_rows(weight, "int8")
    assert ((int8.dequantized() - weight).abs() <= int8.scales / 2 + 1e-7).all()
    fp8 = round_rows(weight, "fp8")
    assert ((fp8.dequantized() - weight).abs() <= weight.abs() / 16 + fp8.scales * 2**-10 + 1e-7).all()


def test_a_row_of_zeros_stays_one():
    weight = sparse_weight()
    weight[3] = 0
    for rounded in (round_rows(weight, "int8"), round_rows(weight, "fp8"), round_in_groups(weight)):
        assert (rounded.dequantized()[3] == 0).all()
        assert rounded.dequantized().isfinite().all()


def test_int4_scales_are_exact_in_bf16_and_codes_in_range():
    rounded = round_in_groups(sparse_weight())
    assert rounded.scales.shape == (24, 3)
    assert torch.equal(rounded.scales.bfloat16().float(), rounded.scales)
    assert rounded.codes.min() >= -8
    assert rounded.codes.max() <= 7


def test_gptq_is_the_published_loop():
    weight, x = sparse_weight(), correlated_inputs()
    rounded = round_in_groups(weight, x.T @ x, passes=0)
    expected = plain_gptq(weight, x.T @ x, rounded.scales)
    assert (rounded.codes == expected).float().mean() > 0.995  # ties of the rounding apart


def test_gptq_loses_less_of_the_output_than_the_nearest_and_every_pass_of_descent_less_still():
    weight, x = sparse_weight(), correlated_inputs()
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))

    def lost(rounded):
        error = rounded.dequantized() - weight
        return float((error @ damped * error).sum())

    nearest = lost(round_in_groups(weight))
    by_passes = [lost(round_in_groups(weight, hessian.clone(), passes=passes)) for passes in (0, 1, 2, 4)]
    assert by_passes[0] < 0.6 * nearest
    assert by_passes == sorted(by_passes, reverse=True)
    assert by_passes[3] < 0.4 * by_passes[0]


def test_columns_that_no_input_reaches_are_rounded_to_the_nearest():
    weight, x = sparse_weight(), correlated_inputs()
    x[:, 10:20] = 0
    rounded = round_in_groups(weight, x.T @ x).dequantized()
    assert rounded.isfinite().all()
    step = round_in_groups(weight, x.T @ x).scales[:, :1].abs()
    assert ((rounded - weight)[:, 10:20].abs() <= 1.5 * step).all()


def test_layers_rounded_as_one_split_again():
    rounded = round_in_groups(sparse_weight())
    parts = rounded.split([16, 8])
    assert [part.codes.shape[0] for part in parts] == [16, 8]
    assert torch.equal(torch.cat([part.dequantized() for part in parts]), rounded.dequantized())


def test_bad_input_is_named():
    weight = sparse_weight()
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        round_rows(weight, "int8")
    with pytest.raises(InputError, match="NaN or infinity"):
        round_in_groups(weight)
    assert Rounded("int8", torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 1)).dequantized().dtype is torch.float32
