"""Speeds up the reading of GGUF files by the packages gguf and transformers, to a third of the time for "demo".

gguf slices its memory-mapped file for each string of a vocabulary, and a slice of a `numpy.memmap` costs ten times as
much as one of an array. transformers reads a file for the config, again for the tokenizer and again for the weights,
and builds gguf's map of tensor names again for each module of a model.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def fast_gguf() -> Iterator[None]:
    """Inside the context, gguf reads files as plain arrays, and makes each map of tensor names once.

    The reader of the last file is kept for the next context, until `forget_gguf`.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _reader, functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def forget_gguf() -> None:
    """Frees the reader of the last file."""
    _reader_of_version.cache_clear()


def read_fields(path: str | os.PathLike[str], *names: str) -> dict[str, str]:
    """Those of the text fields `names` that the header of a GGUF file has."""
    fields = _reader(path).fields
    return {name: str(fields[name].contents()) for name in names if name in fields}


def _reader(path: str | os.PathLike[str]) -> Any:
    return _reader_of_version(os.fspath(path), os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _reader_of_version(path: str, modified_ns: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = mapped.view(np.ndarray)  # the same memory

    return Reader(path)
