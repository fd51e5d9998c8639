"""Stores the places of a checkpoint's tensors in metadata.json; torch's own storage uses a pickle, which can run code.

Tensors are in the files of torch.distributed.checkpoint, one for each rank. A checkpoint is read only if its metadata
describes exactly the tensors of the run, in files of the checkpoint itself, each part within its file. Tensors are
unpickled with `weights_only`, which runs no code, and are never decompressed.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_json, read_json_mapping

METADATA = "metadata.json"
DATA_FILE = re.compile(r"__\d{1,6}_\d{1,6}\.distcp")
_DTYPES = {str(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8)}
_DTYPES |= {str(t): t for t in (torch.int16, torch.int32, torch.int64, torch.bool)}


class JsonWriter(FileSystemWriter):
    """torch's writer, whose metadata is JSON."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes metadata.json, on the main rank, after all ranks have written their files."""
        where = {(w.index.fqn, w.index.offset): w.storage_data for written in results for w in written}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is not a tensor"
            chunks = []
            for chunk in tensor.chunks:
                at = where[name, chunk.offsets]
                place = {"file": at.relative_path, "start": at.offset, "length": at.length}
                chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), **place})
            tensors[name] = {"dtype": str(tensor.properties.dtype), "size": list(tensor.size), "chunks": chunks}
        atomic_write_json(Path(self.path) / METADATA, {"tensors": tensors})


class JsonReader(FileSystemReader):
    """torch's reader, for checkpoints of `JsonWriter`.

    Args:
        state: nested dict of the tensors that the checkpoint is read into.

    Raises:
        InputError: the metadata is corrupt, or describes other tensors than `state`.
    """

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._metadata = read_metadata(path, dict(_flat(state)))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        """The bytes of one tensor. Raises `ValueError` if they are compressed, as in a zip bomb."""
        view = io.BytesIO(super()._slice_file(file, sinfo).read(sinfo.length))
        with zipfile.ZipFile(view) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > sinfo.length:
                raise ValueError(f"{sinfo.relative_path} holds compressed tensors")
        view.seek(0)
        return view


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested dict, by the names that torch.distributed.checkpoint gives them."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_metadata(path: Path, expected: Mapping[str, Tensor]) -> Metadata:
    """The metadata of the checkpoint `path`, which must hold the tensors `expected`.

    Raises:
        InputError: it is corrupt, or describes other tensors.
    """
    remedy = f"remove {path} to resume from an older one"
    content = read_json_mapping(path / METADATA, remedy).get("tensors")
    try:
        if not isinstance(content, dict):
            raise ValueError("it lists no tensors")
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, tensor in expected.items():
            if name not in content:
                raise ValueError(f"{name} is missing")
            chunks = _chunks(path, name, content[name], tensor)
            tensors[name] = TensorStorageMetadata(
                TensorProperties(_DTYPES[content[name]["dtype"]]), tensor.size(), [chunk for chunk, _ in chunks]
            )
            storage |= {MetadataIndex(name, chunk.offsets, i): at for i, (chunk, at) in enumerate(chunks)}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path / METADATA} does not describe this run ({why}): {remedy}") from None
    return Metadata(tensors, storage_data=storage)


def _chunks(
    path: Path, name: str, stored: Mapping[str, Any], tensor: Tensor
) -> list[tuple[ChunkStorageMetadata, _StorageInfo]]:
    """The parts of a tensor and their places. Raises `ValueError` unless they make up the whole tensor."""
    size = list(tensor.size())
    if stored["size"] != size or _DTYPES[stored["dtype"]] != tensor.dtype:
        raise ValueError(f"{name} is {stored['dtype']} {stored['size']}, not {tensor.dtype} {size}")
    found, total = [], 0
    for chunk in stored["chunks"]:
        offsets, sizes = _counts(chunk["offsets"], len(size)), _counts(chunk["sizes"], len(size))
        if any(offset + length > whole for offset, length, whole in zip(offsets, sizes, size)):
            raise ValueError(f"a part of {name} lies outside it")
        total += math.prod(sizes)
        file, (start, length) = chunk["file"], _counts([chunk["start"], chunk["length"]], 2)
        if not isinstance(file, str) or not DATA_FILE.fullmatch(file) or (path / file).is_symlink():
            raise ValueError(f"{file!r} is not a file of a checkpoint")
        if start + length > (path / file).stat().st_size:
            raise ValueError(f"{file} is shorter than {start + length} bytes")
        found.append((ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), _StorageInfo(file, start, length)))
    if total != math.prod(size):
        raise ValueError(f"the parts of {name} do not make up all of it")
    return found


def _counts(values: Any, length: int) -> list[int]:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{values!r} is not a list of {length} numbers")
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{values!r} are not counts")
    return values
