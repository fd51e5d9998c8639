"""Calls the C++ kernels of castlm-runtime through ctypes: converts a weight to a buffer, and multiplies x by it.

The signatures match `kernels.cpp` and `decoder.cpp`, which check every size again. Without the library, `kernels()`
returns None.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.native import load_library
from castlm.dtypes import STORED
from castlm.formats.table import FORMATS
from castlm_runtime import library as runtime_library

NOT_BUILT = runtime_library.NOT_BUILT

VALUES = {form.name: form.kernel for form in FORMATS.values() if form.kernel is not None}
"""Codes of the stored values, as in `Values` of matrix.h."""

LAYOUTS = {"best": -1, "rows": 0, "panels": 1, "dense": 2, "lanes": 3}
"""Codes of the layouts in memory; "best" is the fastest that this processor and the pattern allow."""

LONGEST_GROUP = 64
"""Columns of a mask that the kernels read at a time: they take every n:m whose m divides it."""

_DTYPES = {name: STORED[FORMATS[name].stored] for name in VALUES}
_INTEGERS = {code for name, code in VALUES.items() if FORMATS[name].rounds}
_LEVEL_VARIABLE = "CASTLM_CPU_LEVEL"
_VERSION = 9  # of kernels.cpp
_HEADER = struct.Struct("6i")  # a buffer begins with its magic number, layout, values, n, m, and whether it is unsigned
_HEADER_BYTES, _BLOCK = 64, 64  # as in matrix.h
_LANE_COLUMNS = {"int8": 4, "bf16": 2}  # columns in a lane of the layout "lanes", of others than int4; 1 of the rest
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # Linux; the module mmap has it from Python 3.13 on
_BAD_MASK, _NO_MEMORY = 2, 3


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, or None if it was not built. Raises `InputError` if it belongs to another version of castlm."""
    file = runtime_library.path()
    return load_kernels(file) if file else None


def load_kernels(file: str) -> ctypes.CDLL:
    """Loads the library in `file`. Raises `InputError` if it belongs to another version of castlm."""
    library = load_library(file, "castlm_inference_version", _VERSION)
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    matrix = [number, number, number, number, size, size]
    library.castlm_level_name.restype = ctypes.c_char_p
    library.castlm_packed_bytes.argtypes, library.castlm_packed_bytes.restype = matrix, size
    library.castlm_repack.argtypes = [*matrix, pointer, size, pointer, size, pointer, size, pointer, size, number]
    library.castlm_multiply.argtypes = [pointer, size, pointer, number, size, size, pointer, size, number]
    library.castlm_decode.argtypes = [pointer, pointer, size, pointer, pointer, number]
    library.castlm_read_prompt.argtypes = [pointer, size, size, pointer, pointer, number]
    library.castlm_unpack.argtypes = [pointer, size, size, size, pointer, size, number]
    if os.environ.get(_LEVEL_VARIABLE):
        use_level(os.environ[_LEVEL_VARIABLE], library)
    return library


def level() -> str:
    """The name of the kernels in use: the fastest for this processor, unless `use_level` set another."""
    return _level_names(built())[built().castlm_level()]


@functools.cache
def _level_names(library: ctypes.CDLL) -> tuple[str, ...]:
    """The instruction sets that there are kernels for, the faster ones later: `kLevels` of matrix.h."""
    found: list[str] = []
    while name := library.castlm_level_name(len(found)):
        found.append(name.decode())
    return tuple(found)


def longest_free_group(n: int, m: int) -> int:
    """The longest group in which this processor's kernels take the share n / m of weights nearly as fast as in groups
    of four: `m` itself where no longer one is known to be.

    With AVX-512 integers of all groups have the speed of 2:4, and floats decode at 0.7 to 1.0 of it. With AVX2 alone
    this is 16 for half of the weights: 8:16 decodes at 0.8 to 1.0 of the speed of 2:4, 32:64 at 0.6 to 0.9
    (docs/performance.md).
    """
    if kernels() is None:
        return m
    if level() in ("avx512", "amx"):
        return LONGEST_GROUP
    return 16 if level() == "avx2" and 2 * n == m else m


def levels(library: ctypes.CDLL | None = None) -> tuple[str, ...]:
    """The levels that this processor supports, the fastest last; empty if the kernels were not built."""
    library = library or kernels()
    if library is None:
        return ()
    return tuple(level for number, level in enumerate(_level_names(library)) if library.castlm_runs(number))


def use_level(name: str, library: ctypes.CDLL | None = None) -> None:
    """Selects the kernels of an instruction set in this process, as the environment variable `CASTLM_CPU_LEVEL` does.

    Buffers from another level may be refused afterwards: pack again.

    Raises:
        InputError: an unknown name, or an instruction set that this processor lacks.
    """
    library = library or built()
    names = _level_names(library)
    if name not in names or library.castlm_set_level(names.index(name)):
        raise InputError(f"there are no kernels of {name!r} here: choose one of {', '.join(levels(library))}")


def built() -> ctypes.CDLL:
    """The library. Raises `InputError` if it was not built."""
    library = kernels()
    if library is None:
        raise InputError(NOT_BUILT)
    return library


def packed_bytes(values: str, n: int, m: int, rows: int, columns: int, layout: str = "best") -> int:
    """Bytes of the buffer of a matrix (rows, columns), whose width divides by `m`; `m` = 0 means dense."""
    size = int(built().castlm_packed_bytes(LAYOUTS[layout], VALUES[values], n, m, rows, columns))
    assert size >= 0, f"there is no kernel for a {rows} x {columns} weight, {n}:{m} of {values}, layout {layout}"
    return size


def allocate(num_bytes: int) -> Tensor:
    """A uint8 buffer (num_bytes,) on huge pages where the system has them, aligned to one.

    If memory bandwidth is the limit, reading weights from 2 MB pages is about 1.5 times as fast as from 4 kB pages.
    """
    room = torch.empty(num_bytes + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % _HUGE_PAGE
    if sys.platform == "linux" and num_bytes >= _HUGE_PAGE:
        libc = ctypes.CDLL(None)
        length = num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        # A refusal only costs speed.
        libc.madvise(ctypes.c_void_p(room.data_ptr() + start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return room[start : start + num_bytes]


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
        values: (rows, kept) bf16, fp16, fp32 or int8; or uint8 (rows, ceil(kept / 2)) of int4.
        mask: uint8 (rows, ceil(columns / 8)); None for a dense matrix.
        scales: (rows, 1) of int8, (rows, ceil(columns / 64)) of int4; else None.
        kind: a name of VALUES.

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
    code = built().castlm_repack(
        *(LAYOUTS[layout], VALUES[kind], n, m, len(values), columns),
        *(values.data_ptr(), values.nbytes, mask.data_ptr(), mask.nbytes, scales.data_ptr(), scales.numel()),
        *(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads()),
    )
    _check_memory(code)
    if code == _BAD_MASK:
        raise InputError(f"the mask does not keep exactly {n} of every {m} weights: the file is damaged")
    assert not code, f"values, mask and scales do not fit a {n}:{m} {kind} weight of width {columns}"


@dataclass(frozen=True)
class DenseOrder:
    """Where the buffer of a dense matrix (rows, columns) has its values.

    Attributes:
        rows: rows of a tile.
        columns: columns of a step, in which the rows of a tile follow each other.
        added: what is added to each value of int8.
    """

    rows: int
    columns: int
    added: int


def has_kernels(m: int) -> bool:
    """Whether there are kernels for n of every `m` weights; `m` = 0 is dense."""
    return m == 0 or _BLOCK % m == 0


def dense_order(packed: Tensor, values: str) -> DenseOrder:
    """The order of the buffer of a dense matrix of any values but int4."""
    _, layout, _, _, _, is_unsigned = _HEADER.unpack(ctypes.string_at(packed.data_ptr(), _HEADER.size))
    if layout == LAYOUTS["lanes"]:
        return DenseOrder(16, _LANE_COLUMNS.get(values, 1), 128 * is_unsigned)
    return DenseOrder(4, _BLOCK, 0)


def dense_table(
    packed: Tensor, order: DenseOrder, values: str, rows: int, columns: int
) -> tuple[Tensor, Tensor | None]:
    """Views of the buffer of a dense matrix (rows, columns) of any values but int4.

    Returns:
        The values (tiles, blocks, steps, tile rows, step columns), with row r, column c of a block of 64 columns at
        [r // tile rows, block, c // step columns, r % tile rows, c % step columns]; and the scales (rows,) fp32 for
        int8, None for floats.
    """
    dtype, tiles, blocks = _DTYPES[values], -(-rows // order.rows), -(-columns // _BLOCK)
    end = _HEADER_BYTES + tiles * order.rows * blocks * _BLOCK * dtype.itemsize
    shape = (tiles, blocks, _BLOCK // order.columns, order.rows, order.columns)
    table = packed[_HEADER_BYTES:end].view(torch.uint8 if order.added else dtype).view(shape)
    return table, packed[end : end + 4 * rows].view(torch.float32) if FORMATS[values].rounds else None


def rows_at_a_time(packed: Tensor) -> int:
    """The number of rows of x that `multiply` should take at once, if x has many; 0 if the library's GEMM is faster.

    The kernels take integers from AVX2 on, so that prompts are rounded as in decoding, and floats with AVX-512, or with
    AVX2 in the layout "lanes".
    docs/performance.md has the speeds, measured by `benchmarks.levels`.
    """
    _check_plain("a packed weight", packed, torch.uint8)
    if packed.numel() < _HEADER.size:
        return 0  # both ways refuse it
    _, layout, values, _, _, _ = _HEADER.unpack(ctypes.string_at(packed.data_ptr(), _HEADER.size))
    if layout == LAYOUTS["lanes"] and level() in ("avx2", "avx512", "amx"):
        return 512
    return 512 if layout != LAYOUTS["rows"] and level() == "avx2" and values in _INTEGERS else 0


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
        _check_memory(code)
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
    _check_memory(code)
    assert not code, f"rows {first} to {last} of shape {tuple(out.shape)} do not fit this packed weight"


def decode(decoders: Sequence[int], positions: Sequence[int], embeddings: Tensor, logits: Tensor) -> None:
    """Computes the logits of one token of each sequence by `castlm_decode`.

    Args:
        decoders: addresses of the `Decoder` (decoder.h) of each of `count` sequences of one model.
        positions: the number of tokens before the new one, for each sequence.
        embeddings: embeddings of the tokens, (count, hidden) fp32, contiguous.
        logits: (count, vocabulary) fp32, contiguous; written.

    Raises:
        MemoryError: there is no memory for the activations.
    """
    _check_plain("embeddings", embeddings, torch.float32)
    _check_plain("logits", logits, torch.float32)
    library, threads, count = built(), torch.get_num_threads(), len(decoders)
    addresses, places = (ctypes.c_void_p * count)(*decoders), (ctypes.c_int64 * count)(*positions)
    code = library.castlm_decode(addresses, places, count, embeddings.data_ptr(), logits.data_ptr(), threads)
    _check_memory(code)
    assert not code, "a size does not fit"


def read_prompt(decoder: int, position: int, embeddings: Tensor, logits: Tensor) -> None:
    """Computes the logits of the last of some tokens of a prompt by `castlm_read_prompt`.

    Args:
        decoder: address of the `Decoder` (decoder.h) of the sequence.
        position: the number of tokens before these.
        embeddings: embeddings of the tokens, (count, hidden) fp32, contiguous.
        logits: (1, vocabulary) fp32, contiguous; written.

    Raises:
        MemoryError: there is no memory for the activations.
    """
    _check_plain("embeddings", embeddings, torch.float32)
    _check_plain("logits", logits, torch.float32)
    library, threads, count = built(), torch.get_num_threads(), len(embeddings)
    code = library.castlm_read_prompt(decoder, position, count, embeddings.data_ptr(), logits.data_ptr(), threads)
    _check_memory(code)
    assert not code, "a size does not fit"


def _check_plain(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Asserts that the kernels can read `tensor` by its address."""
    assert tensor.is_cpu, f"{name} is on {tensor.device}"
    assert tensor.dtype is dtype, f"{name} is {tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous(), name


def _check_memory(code: int) -> None:
    if code == _NO_MEMORY:
        raise MemoryError("not enough memory for the CPU kernels: take fewer tokens at a time, or free memory")


def trim_memory() -> None:
    """Returns freed memory that the C library keeps (glibc) to the system, for example after loading a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
