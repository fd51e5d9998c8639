"""The C++ kernels of `kernels.cpp`, called through ctypes on fp32 tensors of a CPU.

They are compiled when castlm is installed, if there is a C++ compiler; `kernels()` is None otherwise. The structures
and signatures here mirror the C++ file. C++ trusts its pointers, so every tensor passes `_pointer` on its way there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.moments import LONGEST_BLOCK, code_pieces, code_values, zero_code

NOT_BUILT = "the C++ kernels were not compiled: reinstall castlm on a machine with a C++ compiler"
MOST_GROUPED = 256
"""The largest m of an n:m pattern for which the kernels make masks, and the most columns of one `sweep_`."""

_VERSION = 3  # of kernels.cpp
_POINTERS = ("weight", "grad", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "mask")
_NUM_HYPER = 7


class Batch(NamedTuple):
    """Parameters that one call updates, of one dtype and device, each contiguous and not empty."""

    weights: Sequence[Tensor]
    """(..., out, in) if there is a mask."""
    grads: Sequence[Tensor]
    """Like `weights`."""
    moments: Mapping[str, Sequence[Tensor]]
    """By their names in the optimizer state, as `castlm.core.moments.new_moments` makes them; all are of one kind."""
    masks: Sequence[Tensor | None]
    """(..., out, ceil(in / 8)) uint8 as `pack_mask` makes them, or None for all parameters."""

    @property
    def in_8bit(self) -> bool:
        """Whether the moments are stored as codes with scales."""
        return "exp_avg_scale" in self.moments


class _Parameter(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "width", "block")),
    ]


class _Sweep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "lost", "pull", "scale", "inverse")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("last", "per_value", "offset", "least")]


class _Codes(ctypes.Structure):
    _fields_ = [("value", ctypes.c_float * 256), ("pieces", _Piece * 8), ("zero", ctypes.c_int32)]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built. Raises `InputError` if its version is not this module's."""
    spec = importlib.util.find_spec(f"{__package__}._kernels")
    if spec is None or spec.origin is None:
        return None
    return load_kernels(spec.origin)


def load_kernels(path: str) -> ctypes.CDLL:
    """The library at `path`, with its signatures. Raises `InputError` if its version is not this module's."""
    library = ctypes.CDLL(path)
    if ctypes.c_int32.in_dll(library, "castlm_kernels_version").value != _VERSION:
        raise InputError(f"{path} belongs to another version of castlm: reinstall castlm")
    parameters, number = ctypes.POINTER(_Parameter), ctypes.c_int
    hyper, maps = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(_Codes)
    library.castlm_update.argtypes = [parameters, ctypes.c_int64, hyper, number, maps, number]
    library.castlm_update.restype = None
    library.castlm_refresh.argtypes = [parameters, ctypes.c_int64, number, number, number]
    library.castlm_refresh.restype = ctypes.c_int64
    library.castlm_sweep.argtypes = [ctypes.POINTER(_Sweep), ctypes.c_int64, ctypes.c_int64, number, number, number]
    library.castlm_sweep.restype = None
    return library


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels exist and take a tensor of this type, device and dtype.

    They take no DTensor or other subclass, whose memory may be elsewhere, and nothing while `torch.compile` traces.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and kernels() is not None


def update_(batch: Batch, hyper: Sequence[float], second_moment: str) -> None:
    """`castlm.core.update.adams_update` of several parameters, in place and in one pass over memory.

    Takes float32 on a CPU; arguments are otherwise as for `castlm.core.update.update_`. Raises `InputError` for a
    tensor of another dtype, size, layout or device.
    """
    library = kernels()
    assert library is not None
    assert len(hyper) == _NUM_HYPER
    weights = batch.weights
    stored = torch.uint8 if batch.in_8bit else torch.float32
    dtypes = {"grad": torch.float32, "exp_avg": stored, "exp_avg_sq": stored}
    parameters = _parameters(weights, batch.masks)
    for name, column in (("grad", batch.grads), *batch.moments.items()):
        for parameter, weight, tensor in zip(parameters, weights, column, strict=True):
            if name.endswith("_scale"):
                block = weight.numel() // max(1, tensor.numel())  # weights that share a scale
                assert block in (8, 16, 32, 64, 128, LONGEST_BLOCK)  # the kernels cut a weight at multiples of 65,536
                assert block * tensor.numel() == weight.numel()
                assert weight.shape[-1] % block == 0
                assert parameter.block in (0, block)  # the same for both moments
                parameter.block = block
                setattr(parameter, name, _pointer(name, tensor, torch.float32, tensor.numel()))
            else:
                setattr(parameter, name, _pointer(name, tensor, dtypes[name], weight.numel()))
    library.castlm_update(
        parameters,
        len(parameters),
        (ctypes.c_float * _NUM_HYPER)(*hyper),
        second_moment == "mix" and batch.masks[0] is not None,
        _maps(),
        torch.get_num_threads(),
    )


def refresh_(weights: Sequence[Tensor], masks: Sequence[Tensor], n: int, m: int) -> tuple[int, bool]:
    """`castlm.core.nm.refresh_mask_` of several contiguous weights (..., width).

    Returns the number of entries that changed, which is -1 if a weight contains NaN, and whether one does.
    """
    library = kernels()
    assert library is not None
    assert 1 <= n < m <= MOST_GROUPED
    assert all(weight.dim() and weight.shape[-1] % m == 0 for weight in weights)
    parameters = _parameters(weights, masks)
    flips = library.castlm_refresh(parameters, len(parameters), n, m, torch.get_num_threads())
    return flips, flips < 0


def sweep_(
    weight: Tensor, lost: Tensor, pull: Tensor, scale: Tensor, inverse: Tensor, columns: range, n: int, m: int
) -> None:
    """Prunes some columns of a weight in the loop of `castlm.oneshot.sparsegpt`, group by group, in place.

    Args:
        weight: (columns, rows), on which the columns before these have acted.
        lost: (columns, rows), old minus new weights; for these columns and later ones, the old weights.
        pull: (columns, columns).
        scale: (columns,), the diagonal of the factor.
        inverse: (columns / m, m, m).
        columns: the columns, in whole groups of m, at most 256.
    """
    library = kernels()
    assert library is not None
    assert 1 <= n < m <= MOST_GROUPED
    num_columns, num_rows = weight.shape
    assert 0 <= columns.start <= columns.stop <= num_columns
    assert columns.start % m == columns.stop % m == num_columns % m == 0
    assert columns.stop - columns.start <= MOST_GROUPED
    sweep = _Sweep(rows=num_rows, columns=num_columns)
    parts = {"weight": weight, "lost": lost, "pull": pull, "scale": scale, "inverse": inverse}
    sizes = (weight.numel(), weight.numel(), num_columns**2, num_columns, num_columns * m)
    for (name, tensor), size in zip(parts.items(), sizes):
        setattr(sweep, name, _pointer(name, tensor, torch.float32, size))
    library.castlm_sweep(sweep, columns.start, columns.stop, n, m, torch.get_num_threads())


def _parameters(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> ctypes.Array[_Parameter]:
    parameters = (_Parameter * len(weights))()
    for parameter, weight, mask in zip(parameters, weights, masks, strict=True):
        parameter.weight = _pointer("weight", weight, torch.float32, weight.numel())
        parameter.rows, parameter.width = 1, weight.numel()
        if mask is not None:
            width = weight.shape[-1]
            rows = weight.numel() // width if width else 0
            parameter.mask = _pointer("mask", mask, torch.uint8, rows * -(-width // 8))
            if width % 8:  # each row of bits ends within a byte
                parameter.rows, parameter.width = rows, width
    return parameters


def _pointer(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """The address of `tensor`, after checking its dtype, size, device and layout."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    fits = is_plain and tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.numel() == numel
    address = tensor.data_ptr() if fits else 1
    if not fits or not tensor.is_contiguous() or address % tensor.element_size():
        raise InputError(
            f"the kernels take {name} as a plain, contiguous CPU tensor of {numel} {dtype}, not as "
            f"{type(tensor).__name__} of {tensor.numel()} {tensor.dtype} on {tensor.device}, {tensor.layout}"
        )
    return address


@functools.cache
def _maps() -> ctypes.Array[_Codes]:
    """The 8-bit codes of the first moment, and of the second."""
    maps = (_Codes * 2)()
    for codes, signed in zip(maps, (True, False)):
        codes.value[:] = code_values(signed).tolist()
        for piece, (first, last, slope, intercept, least) in zip(codes.pieces, code_pieces(signed)):
            piece.per_value = 1 / slope if slope else 0.0
            piece.offset = intercept / slope if slope else -first
            piece.last, piece.least = last, least
        codes.zero = zero_code(signed)
    return maps
