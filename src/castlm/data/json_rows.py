"""The documents in lines of JSON. Each line is parsed once before a run, by one of the ranks that open the file."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Columns, Document, Kind, find_columns, is_undecided, types_of
from castlm.data.options import TextOptions
from castlm.files.reading import parse_json


class Share(NamedTuple):
    """The part of the lines that this process checks, where several open the same files."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all ranks, by rank."""


ALONE = Share()
"""The share of a process that checks all lines."""


class LineIndex(NamedTuple):
    """The lines that hold a document: two int64 arrays, (num_documents,)."""

    start: np.ndarray
    """First byte of each line."""
    stop: np.ndarray


class JsonRows:
    """The documents in the lines of a file; the first row with a document determines the columns."""

    def __init__(self, options: TextOptions, folder: Path, share: Share) -> None:
        self._options, self._folder, self._share = options, folder, share
        self._columns: Columns | None = None
        self.kind = Kind.TEXT
        """Kind of the lines read so far; after `index`, of the whole file."""

    def index(self, lines: Iterable[bytes], path: Path) -> LineIndex:
        """Finds the lines of a file, and checks them together with the other ranks.

        Raises:
            InputError: the first line that is wrong, on every rank, or the file has other lines on another rank.
        """
        starts, stops, blank, at = array("q"), array("q"), list[int](), 0
        wrong: list[tuple[int, str]] = []
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                is_mine = self._columns is None or len(starts) % self._share.size == self._share.rank
                try:
                    if is_mine and not self.read(line, f"{path}, line {number}").text.strip():
                        blank.append(len(starts))
                except InputError as error:
                    wrong.append((number, str(error)))
                    break
                starts.append(at)
                stops.append(at + len(line))
            at += len(line)
        found = self._share.gather((wrong, len(starts), blank, self.kind))
        if first := min((line for rank in found for line in rank[0]), default=None):
            raise InputError(first[1])
        if other := next((rank for rank, (_, count, _, _) in enumerate(found) if count != found[0][1]), None):
            raise InputError(f"{path} has other lines on rank {other} than on rank 0: give all ranks the same files")
        self.kind = max(rank[3] for rank in found)
        keep = np.ones(len(starts), dtype=bool)
        keep[[place for rank in found for place in rank[2]]] = False
        start, stop = (np.asarray(places, dtype=np.int64)[keep] for places in (starts, stops))
        return LineIndex(start, stop)

    def read(self, line: bytes, where: str) -> Document:
        """The document of a line.

        Raises:
            InputError: the line is not JSON, or as `Columns.document`.
        """
        try:
            decoded = line.removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        row = parse_json(decoded, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: holds a JSON {type(row).__name__}: put one JSON object on each line")
        if self._columns is None:
            if is_undecided(holds := types_of(row), self._options.column):
                return Document("")
            self._columns = find_columns(holds, self._options, where, self._folder)
            self.kind = self._columns.kind_of({})
        document = self._columns.document(row, where)
        self.kind = max(self.kind, document.kind)
        return document
