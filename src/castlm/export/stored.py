"""Read safetensors as they lie on disk: headers, shard indexes, and the bits of a tensor a chunk at a time.

Own code in place of `safetensors.safe_open`, because numpy has no bf16 and torch takes a second to import. Zero,
infinity and NaN need no arithmetic: without its sign bit a float is ordered like the unsigned integer of its bits.
Format: 8 bytes little-endian header length, a JSON header, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castlm.core.errors import InputError
from castlm.inference.format import INDEX as PACKED_INDEX

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
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
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3"), 1)


class StoredTensor(NamedTuple):
    """Where a tensor lies: `num_bytes` at `offset` of `file`, row-major, in safetensors' dtype names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        InputError: a file that cannot be read, is no safetensors file, or is shorter than its header promises.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(f"{file} is not a whole safetensors file ({size} bytes): fetch or write it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, file, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the header of {file} is corrupt: fetch or write the file again") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise InputError(f"{tensor.name} overlaps or leaves a hole in {file}: fetch or write the file again")
        end += tensor.num_bytes
    if end != size:
        raise InputError(f"{file} holds {size} bytes where its header says {end}: fetch or write the file again")
    return tensors


def _stored(name: str, entry: dict[str, Any], file: Path, data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    num_bytes = int(end) - int(begin)
    expected = math.prod(shape) * _BYTES.get(entry["dtype"], 0)  # 0: a dtype that is listed but never read
    if begin < 0 or min(shape, default=0) < 0 or num_bytes < 0 or (expected and num_bytes != expected):
        raise ValueError
    return StoredTensor(name, entry["dtype"], shape, file, data_start + int(begin), num_bytes)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from disk, or `InputError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint: a .safetensors file, or a folder with one or with an index of several.

    Raises:
        InputError: nothing there, no safetensors, or an index that names files or tensors that are missing.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: name a checkpoint folder or a .safetensors file")
    if not path.is_dir():
        return read_header(path)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter, not a model: merge it into its base model first")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    indexes = [index, path / PACKED_INDEX]
    if any(file.is_file() for file in indexes):
        return _sharded(next(file for file in indexes if file.is_file()))
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise InputError(f"{path} holds {len(files)} safetensors files and no {index.name}: the folder is not complete")
    others = [file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in sorted(path.glob(suffix))]
    found = f"found {others[0]}: convert it with transformers' save_pretrained" if others else "is it a model folder?"
    raise InputError(f"{path} holds no .safetensors file ({found})")


def _sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: fetch or write it again")
    files = sorted({str(file) for file in weight_map.values()})
    strangers = [file for file in files if os.path.basename(file) != file]
    if strangers:
        raise InputError(f"{index} names {strangers[0]!r}, outside its folder")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise InputError(f"{index} names {len(missing)} missing files, first {missing[0]}: the folder is not complete")
    shards = {file: read_header(index.parent / file) for file in files}
    absent = [name for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        first = f"{absent[0]} in {weight_map[absent[0]]}"
        raise InputError(f"{index} names {len(absent)} tensors that its files lack, first {first}")
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def magnitude_chunks(tensor: StoredTensor, step: int = 1) -> Iterator[np.ndarray]:
    """The bits of a float tensor without the sign, flat, in chunks of a multiple of `step` elements.

    Args:
        tensor: one whose dtype is in `FLOATS` and whose size divides by `step`.

    Yields:
        unsigned integers, 1-D; the buffer is used again for the next chunk.
    """
    floats = FLOATS[tensor.dtype]
    dtype = np.dtype(floats.dtype)
    for chunk in byte_chunks(tensor, step * dtype.itemsize):
        bits = chunk.view(dtype)
        bits &= dtype.type(floats.magnitude)
        yield bits


def num_non_finite_bits(bits: np.ndarray, dtype: str) -> int:
    """How many of the floats that `magnitude_chunks` gave are NaN or infinite."""
    threshold = bits.dtype.type(FLOATS[dtype].non_finite)
    return int(np.count_nonzero(bits >= threshold)) if bits.max() >= threshold else 0


def byte_chunks(tensor: StoredTensor, step: int = 1) -> Iterator[np.ndarray]:
    """The bytes of a tensor, uint8, 1-D, in chunks of a multiple of `step`; the buffer is used again for the next."""
    size = max(1, CHUNK_BYTES // step) * step
    buffer = np.empty(min(size, tensor.num_bytes), np.uint8)
    left = tensor.num_bytes
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        while left:
            chunk = buffer[: min(left, len(buffer))]
            _read_into(stream, chunk, tensor)
            yield chunk
            left -= len(chunk)


def _read_into(stream: Any, chunk: np.ndarray, tensor: StoredTensor) -> None:
    view, done = memoryview(chunk), 0
    while done < len(view):
        try:
            count = stream.readinto(view[done:])
        except OSError as error:
            raise InputError(f"cannot read {tensor.name} from {tensor.file}: {error.strerror}") from error
        if not count:
            raise InputError(f"{tensor.file} was cut short while {tensor.name} was read")
        done += count
