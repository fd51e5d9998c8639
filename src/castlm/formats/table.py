"""The numeric formats of weights: the table is that of castlm-runtime, which has their kernels."""

from castlm_runtime.formats import (
    FORMATS,
    HEADS,
    ITEM_BYTES,
    PACKABLE,
    Format,
    rounded_formats,
)

__all__ = [
    "FORMATS",
    "HEADS",
    "ITEM_BYTES",
    "PACKABLE",
    "Format",
    "rounded_formats",
]
