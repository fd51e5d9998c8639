"""The C++ kernels of `kernels.cpp`, called through ctypes on fp32 tensors of a CPU.

They are compiled when castlm is installed; `kernels()` is None where it was not. The structures
and signatures here mirror the C++ file. C++ trusts its pointers, so every tensor passes `pointer` on its way there.
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
MAX_GROUPED = 256
"""The largest m of an n:m pattern for which the kernels make masks."""

_VERSION = 4  # of kernels.cpp
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


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("last", "per_value", "offset", "least")]


class _Codes(ctypes.Structure):
    _fields_ = [("value", ctypes.c_float * 256), ("pieces", _Piece * 8), ("zero", ctypes.c_int32)]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built. Raises `InputError` if its version is not this module's."""
    path = library_of(__package__)
    return load_kernels(path) if path else None


def library_of(package: str) -> str | None:
    """The path of the compiled kernels of a package, or None if they were not built."""
    spec = importlib.util.find_spec(f"{package}._kernels")
    return spec.origin if spec else None


def load_library(path: str, version_name: str, version: int) -> ctypes.CDLL:
    """Loads a library. Raises `InputError` if the number that it exports as `version_name` is not `version`."""
    library = ctypes.CDLL(path)
    if ctypes.c_int32.in_dll(library, version_name).value != version:
        raise InputError(f"{path} belongs to another version of castlm: reinstall castlm")
    return library


def load_kernels(path: str) -> ctypes.CDLL:
    """The library at `path`, with its signatures. Raises `InputError` if its version is not this module's."""
    library = load_library(path, "castlm_kernels_version", _VERSION)
    parameters, number = ctypes.POINTER(_Parameter), ctypes.c_int
    hyper, maps = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(_Codes)
    library.castlm_update.argtypes = [parameters, ctypes.c_int64, hyper, number, maps, number]
    library.castlm_update.restype = None
    library.castlm_refresh.argtypes = [parameters, ctypes.c_int64, number, number, number]
    library.castlm_refresh.restype = ctypes.c_int64
    return library


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels exist and take a tensor of this type, device and dtype."""
    return in_reach(tensor) and kernels() is not None


def in_reach(tensor: Tensor) -> bool:
    """Whether a C++ kernel may read a tensor: float32 in the memory of this process.

    A DTensor or another subclass may have its memory elsewhere, and while `torch.compile` traces there is none.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


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
                setattr(parameter, name, pointer(name, tensor, torch.float32, tensor.numel()))
            else:
                setattr(parameter, name, pointer(name, tensor, dtypes[name], weight.numel()))
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
    assert 1 <= n < m <= MAX_GROUPED
    assert all(weight.dim() and weight.shape[-1] % m == 0 for weight in weights)
    parameters = _parameters(weights, masks)
    flips = library.castlm_refresh(parameters, len(parameters), n, m, torch.get_num_threads())
    return flips, flips < 0


def _parameters(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> ctypes.Array[_Parameter]:
    parameters = (_Parameter * len(weights))()
    for parameter, weight, mask in zip(parameters, weights, masks, strict=True):
        parameter.weight = pointer("weight", weight, torch.float32, weight.numel())
        parameter.rows, parameter.width = 1, weight.numel()
        if mask is not None:
            width = weight.shape[-1]
            rows = weight.numel() // width if width else 0
            parameter.mask = pointer("mask", mask, torch.uint8, rows * -(-width // 8))
            if width % 8:  # each row of bits ends within a byte
                parameter.rows, parameter.width = rows, width
    return parameters


def pointer(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
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
