"""The places of the documents in a .jsonl file, kept beside the output of a run.

To find the documents of a file, each line is parsed and checked, and the file is hashed, on every rank of a run. The
first start of a run leaves what it found. A restart reads that, unless the file has another size or another time of a
change (also of its name or rights), or the options that decide what a document is have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from castlm.data.columns import Kind
from castlm.data.options import TextOptions
from castlm.files.atomic_file import reporting_full_disk
from castlm.files.weights import layout_of, write_safetensors

_VERSION = 1  # raise it where other lines become documents


@dataclass(eq=False)
class LineIndex:
    """The documents of one file."""

    key: dict[str, Any]
    """File and options for which it holds."""
    spans: np.ndarray
    """int64, (num_documents, 2): the first byte of each line with a document, and the one after it."""
    columns_row: tuple[int, int]
    """The bytes of the row that determines the columns."""
    kind: Kind
    sha256: str | None = None
    """The hash of the file, once somebody has asked for it."""


def key_of(file: Path, options: TextOptions) -> dict[str, Any]:
    """What an index depends on, as plain JSON."""
    about = file.stat()
    return {
        "version": _VERSION,
        "path": os.path.realpath(file),
        "size": about.st_size,
        "mtime_ns": about.st_mtime_ns,
        "ctime_ns": about.st_ctime_ns,  # also of a file that was changed and got its old time again
        "column": options.column,
        "document_limit": options.document_limit,
    }


class LineIndexes:
    """The indexes of the files that a run opens.

    Args:
        folder: holds the indexes of an earlier start of the run, if there was one; None looks for none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._found: dict[str, LineIndex] = {}

    def find(self, key: dict[str, Any]) -> LineIndex | None:
        """The index of a file that was opened before, or that an earlier start left whole; None if there is none."""
        kept = self._found.get(_name(key))
        if kept is not None and kept.key == key:
            return kept
        return self._left(key)

    def _left(self, key: dict[str, Any]) -> LineIndex | None:
        if self._folder is None:
            return None
        try:
            with safe_open(self._folder / _name(key), "np") as file:
                about = json.loads(file.metadata()["index"])
                spans = file.get_tensor("spans")
            index = LineIndex(about["key"], spans, tuple(about["columns_row"]), Kind(about["kind"]), about["sha256"])
            places = np.concatenate([spans.ravel(), np.asarray(index.columns_row)])
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):
            return None
        # lines in order, inside the file
        is_whole = spans.dtype == np.int64 and spans.ndim == 2 and spans.shape[1] == 2
        is_whole = is_whole and bool((np.diff(spans.ravel()) >= 0).all() and (spans[:, 0] < spans[:, 1]).all())
        is_whole = is_whole and places.min() >= 0 and places.max() <= key["size"]
        return index if is_whole and index.key == key else None

    def keep(self, index: LineIndex) -> None:
        """Takes an index for `save`."""
        self._found[_name(index.key)] = index

    def save(self, folder: Path) -> None:
        """Writes the indexes of the opened files. Raises `InputError` if the disk is full."""
        for name, index in self._found.items():
            file = folder / name
            if folder == self._folder and self._left(index.key) is not None:
                continue
            folder.mkdir(exist_ok=True)
            about = {name: getattr(index, name) for name in ("key", "columns_row", "kind", "sha256")}
            spans = {"spans": torch.from_numpy(index.spans)}
            with reporting_full_disk(file):
                write_safetensors(file, layout_of(spans), spans.items(), {"index": json.dumps(about)})


def _name(key: dict[str, Any]) -> str:
    """The name of a file's index; it holds the file's own name only for the reader of the folder."""
    return f"{Path(key['path']).name}-{hashlib.sha256(key['path'].encode()).hexdigest()[:16]}.safetensors"
