"""The C++ sweep of SparseGPT in `sweep.cpp`, called through ctypes on fp32 tensors of a CPU.

It is compiled when castlm is installed; `kernels()` is None where it was not.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from castlm.core.native import in_reach, library_of, load_library, pointer

MAX_COLUMNS = 256
"""The most columns of one `sweep_`, and the largest m of its patterns."""

_VERSION = 1  # of sweep.cpp


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "lost", "pull", "scale", "inverse")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    ]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built. Raises `InputError` if its version is not this module's."""
    path = library_of(__package__)
    return load_kernels(path) if path else None


def load_kernels(path: str) -> ctypes.CDLL:
    """The library at `path`, with its signature. Raises `InputError` if its version is not this module's."""
    library = load_library(path, "castlm_sweep_version", _VERSION)
    number = ctypes.c_int
    library.castlm_sweep.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64, ctypes.c_int64, number, number, number]
    library.castlm_sweep.restype = None
    return library


def runs_on(weight: Tensor, columns: int) -> bool:
    """Whether the kernel exists and sweeps this weight, so many columns at a time."""
    return in_reach(weight) and columns <= MAX_COLUMNS and kernels() is not None


def sweep_(
    weight: Tensor, lost: Tensor, pull: Tensor, scale: Tensor, inverse: Tensor, columns: range, n: int, m: int
) -> None:
    """Prunes some columns of a weight in the loop of `sparsegpt.py`, group by group, in place.

    Args:
        weight: (columns, rows), on which the columns before these have acted.
        lost: (columns, rows), old minus new weights; for these columns and later ones, the old weights.
        pull: (columns, columns).
        scale: (columns,), the diagonal of the factor.
        inverse: (columns / m, m, m).
        columns: the columns, in whole groups of m, at most `MAX_COLUMNS`.
    """
    library = kernels()
    assert library is not None
    assert 1 <= n < m <= MAX_COLUMNS
    num_columns, num_rows = weight.shape
    assert 0 <= columns.start <= columns.stop <= num_columns
    assert columns.start % m == columns.stop % m == num_columns % m == 0
    assert columns.stop - columns.start <= MAX_COLUMNS
    sweep = _Call(rows=num_rows, columns=num_columns)
    parts = {"weight": weight, "lost": lost, "pull": pull, "scale": scale, "inverse": inverse}
    sizes = (weight.numel(), weight.numel(), num_columns**2, num_columns, num_columns * m)
    for (name, tensor), size in zip(parts.items(), sizes):
        setattr(sweep, name, pointer(name, tensor, torch.float32, size))
    library.castlm_sweep(sweep, columns.start, columns.stop, n, m, torch.get_num_threads())
