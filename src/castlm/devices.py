"""GPUs by name: their peak in bf16, for the utilization of a run, and their memory, for `castlm plan memory`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The public figures of one GPU."""

    name: str
    bf16_flops: float
    """Dense operations in bf16 per second, as in the vendor's data sheet; a multiply-add counts as two."""
    cuda_name: str
    """A regular expression for the end of its name in `torch.cuda.get_device_name`."""
    memory_gib: float | None = None
    """Memory that torch reports, in GiB; None if unknown."""


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA's data sheets of the A100, A10, H100, GH200 (96 GB), H200, HGX B200, L4, L40 and L40S
        Device("a100", 312e12, r"A100-SXM\d?-80GB$", 79.1),
        Device("a100-pcie", 312e12, r"A100 80GB PCIe$", 79.1),
        Device("a100-40gb", 312e12, r"A100-(SXM\d?|PCIE)-40GB$", 39.4),
        Device("a10", 125e12, r"\bA10$"),
        Device("h100", 989.4e12, r"H100 80GB HBM3$", 79.1),
        Device("h100-pcie", 756e12, r"H100 PCIe$", 79.1),
        Device("h100-nvl", 835e12, r"H100 NVL$"),
        Device("gh200", 989.4e12, r"GH200 (480|120)GB$"),
        Device("h200", 989.4e12, r"\bH200$", 139.8),
        Device("h200-nvl", 835e12, r"H200 NVL$"),
        Device("b200", 2250e12, r"\bB200$"),
        Device("l4", 121e12, r"\bL4$"),
        Device("l40", 181e12, r"\bL40$"),
        Device("l40s", 362e12, r"\bL40S$"),
        # NVIDIA Ada GPU Architecture white paper, with accumulation in fp32
        Device("rtx4090", 165.2e12, r"RTX 4090$", 23.5),
    )
}
"""The devices that castlm knows by name."""


def device_of(cuda_name: str) -> Device | None:
    """The record of a GPU by its name in `torch.cuda.get_device_name`; None if there is none.

    Examples:
        >>> device_of("NVIDIA A100-SXM4-80GB").name, device_of("NVIDIA GeForce RTX 4090 Laptop GPU")
        ('a100', None)
    """
    return next((d for d in DEVICES.values() if re.search(d.cuda_name, cuda_name)), None)
