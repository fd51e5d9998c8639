"""Read the tensors of a safetensors file as they are stored: the header, and the bits of a tensor chunk by chunk.

The safetensors library opens each file first, so that a header it rejects is rejected here. The data is read without
it, because numpy has no bf16 and importing torch takes a second. Zero, infinity and NaN need no arithmetic: without the
sign bit, floats are ordered like the unsigned integers of their bits. Format: 8 bytes little-endian header length, a
JSON header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from castlm_runtime.errors import InputError, one_line
from castlm_runtime.reading import check_regular, open_regular, parse_json, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The files that transformers loads a model from: one file with all weights, or an index of several."""

PACKED_SINGLE, PACKED_INDEX = "castlm.safetensors", "castlm.safetensors.index.json"
"""The same of a packed folder. transformers does not look for these names, so without castlm it finds no weights."""

QUANT_METHOD = "castlm"
"""`quant_method` of a packed folder, in the `quantization_config` of its config.json."""

_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][!-.0-\[\]-~]*\.safetensors")
"""Visible ASCII without / and \\: two names of other characters can be one file, or look like one."""

CHUNK_BYTES = 1 << 22  # stays in the cache between the passes over it


class FloatBits(NamedTuple):
    """The bit layout of a float dtype: `bits & magnitude` is 0 for zeros and >= `non_finite` for inf and NaN."""

    dtype: str
    magnitude: int
    non_finite: int


FLOATS: dict[str, FloatBits] = {
    "F64": FloatBits("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": FloatBits("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": FloatBits("<u2", 0x7FFF, 0x7C00),
    "BF16": FloatBits("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": FloatBits("u1", 0x7F, 0x7C),
    "F8_E4M3": FloatBits("u1", 0x7F, 0x7F),  # the "fn" kind: no infinity, one NaN
}


class StoredTensor(NamedTuple):
    """The place of a tensor: `num_bytes` at `offset` of `file`, row-major; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Some of its rows, as a separate tensor."""
        width = self.num_bytes // self.shape[0]
        shape, offset = (end - begin, *self.shape[1:]), self.offset + begin * width
        return self._replace(shape=shape, offset=offset, num_bytes=(end - begin) * width)


def read_weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor, from the index of a model in several files in its folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has the weight_map {weight_map!r:.100}: fetch or write it again")
    for name in weight_map.values():
        check_weight_name(name, index)
    return weight_map


def packed_weights(quantization: object, where: object) -> str | None:
    """The weight file of a packed folder, or the index of several, as the `quantization_config` of its config names it.

    None for a folder that castlm did not pack. Raises `InputError` for a name that castlm does not write.
    """
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    name = quantization.get("weights", PACKED_SINGLE)
    if name not in (PACKED_SINGLE, PACKED_INDEX):
        raise InputError(
            f"{where} names the weights {name!r:.200}, and only {PACKED_SINGLE} or {PACKED_INDEX} is read: pack the "
            "model again"
        )
    return str(name)


def check_weight_name(name: object, where: object) -> None:
    """Raises `InputError` unless `name` is the name of a safetensors file in a folder, with exactly this suffix.

    By the suffix alone, transformers decides whether it reads a file as safetensors or unpickles it.
    """
    if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
        raise InputError(
            f"{where} names the weights {name!r:.200}, and only NAME.safetensors in its folder, in ASCII, is read: "
            "save the model as safetensors"
        )


def check_weight_files(files: Sequence[Path], folder: Path | None = None) -> None:
    """Raises `InputError` unless the weight files of a model are different safetensors files in one folder.

    Args:
        folder: the folder; None takes the first file's.
    """
    seen: dict[object, Path] = {}
    for file in files:
        check_weight_name(file.name, file.parent)
        stat = check_regular(file).stat()
        for key in (file.name.lower(), (stat.st_dev, stat.st_ino)):  # the same on some file systems, or by a link
            if (twin := seen.setdefault(key, file)) is not file:
                raise InputError(f"{twin} and {file} are one file under two names: fetch or write the model again")
        if file.parent != (folder or files[0].parent):
            raise InputError(f"{file} is not in {folder or files[0].parent}: copy the whole model into one folder")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        InputError: the file cannot be read, is not a safetensors file, or is shorter or longer than its header says.
    """
    open_regular(file).close()  # safetensors' own message for an unreadable file does not tell why
    try:
        with safe_open(file, "np"):  # checks the header and the size of the file, and reads no data
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file} is not a whole safetensors file ({one_line(error)}): fetch or write it again"
        ) from error
    with open_regular(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + begin, end - begin)
    return found


def read_headers(files: Sequence[Path], weight_map: Mapping[str, str], index: Path) -> dict[str, StoredTensor]:
    """The tensors of the weight files of a model, by name.

    Args:
        weight_map: the file name of each tensor, as `index` says; empty of a model in one file.

    Raises:
        InputError: a file cannot be read, or a tensor is not stored exactly once, where the index says.
    """
    headers = {file.name: read_header(file) for file in files}
    count = Counter(name for header in headers.values() for name in header)
    wrong = [name for name, file in weight_map.items() if name not in headers[file]]
    wrong += [name for name, times in count.items() if times > 1]
    if wrong:
        raise InputError(
            f"{index} and its files do not agree on {wrong[0]}: one file must hold it, which the index names; fetch "
            "them again"
        )
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def magnitude_chunks(tensor: StoredTensor, step: int = 1) -> Iterator[np.ndarray]:
    """The bits of a float tensor without the sign, flat, in chunks of a multiple of `step` elements.

    Args:
        tensor: one whose dtype is in `FLOATS` and whose size divides by `step`.

    Yields:
        unsigned integers, 1-D; the buffer is reused for the next chunk.
    """
    floats = FLOATS[tensor.dtype]
    dtype = np.dtype(floats.dtype)
    for chunk in byte_chunks(tensor, step * dtype.itemsize):
        bits = chunk.view(dtype)
        bits &= dtype.type(floats.magnitude)
        yield bits


def byte_chunks(tensor: StoredTensor, step: int = 1) -> Iterator[np.ndarray]:
    """The bytes of a tensor, uint8, 1-D, in chunks of a multiple of `step`; the buffer is reused for the next chunk."""
    size = max(1, CHUNK_BYTES // step) * step
    buffer = np.empty(min(size, tensor.num_bytes), np.uint8)
    left = tensor.num_bytes
    with open_regular(tensor.file) as stream:
        stream.seek(tensor.offset)
        while left:
            chunk, done = buffer[: min(left, len(buffer))], 0
            while done < len(chunk):
                count = stream.readinto(chunk.data[done:])
                if not count:
                    raise InputError(f"{tensor.file} was cut short while {tensor.name} was read")
                done += count
            yield chunk
            left -= len(chunk)


def read_bytes(tensor: StoredTensor) -> np.ndarray:
    """All bytes of a tensor, uint8, 1-D. Unlike the pages of a mapped file, they are freed with the result."""
    return next(byte_chunks(tensor, max(1, tensor.num_bytes)), np.empty(0, np.uint8))


class OpenFiles:
    """Reads whole tensors of a model's files, each of which is opened once."""

    def __init__(self) -> None:
        self._streams: dict[Path, BufferedReader] = {}

    def read_bytes(self, tensor: StoredTensor) -> np.ndarray:
        """All bytes of a tensor, uint8, 1-D. Unlike the pages of a mapped file, they are freed with the result."""
        if tensor.file not in self._streams:
            self._streams[tensor.file] = open_regular(tensor.file)
        content = np.empty(tensor.num_bytes, np.uint8)
        done, descriptor = 0, self._streams[tensor.file].fileno()
        while done < tensor.num_bytes:
            count = os.preadv(descriptor, [content[done:].data], tensor.offset + done)
            if not count:
                raise InputError(f"{tensor.file} was cut short while {tensor.name} was read")
            done += count
        return content


def non_finite_of(bits: np.ndarray, dtype: str) -> int:
    """The number of NaN and infinite values in a chunk of `magnitude_chunks`."""
    threshold = bits.dtype.type(FLOATS[dtype].non_finite)
    return int(np.count_nonzero(bits >= threshold)) if bits.max() >= threshold else 0


def count_non_finite(tensor: StoredTensor) -> int:
    """The number of NaN and infinite values of a tensor; 0 for integers."""
    if tensor.dtype not in FLOATS:
        return 0
    return sum(non_finite_of(bits, tensor.dtype) for bits in magnitude_chunks(tensor))
