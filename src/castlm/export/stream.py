"""Writes safetensors one tensor at a time; `safetensors.torch.save_file` needs all tensors of a file in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from castlm.dtypes import STORED, STORED_NAMES, bytes_of

_BYTES = {name: dtype.itemsize for name, dtype in STORED.items()}
_ALIGNMENT = 8  # safetensors pads its header to align the data


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
            assert (STORED_NAMES[tensor.dtype], tuple(tensor.shape)) == left.pop(name), name
            stream.write(memoryview(bytes_of(tensor).numpy()))
    assert not left, left
