"""The kernels of castlm-runtime as operators of torch, `linear` and `rows`, and the modules that hold their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from castlm_runtime import library
from castlm_runtime.errors import InputError
from castlm_runtime.packed import PackedArray

_DIRECT_ROWS = 128
"""Rows of x that the kernels always multiply. More rows take torch's GEMM where it is faster."""

_SCRATCH_BYTES = 2 << 20

_LIBRARY = torch.library.Library("castlm_vllm", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, int out_features) -> Tensor")
_LIBRARY.define("rows(Tensor numbers, Tensor weight, int columns) -> Tensor")


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    most = _DIRECT_ROWS
    if len(rows) > most:
        most = library.rows_at_a_time(weight.data_ptr(), weight.numel())
    if most == 0:
        out = _by_gemm(rows.float(), weight, out_features)
    else:
        wide = rows if rows.dtype is torch.bfloat16 else rows.float()
        out = wide.new_empty(len(rows), out_features)
        for part, of_part in zip(wide.contiguous().split(most), out.split(most)):
            _multiply(part, weight, of_part)
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes x @ W.T to `out`; x is (rows, in) in fp32 or bf16."""
    if not len(x):
        return
    code = library.built().castlm_multiply(
        *(weight.data_ptr(), weight.numel()),
        *(x.data_ptr(), x.dtype is torch.bfloat16, *x.shape),
        *(out.data_ptr(), out.shape[1], torch.get_num_threads()),
    )
    library.check_memory(code)
    if code:
        raise InputError(f"x of shape {tuple(x.shape)} does not fit this packed weight of {out.shape[1]} outputs")


def _by_gemm(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    """x @ W.T in fp32, one part of the weight at a time, whose floats stay in the cache."""
    out = x.new_empty(len(x), out_features)
    step = max(1, _SCRATCH_BYTES // (4 * x.shape[1] * 8)) * 8  # whole tiles
    scratch = x.new_empty(min(step, out_features), x.shape[1])
    for first in range(0, out_features, step):
        part = scratch[: min(step, out_features - first)]
        code = library.built().castlm_unpack(
            *(weight.data_ptr(), weight.numel(), first, first + len(part)),
            *(part.data_ptr(), part.numel(), torch.get_num_threads()),
        )
        library.check_memory(code)
        assert not code
        torch.mm(x, part.T, out=out[:, first : first + len(part)])
    return out


@torch.library.impl(_LIBRARY, "linear", "Meta")
def _shape_of_linear(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(_LIBRARY, "rows", "CPU")
def _rows(numbers: Tensor, weight: Tensor, columns: int) -> Tensor:
    numbers = numbers.long().contiguous()
    out = torch.empty(*numbers.shape, columns)
    code = library.built().castlm_gather(
        *(weight.data_ptr(), weight.numel(), numbers.data_ptr(), numbers.numel()),
        *(out.data_ptr(), columns, torch.get_num_threads()),
    )
    library.check_memory(code)
    if code:
        raise IndexError(f"a table of {columns} columns has not all of the rows {numbers.min()} to {numbers.max()}")
    return out


@torch.library.impl(_LIBRARY, "rows", "Meta")
def _shape_of_rows(numbers: Tensor, weight: Tensor, columns: int) -> Tensor:
    return torch.empty(*numbers.shape, columns, device="meta")


class Repacked(nn.Module):
    """A weight in the order in which this processor reads it: multiplied by, and looked up row by row."""

    def __init__(self, weight: PackedArray):
        super().__init__()
        self.rows, self.columns = weight.spec.rows, weight.spec.columns
        buffer = library.allocate(weight.repacked_bytes)
        weight.repack_(buffer, torch.get_num_threads())
        self.register_buffer("buffer", torch.from_numpy(buffer), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.castlm_vllm.linear(x, self.buffer, self.rows)

    def look_up(self, numbers: Tensor) -> Tensor:
        """Rows in fp32, (*numbers.shape, columns)."""
        return torch.ops.castlm_vllm.rows(numbers, self.buffer, self.columns)
