"""The kernels of castlm-runtime on tensors of torch: converts a weight to a buffer, and multiplies x by it."""

from __future__ import annotations

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.dtypes import STORED
from castlm_runtime import library
from castlm_runtime.formats import FORMATS, PACKABLE
from castlm_runtime.library import (
    LONGEST_GROUP,
    NOT_BUILT,
    built,
    check_memory,
    has_kernels,
    kernels,
    level,
    levels,
    load_kernels,
    longest_free_group,
    packed_bytes,
    trim_memory,
    use_level,
)

__all__ = [
    "LONGEST_GROUP",
    "NOT_BUILT",
    "built",
    "has_kernels",
    "kernels",
    "level",
    "levels",
    "load_kernels",
    "longest_free_group",
    "packed_bytes",
    "trim_memory",
    "use_level",
]

_DTYPES = {name: STORED[FORMATS[name].stored] for name in PACKABLE}


def allocate(num_bytes: int) -> Tensor:
    """A uint8 buffer (num_bytes,) on huge pages: see `castlm_runtime.library.allocate`."""
    return torch.from_numpy(library.allocate(num_bytes))


def repack_(
    buffer: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scales: Tensor | None,
    kind: str,
    n: int,
    m: int,
    columns: int,
    layout: str = "best",
) -> None:
    """Writes a matrix into `buffer`, in the order in which the kernels read it.

    Args:
        buffer: uint8 (packed_bytes(...),), contiguous.
        values: (rows, kept) bf16, fp16, fp32 or int8; or uint8 (rows, ceil(kept * bits / 8))
            of int6 and int4.
        mask: uint8 (rows, ceil(columns / 8)); None for a dense matrix.
        scales: (rows, 1) of int8, (rows, ceil(columns / 64)) of int6 and int4; else None.
        kind: a name of PACKABLE.

    Raises:
        InputError: a mask that does not keep exactly `n` of every `m`.
        MemoryError: there is no memory for the threads.
    """
    values = values.contiguous()
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")  # whatever the default dtype and device
    mask = nothing if mask is None else mask.contiguous()
    scales = nothing.float() if scales is None else scales.to(torch.float32).contiguous()
    _check_plain("the buffer", buffer, torch.uint8)
    _check_plain("values", values, _DTYPES[kind])
    _check_plain("the mask", mask, torch.uint8)
    _check_plain("scales", scales, torch.float32)
    library.repack(
        (buffer.data_ptr(), buffer.nbytes),
        (values.data_ptr(), values.nbytes),
        (mask.data_ptr(), mask.nbytes),
        (scales.data_ptr(), scales.numel()),
        kind,
        n,
        m,
        (len(values), columns),
        torch.get_num_threads(),
        layout,
    )


def rows_at_a_time(packed: Tensor) -> int:
    """The number of rows of x that `multiply` should take at once: see `castlm_runtime.library.rows_at_a_time`."""
    _check_plain("a packed weight", packed, torch.uint8)
    return library.rows_at_a_time(packed.data_ptr(), packed.numel())


def multiply(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """`x @ W.T` for x (..., in) fp32 or bf16, contiguous, on a CPU, and the buffer of W (out, in): (..., out).

    Raises:
        InputError: x of another width, or a buffer that `repack_` did not fill.
        MemoryError: there is no memory for the sums and the activations.
    """
    shape, dtype = x.shape, x.dtype
    assert shape, "x has no dimension"
    assert x.is_cpu, x.device
    assert x.is_contiguous()
    assert dtype is torch.float32 or dtype is torch.bfloat16, dtype
    _check_plain("a packed weight", packed, torch.uint8)
    width, out = shape[-1], x.new_empty((*shape[:-1], out_features))
    data, size, num_rows = packed.data_ptr(), packed.numel(), x.numel() // (width or 1)
    is_bf16, threads = dtype is torch.bfloat16, torch.get_num_threads()
    multiply_by = built().castlm_multiply  # a small layer takes as long as the Python around this call
    code = multiply_by(data, size, x.data_ptr(), is_bf16, num_rows, width, out.data_ptr(), out_features, threads)
    if code:
        check_memory(code)
        raise InputError(f"x of shape {tuple(shape)} does not fit this packed weight of {out_features} outputs")
    return out


def unpack(packed: Tensor, first: int, last: int, out: Tensor) -> None:
    """Writes rows [first, last) of the matrix in `packed` to `out` (last - first, in), fp32, contiguous.

    Raises:
        MemoryError: there is no memory for the threads.
    """
    _check_plain("a packed weight", packed, torch.uint8)
    _check_plain("unpacked rows", out, torch.float32)
    code = built().castlm_unpack(
        packed.data_ptr(), packed.numel(), first, last, out.data_ptr(), out.numel(), torch.get_num_threads()
    )
    check_memory(code)
    assert not code, f"rows {first} to {last} of shape {tuple(out.shape)} do not fit this packed weight"


def gather(packed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Rows of the matrix in `packed`, fp32 (*rows.shape, columns).

    Args:
        rows: their numbers, int64, contiguous.

    Raises:
        IndexError: a number that the matrix does not have.
        MemoryError: there is no memory for the threads.
    """
    _check_plain("a packed weight", packed, torch.uint8)
    _check_plain("numbers of rows", rows, torch.int64)
    out = torch.empty(*rows.shape, columns, device="cpu")
    data, size, threads = packed.data_ptr(), packed.numel(), torch.get_num_threads()
    code = built().castlm_gather(data, size, rows.data_ptr(), rows.numel(), out.data_ptr(), columns, threads)
    check_memory(code)
    if code:
        low, high = map(int, rows.aminmax())
        raise IndexError(f"a table of {columns} columns has not all of the rows {low} to {high}")
    return out


def _check_plain(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Asserts that the kernels can read `tensor` by its address."""
    assert tensor.is_cpu, f"{name} is on {tensor.device}"
    assert tensor.dtype is dtype, f"{name} is {tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous(), name
