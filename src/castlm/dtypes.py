"""Names of dtypes: "bf16" in options, records and the packed format, "BF16" in safetensors files."""

from __future__ import annotations

import torch

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of a result's weights, by their names in options."""
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of stored tensors, by their names in safetensors."""
STORED_NAMES = {dtype: name for name, dtype in STORED.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in config.json and records, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8, 1-D on the CPU; a view if the tensor is contiguous on the CPU.

    An axis of size 1 may have any stride, which `flatten` keeps and `view` refuses.
    """
    dense = tensor.detach().cpu().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def equal_in_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; -0.0 and +0.0 differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bytes_of(one), bytes_of(other))
