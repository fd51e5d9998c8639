"""What a device can do at most: bytes and operations per second, each from its vendor's public data sheet.

A roofline needs nothing else. How close real kernels come to these figures is in `roofline.KERNELS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from castlm.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """A device as the roofline sees it."""

    name: str
    family: str
    """Devices of one family run the same kernels: "ampere", "ada", "hopper", "blackwell", "cpu"."""
    bandwidth: float
    """Memory bandwidth, bytes per second."""
    peak: Mapping[str, float]
    """Dense operations per second by compute dtype; a multiply-add counts as two."""
    sparse_peak: Mapping[str, float]
    """The same with 2:4 weights, counted in the operations of the dense product; empty without hardware support."""
    source: str
    """Where the figures come from."""


def _device(name: str, family: str, gigabytes: float, source: str, **tera: float) -> Device:
    """Tensor cores of every NVIDIA device since Ampere do twice the dense operations with 2:4 weights."""
    peak = {dtype: value * 1e12 for dtype, value in tera.items()}
    sparse = {dtype: 2 * value for dtype, value in peak.items()}
    return Device(name, family, gigabytes * 1e9, MappingProxyType(peak), MappingProxyType(sparse), source)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet (80 GB)"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_ADA = "NVIDIA Ada GPU Architecture white paper, fp32 accumulation"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("a100", "ampere", 2039, _A100, bf16=312, fp16=312, int8=624),
        _device("a100-pcie", "ampere", 1935, _A100, bf16=312, fp16=312, int8=624),
        _device("h100", "hopper", 3350, _H100, bf16=989.4, fp16=989.4, int8=1978.9, fp8=1978.9),
        _device("h100-pcie", "hopper", 2000, _H100, bf16=756, fp16=756, int8=1513, fp8=1513),
        _device("h200", "hopper", 4800, "NVIDIA H200 data sheet", bf16=989.4, fp16=989.4, int8=1978.9, fp8=1978.9),
        _device("b200", "blackwell", 8000, "NVIDIA HGX B200 data sheet", bf16=2250, fp16=2250, int8=4500, fp8=4500),
        _device("rtx4090", "ada", 1008, _ADA, bf16=165.2, fp16=165.2, int8=660.6, fp8=330.3),
    )
}
"""The devices that `castlm advise` knows by name."""


def find_device(name: str) -> Device:
    """The record of a device by name.

    Raises:
        InputError: an unknown name.
    """
    if name not in DEVICES:
        raise InputError(f"there is no record of the device {name!r}: choose one of this, {', '.join(DEVICES)}")
    return DEVICES[name]
