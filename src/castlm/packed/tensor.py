"""Packed n:m tensors in torch: `pack` stores the kept weights and their mask, `unpack` restores the weight.

The restored weight has the same bits, except that -0.0 may become 0.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.errors import InputError, check_finite
from castlm.core.nm import NM, pack_mask, rank_mask, unpack_mask
from castlm.dtypes import FLOAT_NAMES, STORED
from castlm.packed import native
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import PackedSpec, join_codes, split_codes
from castlm_runtime.stored import StoredTensor, read_bytes

_WIDER = {"fp16": "bf16", "bf16": "fp32"}  # in range


@dataclass(frozen=True)
class PackedTensor:
    """A weight in the packed format: see `castlm_runtime.packed` for shapes and dtypes."""

    spec: PackedSpec
    values: Tensor
    mask: Tensor | None
    scales: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by suffix."""
        named = {"values": self.values, "mask": self.mask, "scales": self.scales}
        return {suffix: tensor for suffix, tensor in named.items() if tensor is not None}

    @property
    def mask_bits(self) -> Tensor | None:
        """The mask bit by bit, as from `castlm.core.nm.pack_mask`; None for a dense tensor."""
        return None if self.mask is None else torch.from_numpy(self.spec.mask_to_bits(self.mask.cpu().numpy()))

    def repack_(self, buffer: Tensor, layout: str = "best") -> None:
        """Writes the weight to `buffer` in the order in which the kernels read it; see `native.repack_`."""
        spec, values = self.spec, self.values
        form = FORMATS[spec.values]
        kernel = FORMATS[form.runs_as]
        if kernel is not form:  # int3 is widened to int4
            values = _join(_split(values, form.bits, spec.kept), kernel.bits)
        native.repack_(buffer, values, self.mask_bits, self.scales, kernel.name, spec.n, spec.m, spec.columns, layout)


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor of a safetensors file."""
    return torch.from_numpy(read_bytes(stored)).view(STORED[stored.dtype]).view(stored.shape)


def read_packed(spec: PackedSpec, parts: Mapping[str, StoredTensor]) -> PackedTensor:
    """A packed tensor of a file, from its stored tensors by suffix."""
    tensors = {suffix: read_tensor(part) for suffix, part in parts.items()}
    return PackedTensor(spec, tensors["values"], tensors.get("mask"), tensors.get("scales"))


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in bf16, fp16 or fp32.

    Raises:
        InputError: a finite value overflows in `dtype`, such as 1e5 in fp16.
    """
    cast = weight.to(dtype)
    name = FLOAT_NAMES[dtype]
    if name in _WIDER and bool(cast.isinf().any()) and bool((wide := weight.float()).isfinite().all()):
        raise InputError(f"a value of {float(wide.abs().max()):.3g} does not fit {name}: pass --dtype {_WIDER[name]}")
    return cast


def kept_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask of exactly `n` in every `m` that holds all non-zeros of `weight` (out, in): bool, like `weight`.

    A group with fewer non-zeros also keeps its first zeros, -0.0 before +0.0.

    Raises:
        InputError: a bad pattern, a width that does not divide by `m`, NaN or infinity, or a group with more non-zeros.
    """
    NM(n, m).check_shape(weight.shape)
    check_finite(f"a weight of shape {tuple(weight.shape)}", weight)
    nonzero = weight != 0
    if bool((nonzero.reshape(-1, m).sum(-1, dtype=torch.uint8 if m < 256 else torch.int64) == n).all()):
        return nonzero  # no zeros to choose from
    # Non-zeros rank first. A -0.0 comes before +0.0, because a place that is not kept comes back as +0.0.
    score = 2 * nonzero.to(torch.uint8) + torch.signbit(weight)
    mask = rank_mask(score, n, m)
    if bool((nonzero & ~mask).any()):
        raise InputError(f"a weight of shape {tuple(weight.shape)} is not {n}:{m}: prune it first")
    return mask


def pack(weight: Tensor, n: int, m: int) -> PackedTensor:
    """Packs a weight (out, in) of bf16, fp16 or fp32 whose groups hold at most `n` non-zeros in `m`.

    `unpack` returns the same bits, with one exception: a -0.0 becomes +0.0 if more than `n` entries of its group are
    not +0.0. The two compare equal.

    Args:
        n, m: the pattern; both 0 keep the weight as it is, without a mask.

    Raises:
        InputError: as `kept_mask`.
    """
    assert weight.dtype in FLOAT_NAMES, weight.dtype
    rows, columns = weight.shape
    spec = PackedSpec(rows, columns, n, m, FLOAT_NAMES[weight.dtype])
    if m == 0:
        return PackedTensor(spec, weight, None, None)
    mask = kept_mask(weight, n, m)
    # (1536, 576) at 2:4 -> (1536, 288)
    return PackedTensor(spec, weight[mask].view(rows, spec.kept), _stored_mask(mask, spec), None)


def _stored_mask(mask: Tensor, spec: PackedSpec) -> Tensor:
    return torch.from_numpy(spec.mask_to_stored(pack_mask(mask).cpu().numpy()))


def pack_integers(
    codes: Tensor, scales: Tensor, values: str, n: int, m: int, mask: Tensor | None = None
) -> PackedTensor:
    """Packs a quantized weight: `codes * scales`, with the codes zero wherever the mask is.

    Args:
        codes: int8 (out, in), within the range of `values`.
        scales: (out, scales of a row), finite, and exact in the dtype that the format stores.
        values: a format of `FORMATS` that rounds.
        n, m: the pattern; both 0 for a dense weight.
        mask: bool (out, in), exactly `n` of every `m`; None takes `kept_mask` of the codes.

    Raises:
        InputError: as `kept_mask`.
    """
    rows, columns = codes.shape
    spec = PackedSpec(rows, columns, n, m, values)
    form = FORMATS[values]
    assert tuple(scales.shape) == spec.tensors()["scales"][1]
    assert bool(scales.isfinite().all())
    low, high = map(int, codes.aminmax())
    assert -form.largest - 1 <= low
    assert high <= form.largest
    scales = scales.to(STORED[form.scale])
    kept, stored_mask = codes, None
    if m:
        mask = kept_mask(codes.float(), n, m) if mask is None else mask
        assert not bool(codes.masked_fill(mask, 0).any())
        kept, stored_mask = codes[mask].view(rows, spec.kept), _stored_mask(mask, spec)
    stored = _join(kept, form.bits) if form.bits < 8 else kept.contiguous()
    return PackedTensor(spec, stored, stored_mask, scales)


def unpack(packed: PackedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (out, in), in the dtype of its values (fp32 for integers), then cast to `dtype` if given.

    An integer zero becomes 0.0, even with a negative scale.

    Raises:
        InputError: a mask that does not keep exactly n of every m.
    """
    spec, values = packed.spec, packed.values
    if (width := FORMATS[spec.values].bits) < 8:
        values = _split(values, width, spec.kept)
    weight = values
    bits = packed.mask_bits
    if bits is not None:
        mask = unpack_mask(bits, spec.columns).to(values.device)
        groups = mask.view(spec.rows, -1, spec.m).sum(-1, dtype=torch.int32)
        if not bool((groups == spec.n).all()):
            raise InputError(f"the mask does not keep exactly {spec.n} of every {spec.m} weights: the file is damaged")
        weight = values.new_zeros(spec.rows, spec.columns)
        weight[mask] = values.reshape(-1)
    if packed.scales is not None:
        scales = packed.scales.float()
        if group := FORMATS[spec.values].group:
            scales = scales.repeat_interleave(group, dim=1)[:, : spec.columns]  # (1536, 9) -> (1536, 576)
        weight = (weight.float() * scales).add_(0.0)  # 0 times a negative scale is -0.0, which this makes 0.0
    return weight if dtype is None else weight.to(dtype)


def _join(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (rows, width) in two's complement as uint8 (rows, ceil(width * bits / 8))."""
    unsigned = (codes & (1 << bits) - 1).to("cpu", torch.uint8)
    return torch.from_numpy(join_codes(unsigned.numpy(), bits)).to(codes.device)


def _split(stored: Tensor, bits: int, width: int) -> Tensor:
    """The opposite of `_join`: int8 (rows, width)."""
    unsigned = torch.from_numpy(split_codes(stored.cpu().numpy(), bits, width)).to(stored.device, torch.int8)
    sign = 1 << bits - 1
    return (unsigned ^ sign) - sign  # extends the sign: of 4 bits, 0b1000 is -8 and 0b0111 is 7
