"""`torch.ops.castlm.packed_linear`: a packed weight times activations, with a shape that `torch.compile` can trace.

The packed weight is multiplied directly where that is the fastest way. Else many rows of x take the library's GEMM: a
part of the weight at a time is unpacked to an fp32 scratch that stays in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from castlm.core.errors import InputError
from castlm.inference import native

DIRECT_ROWS = 128
"""Rows of x that the kernels always multiply. More rows take the library's GEMM where `native.rows_at_a_time` says that
it is faster."""

_SCRATCH_BYTES = 2 << 20
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = torch.library.Library("castlm", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor packed, int out_features) -> Tensor")


@torch.library.impl(_LIBRARY, "packed_linear", "CPU")
def _packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    if not x.dtype.is_floating_point:
        raise InputError(f"a packed layer multiplies floating-point activations, not {x.dtype}")
    num_rows = math.prod(x.shape[:-1])
    if num_rows == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if num_rows > DIRECT_ROWS and x.numel():  # `multiply` refuses rows without columns
        most = native.rows_at_a_time(packed)
        if num_rows > most:
            rows = x.reshape(num_rows, -1)
            out = _in_parts(rows, packed, out_features, most) if most else multiply_by_gemm(rows, packed, out_features)
            return out.view(*x.shape[:-1], out_features)
    return _by_kernels(x, packed, out_features)


def _by_kernels(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    if x.dtype not in _KERNEL_DTYPES:
        return native.multiply(x.float().contiguous(), packed, out_features).to(x.dtype)
    return native.multiply(x.contiguous(), packed, out_features)


def _in_parts(x: Tensor, packed: Tensor, out_features: int, most: int) -> Tensor:
    """Of x (rows, in), `most` rows at a time, which bounds the scratch of the kernels."""
    out = x.new_empty(len(x), out_features)
    for rows, part in zip(x.split(most), out.split(most)):
        part.copy_(_by_kernels(rows, packed, out_features))
    return out


def multiply_by_gemm(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """Of x (rows, in) in fp32: a CPU without units for 16-bit products is slower in any other dtype."""
    wide = x.float()
    out = wide.new_empty(len(x), out_features)
    step = max(1, _SCRATCH_BYTES // (4 * x.shape[1] * 8)) * 8  # whole tiles
    scratch = wide.new_empty(min(step, out_features), x.shape[1])
    for first in range(0, out_features, step):
        part = scratch[: min(step, out_features - first)]
        native.unpack(packed, first, first + len(part), part)
        torch.mm(wide, part.T, out=out[:, first : first + len(part)])
    return out.to(x.dtype)


@torch.library.impl(_LIBRARY, "packed_linear", "Meta")
def _shape_of_packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """`x @ W.T`, (..., in) -> (..., out) in the dtype of x; `packed` is the buffer of W (out, in).

    A plain tensor on a CPU is multiplied without a detour through the dispatcher: 5.6 us a call instead of 7.9 us.
    Tracers and transforms (`torch.compile`, `make_fx`, `torch.jit.trace`, `torch.func`) see the operator.

    Raises:
        InputError: x needs a gradient, which packed weights do not pass on.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("packed layers pass no gradients on: train the model that was packed, or castlm unpack it")
    if (
        type(x) is Tensor
        and x.is_cpu
        and not (is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() or _get_tracing_state())
    ):
        return _packed_linear(x, packed, out_features)
    return torch.ops.castlm.packed_linear.default(x, packed, out_features)
