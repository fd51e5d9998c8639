"""Reads GGUF files: faster than the packages gguf and transformers alone, and one weight at a time.

gguf slices its memory-mapped file for each string of a vocabulary, and a slice of a `numpy.memmap` costs ten times as
much as one of an array. transformers reads a file for the config, again for the tokenizer and again for the weights,
and builds gguf's map of tensor names again for each module of a model. Without that, "demo" is read in a third of the
time. transformers also dequantizes all weights before it loads one.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextlib.contextmanager
def fast_gguf() -> Iterator[None]:
    """Inside the context, gguf reads files as plain arrays, and makes each map of tensor names once.

    The reader of the last file is kept for the next context, until `forget_gguf`.
    """
    import gguf

    own = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update(GGUFReader=reader_of, get_tensor_name_map=functools.cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(own)


def forget_gguf() -> None:
    """Frees the reader of the last file."""
    _reader_of_version.cache_clear()


_ROWS = 1024  # dequantized at a time: gguf holds several times their size


class GgufWeights:
    """The weights of a model in a GGUF file, which are dequantized when they are read; see `gguf_weights`."""

    def __init__(self, file: Path, mapped: mmap.mmap, tensors: Mapping[str, Any], processor: Any) -> None:
        self.file, self._mapped, self._tensors, self._processor = file, mapped, tensors, processor

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight by its name in the state dict; None if the file lacks it."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))

    def tensor(self, name: str) -> Any:
        """gguf's tensor of a weight."""
        return self._tensors[name]

    def row_order(self, name: str) -> np.ndarray:
        """For each row of a matrix, the number of the row of the file that holds it.

        llama.cpp has the rotary pairs of q and k beside each other in some families.
        """
        tensor = self._tensors[name]
        numbers = np.arange(int(tensor.shape[-1]))[:, None]
        moved = self._processor.process(
            weights=numbers, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
        ).weights
        assert np.array_equal(np.sort(moved, axis=0), numbers), tensor.name
        order: np.ndarray = moved[:, 0]
        return order

    def read(self, name: str) -> Tensor:
        """A weight in fp32, with the bits that transformers gives it."""
        import gguf

        tensor = self._tensors[name]
        data, kind = tensor.data, tensor.tensor_type
        if data.ndim == 1:
            weight = np.copy(gguf.dequantize(data, kind))  # a part of the file's map, where that is in fp32
        else:
            weight = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
            for start in range(0, len(data), _ROWS):
                rows = slice(start, start + _ROWS)
                weight[rows] = gguf.dequantize(data[rows], kind)
        laid_out = self._processor.process(
            weights=weight, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
        )
        if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read count as memory of the process until then
            self._mapped.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(np.ascontiguousarray(laid_out.weights))


def gguf_weights(file: Path, model: PreTrainedModel) -> GgufWeights | None:
    """The weights of a model, which may be on the meta device, in a GGUF file.

    None for an architecture in which transformers makes a weight of several tensors, or changes their names.
    """
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    with fast_gguf():
        reader = reader_of(file)
        (architecture,) = loader.read_field(reader, "general.architecture")
        kind = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)
        by_one = (
            *(loader.TensorProcessor, loader.LlamaTensorProcessor),
            *(loader.Gemma2TensorProcessor, loader.NemotronTensorProcessor),
        )
        if is_gguf_arch_supported(architecture) or kind not in by_one:
            return None
        processor = kind(config=loader.load_gguf_checkpoint(str(file))["config"])
        name_of = loader.get_gguf_hf_weights_map(model, processor)
    found = [tensor for tensor in reader.tensors if tensor.name in name_of]
    tensors = {name_of[tensor.name]: tensor for tensor in found}
    return GgufWeights(file, reader.mapped, tensors, processor) if len(tensors) == len(found) else None


_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"  # names of llama.cpp


def is_head_finer(file: Path) -> bool:
    """Whether the output head of a GGUF file has more bits than its embedding."""
    tensors = {tensor.name: tensor for tensor in reader_of(file).tensors}
    return bool(tensors[_HEAD].n_bytes > tensors[_EMBEDDING].n_bytes)


def correlation_of_tables(file: Path) -> float | None:
    """The correlation between embedding and output head of a GGUF file, by up to 1,024 of their rows.

    None where the file has one of them alone.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in reader_of(file).tensors}
    found = [tensors[name] for name in (_EMBEDDING, _HEAD) if name in tensors]
    if len(found) < 2 or list(found[0].shape) != list(found[1].shape):
        return None
    chosen = np.linspace(0, len(found[0].data) - 1, _ROWS).astype(int)
    embedding, head = (gguf.dequantize(np.ascontiguousarray(of.data[chosen]), of.tensor_type).ravel() for of in found)
    return float(np.corrcoef(embedding, head)[0, 1])


def num_elements(file: Path) -> int:
    """The number of weights in a GGUF file."""
    return sum(int(tensor.n_elements) for tensor in reader_of(file).tensors)


def read_fields(path: str | os.PathLike[str], *names: str) -> dict[str, str]:
    """Those of the text fields `names` that the header of a GGUF file has."""
    fields = reader_of(path).fields
    return {name: str(fields[name].contents()) for name in names if name in fields}


def reader_of(path: str | os.PathLike[str]) -> Any:
    """gguf's reader of a file, on plain arrays; kept until `forget_gguf`."""
    return _reader_of_version(os.fspath(path), os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _reader_of_version(path: str, modified_ns: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:  # an array in place of the reader's `np.memmap`
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)  # the same memory
            self.mapped: mmap.mmap = mapped.base

    return Reader(path)
