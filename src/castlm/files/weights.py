"""Writes the weight files of a model, one tensor at a time: on its way out a model needs no second copy in memory."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from castlm.dtypes import STORED, STORED_NAMES, bytes_of
from castlm.files.atomic_file import atomic_file, atomic_write_json, reporting_full_disk
from castlm.files.stored import INDEX

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype (safetensors' name) and shape by tensor, in the order in which they are written."""


class Batch(NamedTuple):
    """Stored tensors that are made together, such as the converted weights of one transformer block."""

    layout: Layout
    tensors: Callable[[], Iterable[Tensor]]
    """Makes the tensors of `layout`, in its order. All ranks call it, as it may gather."""

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * STORED[dtype].itemsize for dtype, shape in self.layout.values())


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of tensors, which may be on the meta device."""
    return {name: (STORED_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def into_files(batches: Iterable[Batch], max_bytes: int) -> dict[str, list[Batch]]:
    """Divides batches among files of at most `max_bytes`, in order. A larger batch has a file of its own.

    Returns:
        The batches by the name of the file: model.safetensors, or model-00001-of-00003.safetensors and so on.
    """
    files: list[list[Batch]] = [[]]
    size = 0
    for batch in batches:
        if files[-1] and size + batch.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(batch)
        size += batch.num_bytes
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
    is_writer: bool = True,
) -> None:
    """Writes files of weights, and their index if there are several, with one batch in memory at a time.

    Args:
        files: the batches of each file, as from `into_files`.
        metadata: of each file; by default as transformers writes it.
        num_parameters: for the index.
        is_writer: False on the ranks that only take part in making the tensors.

    Raises:
        InputError: the disk is full. The tensors that are left are made all the same, so that no rank waits for
            another in vain.
    """
    failure: Exception | None = None
    for name, batches in files.items():
        left = iter(batches)
        if is_writer and failure is None:
            layout = {key: entry for batch in batches for key, entry in batch.layout.items()}
            about = {"format": "pt"} if metadata is None else metadata[name]
            try:
                with reporting_full_disk(folder / name):
                    write_safetensors(folder / name, layout, _tensors(left), about)
            except Exception as error:
                failure = error
        for batch in left:
            deque(batch.tensors(), maxlen=0)
    if failure is not None:
        raise failure
    if len(files) > 1 and is_writer:
        weight_map = {key: name for name, batches in files.items() for batch in batches for key in batch.layout}
        write_index(folder / index, weight_map, sum(b.num_bytes for of in files.values() for b in of), num_parameters)


def _tensors(batches: Iterable[Batch]) -> Iterator[tuple[str, Tensor]]:
    for batch in batches:
        yield from zip(batch.layout, batch.tensors(), strict=True)


def write_index(index: Path, weight_map: Mapping[str, str], num_bytes: int, num_parameters: int | None = None) -> None:
    """Writes the index of several weight files: the file of each tensor by its name."""
    metadata = {"total_size": num_bytes}
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
