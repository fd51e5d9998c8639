"""The two fused paths of AdamS in tests: the C++ kernels, and what runs on a GPU, here compiled for a CPU."""

import contextlib

import pytest
import torch

from castlm.core import native

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)


def through_torch_compile(optimizer, monkeypatch):
    """Has `optimizer` take on a CPU the way that it takes on a GPU, up to the code that inductor would write for one.

    The C++ that inductor writes for a CPU in its place runs nowhere else and takes half a minute to compile.
    """
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="aot_eager", **how))
    monkeypatch.setattr(native, "kernels", lambda: None)
    optimizer._fused = True


@contextlib.contextmanager
def threads(count):
    """Lets torch use that many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
