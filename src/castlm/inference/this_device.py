"""The device at hand: which record it has, and what its layers take, measured."""

from __future__ import annotations

import torch

from castlm.core.errors import InputError
from castlm.core.masks import nm_mask
from castlm.inference.cuda_backends import backend_for
from castlm.inference.devices import DEVICES, Device
from castlm.inference.roofline import Format

_CUDA_NAMES = {  # parts of torch.cuda.get_device_name(), the longer ones first
    "A100-SXM": "a100",
    "A100 80GB PCIe": "a100-pcie",
    "A100-PCIE": "a100-pcie",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "RTX 4090": "rtx4090",
}


def this_gpu() -> Device | None:
    """The record of the CUDA device at hand; None where there is none.

    Raises:
        InputError: a device without a record.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    record = next((record for part, record in _CUDA_NAMES.items() if part in name), None)
    if record is None:
        raise InputError(f"there is no record of {name}: pass --device with the nearest of {', '.join(DEVICES)}")
    return DEVICES[record]


class GpuTimer:
    """Times layers on the CUDA device at hand, each shape once, dense in bf16 against every sparse variant."""

    def __init__(self) -> None:
        self._device = torch.device("cuda")
        self._found: dict[tuple[tuple[int, int], int, str], dict[str, float]] = {}

    def formats(self, dtype: str) -> list[Format]:
        """What can be timed: dense and 2:4 in `dtype`, 2:4 int8, and 2:4 fp8 where torchao and the device have it.

        Raises:
            InputError: another dtype than bf16 and fp16.
        """
        if dtype not in ("bf16", "fp16"):
            raise InputError(f"--measure times bf16 and fp16, not {dtype}: leave it out for a roofline")
        formats = [Format(dtype, 16, dtype), Format(f"2:4 {dtype}", 9, dtype, sparse=True)]
        formats.append(Format("2:4 int8", 5, "int8", sparse=True, changes_weights=True))
        try:
            backend_for("fp8", self._device)
        except InputError:
            return formats
        return [*formats, Format("2:4 fp8", 5, "fp8", sparse=True, changes_weights=True)]

    @torch.no_grad()
    def seconds(self, form: Format, shape: tuple[int, int], tokens: int) -> float:
        """The fastest variant of `form`, or the dense layer; a layer that cannot be converted counts as dense."""
        kind = form.compute if form.changes_weights else "same"
        key = (shape, tokens, kind)
        if key not in self._found:
            dtype = torch.float16 if form.compute == "fp16" else torch.bfloat16
            layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=self._device, dtype=dtype)
            if shape[1] % 4 == 0:
                layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
            x = torch.randn(tokens, shape[1], device=self._device, dtype=dtype)
            backend = backend_for(kind, self._device)
            can = shape[1] % 4 == 0 and backend.why_not(layer) is None
            sparse = {v: backend.convert(layer, v) for v in backend.variants(layer, x)} if can else {}
            self._found[key] = backend.race({"dense": layer, **sparse}, x)
        found = self._found[key]
        sparse_only = [value for name, value in found.items() if name != "dense"]
        return min(sparse_only, default=found["dense"]) if form.sparse else found["dense"]
