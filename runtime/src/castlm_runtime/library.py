"""The compiled kernels, called through ctypes on addresses: repacks weights, multiplies by them.

C++ checks every size again. `castlm_runtime.model` calls the engine, which runs a whole model; `castlm` and its plugin
for vLLM call single products on tensors of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from castlm_runtime.errors import InputError
from castlm_runtime.formats import FORMATS

NOT_BUILT = "the C++ kernels of castlm-runtime were not built: install it again (pip install ./runtime in the clone)"

VALUES = {form.name: form.kernel for form in FORMATS.values() if form.kernel is not None}
"""Codes of the stored values, as in `Values` of matrix.h."""

LAYOUTS = {"best": -1, "rows": 0, "panels": 1, "dense": 2, "lanes": 3}
"""Codes of the layouts in memory; "best" is the fastest that this processor and the pattern allow."""

LONGEST_GROUP = 64
"""Columns of a mask that the kernels read at a time: they take every n:m whose m divides it."""

INTEGERS = {code for name, code in VALUES.items() if FORMATS[name].rounds}
"""Codes of the values that have scales."""
HEADER = struct.Struct("6i")  # a buffer begins with its magic number, layout, values, n, m, and whether it is unsigned
HEADER_BYTES = 64
_LEVEL_VARIABLE = "CASTLM_CPU_LEVEL"
_VERSION = 10  # of kernels.cpp
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # of Linux; the module mmap has it where it was built with it
_BAD_MASK, _NO_MEMORY = 2, 3


def path() -> str | None:
    """The file of the compiled kernels, or None if they were not built."""
    file = Path(__file__).with_name("_kernels.so")
    return str(file) if file.is_file() else None


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, or None if it was not built. Raises `InputError` if it is of another version."""
    file = path()
    return load_kernels(file) if file else None


def load_kernels(file: str) -> ctypes.CDLL:
    """Loads the library in `file`. Raises `InputError` if it is of another version."""
    library = ctypes.CDLL(file)
    if ctypes.c_int32.in_dll(library, "castlm_inference_version").value != _VERSION:
        raise InputError(f"{file} belongs to another version of castlm-runtime: install it again")
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    matrix = [number, number, number, number, size, size]
    library.castlm_level_name.restype = ctypes.c_char_p
    library.castlm_packed_bytes.argtypes, library.castlm_packed_bytes.restype = matrix, size
    library.castlm_repack.argtypes = [*matrix, pointer, size, pointer, size, pointer, size, pointer, size, number]
    library.castlm_multiply.argtypes = [pointer, size, pointer, number, size, size, pointer, size, number]
    library.castlm_unpack.argtypes = [pointer, size, size, size, pointer, size, number]
    library.castlm_gather.argtypes = [pointer, size, pointer, size, pointer, size, number]
    library.castlm_sample.argtypes = [pointer, size, size, pointer, size, size, pointer, pointer, pointer, number]
    if os.environ.get(_LEVEL_VARIABLE):
        use_level(os.environ[_LEVEL_VARIABLE], library)
    return library


def built() -> ctypes.CDLL:
    """The library. Raises `InputError` if it was not built."""
    library = kernels()
    if library is None:
        raise InputError(NOT_BUILT)
    return library


def level() -> str:
    """The name of the kernels in use: the fastest for this processor, unless `use_level` set another."""
    names = _level_names(built())
    return names[int(built().castlm_level())]


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


def rows_at_a_time(buffer: int, num_bytes: int) -> int:
    """The number of rows of x that the kernels should take at once, if x has many; 0 if a library's GEMM is faster.

    The kernels take integers from AVX2 on, so that prompts are rounded as in decoding, and floats with AVX-512, or with
    AVX2 in the layout "lanes".
    docs/performance.md has the speeds, measured by `benchmarks.levels`.

    Args:
        buffer: the address of a weight that `repack` wrote.
    """
    if num_bytes < HEADER.size:
        return 0  # both ways refuse it
    _, layout, values, _, _, _ = HEADER.unpack(ctypes.string_at(buffer, HEADER.size))
    if layout == LAYOUTS["lanes"] and level() in ("avx2", "avx512", "amx"):
        return 512
    return 512 if layout != LAYOUTS["rows"] and level() == "avx2" and values in INTEGERS else 0


def has_kernels(m: int) -> bool:
    """Whether there are kernels for n of every `m` weights; `m` = 0 is dense."""
    return m == 0 or LONGEST_GROUP % m == 0


def packed_bytes(values: str, n: int, m: int, rows: int, columns: int, layout: str = "best") -> int:
    """Bytes of the buffer of a matrix (rows, columns), whose width divides by `m`; `m` = 0 means dense."""
    size = int(built().castlm_packed_bytes(LAYOUTS[layout], VALUES[values], n, m, rows, columns))
    assert size >= 0, f"there is no kernel for a {rows} x {columns} weight, {n}:{m} of {values}, layout {layout}"
    return size


def repack(
    to: tuple[int, int],
    values: tuple[int, int],
    mask: tuple[int, int],
    scales: tuple[int, int],
    kind: str,
    n: int,
    m: int,
    shape: tuple[int, int],
    threads: int,
    layout: str = "best",
) -> None:
    """Writes a matrix in the order in which the kernels read it.

    Args:
        to: address and bytes of the buffer, `packed_bytes` of them.
        values: address and bytes of the stored values.
        mask: address and bytes of the mask, a bit for each weight; (0, 0) of a dense matrix.
        scales: address and number of the scales, fp32; (0, 0) of floats.
        kind: a name of VALUES.
        shape: (rows, columns).

    Raises:
        InputError: a mask that does not keep exactly `n` of every `m`.
        MemoryError: there is no memory for the threads.
    """
    code = built().castlm_repack(LAYOUTS[layout], VALUES[kind], n, m, *shape, *values, *mask, *scales, *to, threads)
    check_memory(code)
    if code == _BAD_MASK:
        raise InputError(f"the mask does not keep exactly {n} of every {m} weights: the file is damaged")
    assert not code, f"values, mask and scales do not fit a {n}:{m} {kind} weight of width {shape[1]}"


def check_memory(code: int) -> None:
    """Raises MemoryError if a function of the library returned the code for it."""
    if code == _NO_MEMORY:
        raise MemoryError("not enough memory for the CPU kernels: take fewer tokens at a time, or free memory")


def address(array: np.ndarray[Any, Any] | None) -> int:
    """The address of a contiguous array; 0 of None."""
    if array is None:
        return 0
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def allocate(num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A uint8 buffer (num_bytes,) of zeros, aligned to a huge page and on huge pages where the system has them.

    If memory bandwidth is the limit, reading weights from 2 MB pages is about 1.5 times as fast as from 4 kB pages.
    """
    room = mmap.mmap(-1, num_bytes + _HUGE_PAGE)
    if sys.platform == "linux" and num_bytes >= _HUGE_PAGE:
        with contextlib.suppress(OSError):  # a refusal only costs speed
            room.madvise(_MADV_HUGEPAGE)
    whole = np.frombuffer(room, np.uint8)
    start = -address(whole) % _HUGE_PAGE
    return whole[start : start + num_bytes]


def trim_memory() -> None:
    """Returns freed memory that the C library keeps (glibc) to the system, for example after loading a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
