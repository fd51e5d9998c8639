"""The exception for bad input. The command line prints it as one line, without a traceback, and exits with code 2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from castlm_runtime.errors import InputError, check_type, is_panic, naming, one_line

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DivergedError",
    "InputError",
    "MostlyDenseError",
    "check_finite",
    "check_type",
    "is_out_of_memory",
    "is_panic",
    "naming",
    "one_line",
]


def check_finite(what: str, value: Tensor, remedy: str = "the model is damaged") -> None:
    """Raises `InputError` if the tensor `value` holds NaN or infinity."""
    # `isfinite` would take three copies
    if value.numel() and not all(map(math.isfinite, value.aminmax())):
        raise InputError(f"{what} holds NaN or infinity: {remedy}")


class DivergedError(InputError):
    """The numbers of a run are no longer finite. The command line exits with code 1."""


class MostlyDenseError(InputError):
    """Too small a share of a model would have its pattern. The command line exits with code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch reports it as a RuntimeError."""
    words = (
        *("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory", "bad_alloc"),
        "STATUS_ALLOC_FAILED",  # of cuBLAS and cuSOLVER
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
