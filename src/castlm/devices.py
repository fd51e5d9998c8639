"""GPUs by name: memory, and peak bytes and operations per second, from the vendors' public data sheets.

`roofline.KERNELS` holds the shares of these peaks that real kernels reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from castlm.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """The figures of a device that the roofline needs, in the units of its data sheet.

    All have 2:4 tensor cores (NVIDIA, since Ampere), which do twice the dense operations, counting those of the dense
    product.
    """

    name: str
    family: str
    """Devices of one family run the same kernels: "ampere", "ada", "hopper", "blackwell"."""
    bandwidth: float
    """Memory bandwidth, 1e9 bytes per second."""
    peak: Mapping[str, float]
    """Dense operations, 1e12 per second, by compute dtype; a multiply-add counts as two."""
    source: str
    """Source of the figures."""
    cuda_name: str = ""
    """A regular expression for the end of its name in `torch.cuda.get_device_name`."""
    memory_gib: float | None = None
    """Memory that torch reports, in GiB; None if unknown."""


_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 data sheet"
_ADA = "NVIDIA Ada GPU Architecture white paper, fp32 accumulation"
_OF_A100 = {"bf16": 312, "fp16": 312, "int8": 624}
_OF_A10 = {"bf16": 125, "fp16": 125, "int8": 250}
_OF_H100 = {"bf16": 989.4, "fp16": 989.4, "int8": 1978.9, "fp8": 1978.9}
_OF_H100_PCIE = {"bf16": 756, "fp16": 756, "int8": 1513, "fp8": 1513}
_OF_NVL = {"bf16": 835, "fp16": 835, "int8": 1671, "fp8": 1671}
_OF_B200 = {"bf16": 2250, "fp16": 2250, "int8": 4500, "fp8": 4500}
_OF_L4 = {"bf16": 121, "fp16": 121, "int8": 242, "fp8": 242}
_OF_L40 = {"bf16": 181, "fp16": 181, "int8": 362, "fp8": 362}
_OF_L40S = {"bf16": 362, "fp16": 362, "int8": 733, "fp8": 733}
_OF_RTX4090 = {"bf16": 165.2, "fp16": 165.2, "int8": 660.6, "fp8": 330.3}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100", "ampere", 2039, _OF_A100, _A100, r"A100-SXM\d?-80GB$", 79.1),
        Device("a100-pcie", "ampere", 1935, _OF_A100, _A100, r"A100 80GB PCIe$", 79.1),
        Device("a100-40gb", "ampere", 1555, _OF_A100, _A100, r"A100-(SXM\d?|PCIE)-40GB$", 39.4),
        Device("a10", "ampere", 600, _OF_A10, "NVIDIA A10 data sheet", r"\bA10$"),
        Device("h100", "hopper", 3350, _OF_H100, _H100, r"H100 80GB HBM3$", 79.1),
        Device("h100-pcie", "hopper", 2000, _OF_H100_PCIE, _H100, "H100 PCIe$", 79.1),
        Device("h100-nvl", "hopper", 3900, _OF_NVL, _H100, "H100 NVL$"),
        Device("gh200", "hopper", 4000, _OF_H100, "NVIDIA GH200 data sheet (96 GB)", r"GH200 (480|120)GB$"),
        Device("h200", "hopper", 4800, _OF_H100, _H200, r"\bH200$", 139.8),
        Device("h200-nvl", "hopper", 4800, _OF_NVL, _H200, "H200 NVL$"),
        Device("b200", "blackwell", 8000, _OF_B200, "NVIDIA HGX B200 data sheet", r"\bB200$"),
        Device("l4", "ada", 300, _OF_L4, "NVIDIA L4 data sheet", r"\bL4$"),
        Device("l40", "ada", 864, _OF_L40, "NVIDIA L40 data sheet", r"\bL40$"),
        Device("l40s", "ada", 864, _OF_L40S, "NVIDIA L40S data sheet", r"\bL40S$"),
        Device("rtx4090", "ada", 1008, _OF_RTX4090, _ADA, "RTX 4090$", 23.5),
    )
}
"""The devices that castlm knows by name."""


def device_of(cuda_name: str) -> Device | None:
    """The record of a GPU by its name in `torch.cuda.get_device_name`; None if there is none.

    Examples:
        >>> device_of("NVIDIA A100-SXM4-80GB").name, device_of("NVIDIA GeForce RTX 4090 Laptop GPU")
        ('a100', None)
    """
    return next((d for d in DEVICES.values() if d.cuda_name and re.search(d.cuda_name, cuda_name)), None)


def find_device(name: str) -> Device:
    """The record of a device by name.

    Raises:
        InputError: an unknown name.
    """
    if name not in DEVICES:
        raise InputError(f"there is no record of the device {name!r}: choose one of this, {', '.join(DEVICES)}")
    return DEVICES[name]
