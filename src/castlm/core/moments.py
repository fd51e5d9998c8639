"""How AdamS keeps its two moments: fp32, the first in bf16, or both in 8 bits a weight with a scale a block.

The 8-bit codes are torchao's (dynamic map, block-wise: Dettmers et al. 2021, arXiv 2110.02861), kept as plain tensors
whose rows line up with the weight's, so that they are sharded and saved like every other state.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.shards import like_rows, local

MOMENTS = ("fp32", "bf16", "8bit")
MOMENT_KEYS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
_LONGEST, _SHORTEST = 256, 32  # weights that share a scale
_LEAST = 4096  # a parameter of fewer weights keeps its moments in its own dtype


def new_moments(param: Tensor, moments: str) -> dict[str, Tensor]:
    """Zero moments of `param` as optimizer state.

    `exp_avg` and `exp_avg_sq` are shaped and placed like it, in its dtype or as `moments` says. In 8 bits they are
    uint8 codes, and `exp_avg_scale` and `exp_avg_sq_scale` (out, in / block) fp32 stand beside them, where `param` is a
    matrix of at least 4,096 weights whose width divides by 32; others keep theirs in their own dtype.
    """
    block = block_size(param) if moments == "8bit" else 0
    if not block:
        first = torch.bfloat16 if moments == "bf16" else param.dtype
        return {
            "exp_avg": torch.zeros_like(param, dtype=first, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }
    rows, width = local(param).shape
    state = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int(code_map(signed).abs().argmin())
        state[name] = torch.full_like(param, zero, dtype=torch.uint8)
        state[f"{name}_scale"] = like_rows(torch.zeros(rows, width // block, device=param.device), param)
    return state


def block_size(param: Tensor) -> int:
    """Weights that share a scale: the largest power of 2 up to 256 that divides the width; 0 where it is below 32."""
    if param.dim() != 2 or param.numel() < _LEAST:
        return 0
    block = min(_LONGEST, param.shape[1] & -param.shape[1])
    return block if block >= _SHORTEST else 0


@functools.cache
def code_map(signed: bool) -> Tensor:
    """The (256,) fp32 values of the codes, rising, in [-1, 1] or [0, 1]. Raises `InputError` without torchao."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError:
        raise InputError("moments in 8 bits need torchao: pip install torchao") from None
    return torch.tensor(create_dynamic_map(signed=signed))


def from_codes(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """fp32 (numel,) of uint8 `codes` (numel,) under `scale` (numel / block,)."""
    return (values[codes.int()].view(scale.shape[0], -1) * scale[:, None]).view(-1)


def to_codes_(new: Tensor, codes: Tensor, scale: Tensor, values: Tensor) -> None:
    """Writes `new` (numel,) into `codes` and `scale`: of each block the largest magnitude, and the nearest code."""
    blocks = new.view(scale.shape[0], -1)
    largest = blocks.abs().amax(dim=1).clamp(min=1e-30)
    between = (values[1:] + values[:-1]) / 2
    codes.copy_(torch.bucketize((blocks / largest[:, None]).view(-1), between))
    scale.copy_(largest)
