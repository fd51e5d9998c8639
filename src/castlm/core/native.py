"""The C++ kernels of `kernels.cpp`, called through ctypes on fp32 tensors of a CPU.

They are built when castlm is installed, and left out where there is no C++ compiler then: `kernels()` says so. The
structures and signatures here are those of the C++ file, word for word.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.moments import code_pieces, code_values, zero_code

NOT_BUILT = "the C++ kernels were not built: install castlm anew where there is a C++ compiler"

_VERSION = 1  # of kernels.cpp
_POINTERS = ("weight", "grad", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "mask")


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
    """The library, or None where it was not built. Raises `InputError` when it is of another version of castlm."""
    spec = importlib.util.find_spec(f"{__package__}._kernels")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    if ctypes.c_int32.in_dll(library, "castlm_kernels_version").value != _VERSION:
        raise InputError(f"{spec.origin} is of another version of castlm: install castlm anew")
    parameters, number = ctypes.POINTER(_Parameter), ctypes.c_int
    hyper, maps = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(_Codes)
    library.castlm_update.argtypes = [parameters, ctypes.c_int64, hyper, number, number, maps, number]
    library.castlm_update.restype = None
    library.castlm_refresh.argtypes = [parameters, ctypes.c_int64, number, number, number]
    library.castlm_refresh.restype = ctypes.c_int64
    return library


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels are there and take tensors like this one: no DTensor or other subclass, whose memory is
    elsewhere, and nothing that torch.compile traces."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and kernels() is not None


def check_runs_on(tensor: Tensor) -> None:
    """Raises `InputError` when the kernels cannot work on `tensor`, which is on a CPU."""
    if kernels() is None:
        raise InputError(f"fused on a CPU is not to be had, for {NOT_BUILT}")
    if tensor.dtype != torch.float32:
        raise InputError(f"fused on a CPU takes fp32 parameters, not {tensor.dtype}: leave it off")


def update_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    masks: Sequence[Tensor | None],
    hyper: Sequence[float],
    second_moment: str,
) -> None:
    """`castlm.core.update.adams_update` of parameters, in place and in one pass over memory.

    Args:
        weights: fp32, contiguous, on a CPU; (out, in) where there is a mask.
        grads: like `weights`.
        moments: by the names of the optimizer state, as `new_moments` makes them, all of them alike.
        masks: (out, ceil(in / 8)) uint8 of `pack_mask`, or None of a dense parameter.
        hyper: of `castlm.core.update.hyperparameters`.
    """
    library = kernels()
    assert library is not None
    parameters = _parameters(weights, masks)
    for name, column in (("grad", grads), *moments.items()):
        for parameter, tensor in zip(parameters, column):
            assert tensor.is_contiguous()
            setattr(parameter, name, tensor.data_ptr())
    scales = moments.get("exp_avg_scale")
    if scales is not None:
        for parameter, weight, scale in zip(parameters, weights, scales):
            parameter.block = weight.numel() // scale.numel()  # 256 at most, for which the kernel has room
    library.castlm_update(
        parameters,
        len(parameters),
        (ctypes.c_float * len(hyper))(*hyper),
        second_moment == "mix",
        moments["exp_avg"][0].dtype == torch.bfloat16,
        _maps(),
        torch.get_num_threads(),
    )


def refresh_(weights: Sequence[Tensor], masks: Sequence[Tensor], n: int, m: int) -> tuple[int, bool]:
    """`castlm.core.masks.refresh_mask_` of several contiguous weights (out, in): how many entries changed, which is -1
    where a weight has NaN, and whether one has."""
    library = kernels()
    assert library is not None
    parameters = _parameters(weights, masks)
    flips = library.castlm_refresh(parameters, len(parameters), n, m, torch.get_num_threads())
    return flips, flips < 0


def _parameters(weights: Sequence[Tensor], masks: Sequence[Tensor | None]) -> ctypes.Array[_Parameter]:
    parameters = (_Parameter * len(weights))()
    for parameter, weight, mask in zip(parameters, weights, masks):
        assert weight.is_contiguous()
        parameter.weight = weight.data_ptr()
        parameter.rows, parameter.width = 1, weight.numel()
        if mask is not None:
            assert mask.is_contiguous()
            parameter.mask = mask.data_ptr()
            if weight.shape[-1] % 8:  # rows of bits that end within a byte
                parameter.rows, parameter.width = weight.numel() // weight.shape[-1], weight.shape[-1]
    return parameters


@functools.cache
def _maps() -> ctypes.Array[_Codes]:
    """The 8-bit codes of the first moment, and of the second."""
    maps = (_Codes * 2)()
    for codes, signed in zip(maps, (True, False)):
        codes.value[:] = code_values(signed).tolist()
        for piece, (first, last, slope, intercept, least) in zip(codes.pieces, code_pieces(signed)):
            to_index = (1 / slope, intercept / slope) if slope else (0.0, -first)
            piece.last, piece.per_value, piece.offset, piece.least = last, *to_index, least
        codes.zero = zero_code(signed)
    return maps
