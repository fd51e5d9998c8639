"""The compiled kernels, called through ctypes on addresses: repacks weights, multiplies by them.

C++ checks every size again. `castlm_runtime.model` calls the engine, which runs a whole model; `castlm` and its plugin
for vLLM call single products on tensors of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from castlm_runtime.errors import InputError
from castlm_runtime.formats import FORMATS

NOT_BUILT = "the C++ kernels of castlm-runtime were not built: install it again (pip install ./runtime in the clone)"

LONGEST_GROUP = 64
"""Columns of a mask that the kernels read at a time: they take every n:m whose m divides it."""

_LEVEL_VARIABLE = "CASTLM_CPU_LEVEL"
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # of Linux; the module mmap has it where it was built with it
_TYPES: dict[str, Any] = {
    "void": None,
    "text": ctypes.c_char_p,
    "pointer": ctypes.c_void_p,
    "float": ctypes.c_float,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
}
"""The types of the library's description."""


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
    try:
        for name, (result, *arguments) in description(library)["functions"].items():
            function = getattr(library, name)
            function.restype, function.argtypes = _TYPES[result], [_TYPES[argument] for argument in arguments]
    except (AttributeError, KeyError, ValueError) as error:
        raise InputError(f"{file} belongs to another version of castlm-runtime: install it again") from error
    if os.environ.get(_LEVEL_VARIABLE):
        use_level(os.environ[_LEVEL_VARIABLE], library)
    return library


@functools.cache
def description(library: ctypes.CDLL) -> dict[str, Any]:
    """The sizes, codes, structs and signatures of the library, which describe.cpp documents."""
    library.castlm_describe.restype = ctypes.c_char_p
    found: dict[str, Any] = json.loads(library.castlm_describe())
    return found


def codes(kind: str) -> dict[str, int]:
    """The codes of values, layouts, caches, activations or errors, by name."""
    found: dict[str, int] = description(built())[kind]
    return found


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """A struct of engine.h or sampler.h, with its fields."""
    described = description(built())["structs"][name]
    fields = [(field, structure(kind) if kind not in _TYPES else _TYPES[kind]) for field, kind in described["fields"]]
    found = type(name, (ctypes.Structure,), {"_fields_": fields})
    assert ctypes.sizeof(found) == described["bytes"], f"describe.cpp lacks a field of {name}"
    return found


def built() -> ctypes.CDLL:
    """The library. Raises `InputError` if it was not built."""
    library = kernels()
    if library is None:
        raise InputError(NOT_BUILT)
    return library


def level() -> str:
    """The name of the kernels in use: the fastest for this processor, unless `use_level` set another."""
    return str(_level_facts(built())[int(built().castlm_level())]["name"])


def _level_facts(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """The instruction sets that there are kernels for, the faster ones later."""
    found: list[dict[str, Any]] = description(library)["levels"]
    return found


def longest_free_group(n: int, m: int) -> int:
    """The longest group in which this processor's kernels take the share n / m of weights nearly as fast as in groups
    of four: `m` itself where no longer one is known to be.
    """
    library = kernels()
    if library is None:
        return m
    facts = _level_facts(library)[int(library.castlm_level())]
    return max(m, int(facts["longest_of_half" if 2 * n == m else "longest_group"]))


def levels(library: ctypes.CDLL | None = None) -> tuple[str, ...]:
    """The levels that this processor supports, the fastest last; empty if the kernels were not built."""
    library = library or kernels()
    if library is None:
        return ()
    return tuple(str(of["name"]) for number, of in enumerate(_level_facts(library)) if library.castlm_runs(number))


def use_level(name: str, library: ctypes.CDLL | None = None) -> None:
    """Selects the kernels of an instruction set in this process, as the environment variable `CASTLM_CPU_LEVEL` does.

    A weight that is packed already keeps its kernels.

    Raises:
        InputError: an unknown name, or an instruction set that this processor lacks.
    """
    library = library or built()
    names = [of["name"] for of in _level_facts(library)]
    if name not in names or library.castlm_set_level(names.index(name)):
        raise InputError(f"there are no kernels of {name!r} here: choose one of {', '.join(levels(library))}")


def rows_at_a_time(buffer: int, num_bytes: int) -> int:
    """The number of rows of x that the kernels should take at once, if x has many; 0 if a library's GEMM is faster.

    docs/performance.md has the speeds, measured by `benchmarks.levels`.

    Args:
        buffer: the address of a weight that `repack` wrote.
    """
    return int(built().castlm_rows_at_once(buffer, num_bytes))


def has_kernels(m: int) -> bool:
    """Whether there are kernels for n of every `m` weights; `m` = 0 is dense."""
    return m == 0 or LONGEST_GROUP % m == 0


def _values_code(values: str) -> int:
    return codes("values")[FORMATS[values].runs_as]


def packed_bytes(values: str, n: int, m: int, rows: int, columns: int, layout: str = "best") -> int:
    """Bytes of the buffer of a matrix (rows, columns), whose width divides by `m`; `m` = 0 means dense."""
    size = int(built().castlm_packed_bytes(codes("layouts")[layout], _values_code(values), n, m, rows, columns))
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
        kind: a name of PACKABLE.
        shape: (rows, columns).

    Raises:
        InputError: a mask that does not keep exactly `n` of every `m`.
        MemoryError: there is no memory for the threads.
    """
    form = (codes("layouts")[layout], _values_code(kind), n, m)
    code = built().castlm_repack(*form, *shape, *values, *mask, *scales, *to, threads)
    check_memory(code)
    if code == codes("errors")["mask"]:
        raise InputError(f"the mask does not keep exactly {n} of every {m} weights: the file is damaged")
    assert not code, f"values, mask and scales do not fit a {n}:{m} {kind} weight of width {shape[1]}"


def check_memory(code: int) -> None:
    """Raises MemoryError if a function of the library returned the code for it."""
    if code and code == codes("errors")["memory"]:
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
    room = mmap.mmap(-1, num_bytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
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
