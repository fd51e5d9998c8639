"""Packed n:m weights on disk and in memory, their CPU kernels, and loading and generation with them; quantization that
keeps zeros, 2:4 on a GPU where it is faster, and advice on formats.

Imports nothing: the file format is read without torch, which the loaders need.
"""

from __future__ import annotations

from typing import Any

__all__ = ["to_semi_structured_"]


def __getattr__(name: str) -> Any:
    if name == "to_semi_structured_":
        from castlm.inference.semi_structured import to_semi_structured_

        return to_semi_structured_
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
