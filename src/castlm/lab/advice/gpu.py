"""Times dense and 2:4 layers on the NVIDIA GPU of this machine, for `castlm advise`."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn

from castlm.core.errors import InputError
from castlm.core.nm import nm_mask
from castlm.devices import DEVICES, Device, device_of
from castlm.dtypes import FLOATS
from castlm.lab.advice.cpu import Shape
from castlm.lab.advice.roofline import GpuFormat, Seconds
from castlm.runtime.semi_structured import Backend, Cusparselt, race


def this_gpu() -> Device | None:
    """The record of this machine's CUDA device; None without one.

    Raises:
        InputError: a device without a record.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    record = device_of(name)
    if record is None:
        raise InputError(f"there is no record of {name}: pass --device with the nearest of {', '.join(DEVICES)}")
    return record


def gpu_timer(dtype: str, backend: Backend | None = None) -> Seconds:
    """Returns a function that times layers of random weights on this machine's CUDA device, each shape once.

    A layer that 2:4 kernels do not take counts as dense.

    Raises:
        InputError: another dtype than bf16 and fp16, or as `Cusparselt`.
    """
    if dtype not in ("bf16", "fp16"):
        raise InputError(f"a GPU at hand is timed in bf16 and fp16, not {dtype}: estimate it by --device")
    device = torch.device("cuda" if backend is None else "cpu")
    backend = backend or Cusparselt(device)

    @functools.cache
    @torch.no_grad()
    def raced(shape: Shape, tokens: int) -> Mapping[str, float]:
        layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=FLOATS[dtype])
        x = torch.randn(tokens, shape[1], device=device, dtype=FLOATS[dtype])
        if shape[1] % 4 or backend.why_not(layer) is not None:
            return backend.race({"dense": layer}, x)
        layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
        return race(layer, x, backend)[0]

    def seconds(form: GpuFormat, shape: Shape, tokens: int) -> float:
        found = raced(shape, tokens)
        return found.get("2:4", found["dense"]) if form.sparse else found["dense"]

    return seconds
