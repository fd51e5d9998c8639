"""Finds the compiled kernels of this package, which ctypes loads."""

from __future__ import annotations

from pathlib import Path

NOT_BUILT = "the C++ kernels of castlm-runtime were not built: install it again (pip install ./runtime in the clone)"


def path() -> str | None:
    """The file of the compiled kernels, or None if they were not built."""
    file = Path(__file__).with_name("_kernels.so")
    return str(file) if file.is_file() else None
