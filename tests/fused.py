"""The two fused paths of AdamS in tests: the C++ kernels, and what runs on a GPU, here compiled for a CPU."""

import pytest

from castlm.core import native

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)


def through_torch_compile(optimizer, monkeypatch):
    """Has `optimizer` take on a CPU the way that it takes on a GPU."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    optimizer._fused = True
