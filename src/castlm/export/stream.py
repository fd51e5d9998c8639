"""Write safetensors a tensor at a time: `safetensors.torch.save_file` wants all tensors of a file in memory at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' name of each dtype that a model file may hold."""

_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_ALIGNMENT = 8  # of the data, as safetensors pads its header


def write_safetensors(
    file: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes `file`; `tensors` are consumed one by one.

    Args:
        layout: dtype (safetensors' name) and shape of every tensor, in the order in which `tensors` gives them.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    left = dict(layout)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (DTYPES[tensor.dtype], tuple(tensor.shape)) == left.pop(name), name
            stream.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    assert not left, left
