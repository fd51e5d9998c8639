"""Writes the weight files of a model, one tensor at a time: on its way out a model needs no second copy in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from castlm.dtypes import STORED, STORED_NAMES, bytes_of
from castlm.files.atomic_file import atomic_file, atomic_write_json, reporting_full_disk
from castlm_runtime.stored import INDEX

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype (safetensors' name) and shape by tensor, in the order in which they are written."""


class HasLayout(Protocol):
    """Stored tensors that belong together, which no division among files may part."""

    @property
    def layout(self) -> Layout: ...


Together = TypeVar("Together", bound=HasLayout)


class Batch(NamedTuple):
    """Stored tensors that are made together, such as the converted weights of one transformer block."""

    layout: Layout
    tensors: Callable[[], Iterable[Tensor]]
    """Makes the tensors of `layout`, in its order."""


def num_bytes(part: HasLayout) -> int:
    return sum(math.prod(shape) * STORED[dtype].itemsize for dtype, shape in part.layout.values())


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors, which may be on the meta device."""
    return {name: (STORED_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def into_files(batches: Iterable[Together], max_bytes: int) -> dict[str, list[Together]]:
    """Divides batches among files of at most `max_bytes`, in order. A larger batch has a file of its own.

    Returns:
        The batches by the name of the file: model.safetensors, or model-00001-of-00003.safetensors and so on.
    """
    files: list[list[Together]] = [[]]
    size = 0
    for batch in batches:
        if files[-1] and size + num_bytes(batch) > max_bytes:
            files.append([])
            size = 0
        files[-1].append(batch)
        size += num_bytes(batch)
    return dict(zip(file_names(len(files)), files))


def file_names(count: int, single: str = "model.safetensors") -> list[str]:
    """The names of a model's weight files: `single`, or its stem with numbers if there are several."""
    stem = single.removesuffix(".safetensors")
    numbered = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [single] if count == 1 else numbered


def write_weights(
    folder: Path,
    files: Mapping[str, Sequence[Batch]],
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    *,
    index: str = INDEX,
    num_parameters: int | None = None,
) -> None:
    """Writes files of weights, and their index if there are several, with one batch in memory at a time.

    Args:
        files: the batches of each file, as from `into_files`.
        metadata: of each file; by default as transformers writes it.
        num_parameters: for the index.

    Raises:
        InputError: the disk is full.
    """
    for name, batches in files.items():
        tensors = (tensor for batch in batches for tensor in zip(batch.layout, batch.tensors(), strict=True))
        write_file(folder / name, batches, tensors, None if metadata is None else metadata[name])
    write_index_of(folder / index, files, num_parameters)


def write_file(
    file: Path,
    content: Sequence[HasLayout],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file of weights; `tensors` come in the order of `content`. Raises `InputError` if the disk is full."""
    layout = {name: entry for of in content for name, entry in of.layout.items()}
    with reporting_full_disk(file):
        write_safetensors(file, layout, tensors, {"format": "pt"} if metadata is None else metadata)


def write_index_of(index: Path, files: Mapping[str, Sequence[HasLayout]], num_parameters: int | None = None) -> None:
    """Writes the index of files of weights, if there are several."""
    if len(files) > 1:
        weight_map = {key: name for name, content in files.items() for of in content for key in of.layout}
        write_index(
            index, weight_map, sum(num_bytes(of) for content in files.values() for of in content), num_parameters
        )


def write_index(index: Path, weight_map: Mapping[str, str], total: int, num_parameters: int | None = None) -> None:
    """Writes the index of several weight files, of `total` bytes: the file of each tensor by its name."""
    metadata = {"total_size": total}
    if num_parameters is not None:
        metadata["total_parameters"] = num_parameters
    atomic_write_json(index, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_safetensors(
    file: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file one tensor at a time; `safetensors.torch.save_file` needs all of them in memory.

    Args:
        layout: of every tensor, in the order in which `tensors` gives them.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors pads its header to align the data
    left = dict(layout)
    # Renamed at the end, because tensors may be mapped from the file that it replaces.
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (STORED_NAMES[tensor.dtype], tuple(tensor.shape)) == left.pop(name), name
            stream.write(memoryview(bytes_of(tensor).numpy()))  # type: ignore[arg-type]  # uint8
    assert not left, left
