"""Reads the documents in lines of JSON, plain or gzipped, in place.

Each line is parsed once before a run, by one of the ranks that open the file, so that a bad one is found then.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Columns, Document, Kind, find_columns, is_undecided, types_of
from castlm.data.options import TextOptions
from castlm.data.readers import READ_BYTES, Pool, Spans, map_file
from castlm.files.reading import open_regular, parse_json, sha256_file

SEGMENT_BYTES = 8 << 20  # between two seek points of a gzip file
CHUNK_BYTES = 16 << 20  # decompressed at a time, as a file may be 1,000 times smaller than its text
MAX_LINE_BYTES = 64 << 20  # of a line, with the images in it, times `document_limit`


class Share(NamedTuple):
    """The part of the lines that this process checks, where several open the same files."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all ranks, by rank."""


ALONE = Share()
"""The share of a process that checks all lines."""


class JsonRows:
    """The documents in the lines of a file; the first row with a document determines the columns."""

    def __init__(self, options: TextOptions, folder: Path, share: Share) -> None:
        self._options, self._folder, self._share = options, folder, share
        self._columns: Columns | None = None
        self.kind = Kind.TEXT
        """Kind of the lines read so far; after `index`, of the whole file."""

    def index(self, lines: Iterable[bytes], path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The first byte of each line that holds a document, and the one after it: two int64 arrays, (num_documents,).

        Checks the lines together with the other ranks.

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
        return np.asarray(starts, dtype=np.int64)[keep], np.asarray(stops, dtype=np.int64)[keep]

    def read(self, line: bytes, where: str) -> Document:
        """The document of a line.

        Raises:
            InputError: the line is not JSON in UTF-8, or as `Columns.document`.
        """
        row = parse_json(line, where)
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


def open_json_lines(path: Path, options: TextOptions, share: Share) -> Spans:
    """A file with one JSON object per line."""
    rows = JsonRows(options, path.parent, share)
    with open_regular(path) as file:
        lines = split_lines(iter(partial(file.read, READ_BYTES), b""), path, options.document_limit)
        start, stop = rows.index(lines, path)
    last = np.ones(len(start), dtype=bool)
    spans = Spans(map_file(path), start, stop, last, partial(rows.read, where=str(path)), path)
    spans.kind = rows.kind
    return spans


class GzipJsonLines:
    """Gzipped JSON lines with random access: a copy of the decompressor is kept every `SEGMENT_BYTES`."""

    def __init__(self, path: Path, options: TextOptions, pool: Pool, share: Share) -> None:
        self._path, self._rows, self._pool = path, JsonRows(options, path.parent, share), pool
        # For each segment: where it starts in the decompressed text and in the file, and the decompressor there.
        self._points: list[tuple[int, int, Any]] = [(0, 0, None)]
        try:
            self._start, self._stop = self._rows.index(split_lines(self._scan(), path, options.document_limit), path)
        except (zlib.error, EOFError, OSError) as error:
            raise InputError(f"{path}: not a whole gzip file ({error}): fetch or compress it again") from error
        begins = np.asarray([point[0] for point in self._points])
        self.kind = self._rows.kind
        self.last = np.ones(len(self._start), dtype=bool)
        self.unit = np.searchsorted(begins, self._start, side="right") - 1
        ends = begins.copy()  # a line belongs to the segment that it starts in, and may reach into the next
        np.maximum.at(ends, self.unit, self._stop)
        self.unit_bytes = ends - begins

    def _scan(self) -> Iterator[bytes]:
        total = 0
        for chunk, offset, inflater in _inflate(self._path):
            yield chunk
            total += len(chunk)
            if offset is not None and total - self._points[-1][0] >= SEGMENT_BYTES:
                self._points.append((total, offset, inflater.copy()))

    def read(self, piece: int) -> Document:
        unit = int(self.unit[piece])
        segment = self._pool.get((id(self), unit), int(self.unit_bytes[unit]), lambda: self._read(unit))
        begin = self._points[unit][0]
        line = segment[self._start[piece] - begin : self._stop[piece] - begin]
        return self._rows.read(line, str(self._path))

    def _read(self, unit: int) -> bytes:
        _, offset, inflater = self._points[unit]
        parts, missing = [], int(self.unit_bytes[unit])
        for chunk, _, _ in _inflate(self._path, offset, inflater):
            parts.append(chunk[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        return b"".join(parts)

    def sha256(self) -> str:
        return sha256_file(self._path)


def _inflate(path: Path, offset: int = 0, inflater: Any = None) -> Iterator[tuple[bytes, int | None, Any]]:
    """Chunks of a gzip file (of several members, too), and the decompressor after each.

    After the text of each `READ_BYTES` of the file comes an empty chunk, with the offset to continue from.
    """
    inflater = inflater.copy() if inflater else zlib.decompressobj(wbits=31)
    with open_regular(path) as file:
        file.seek(offset)
        while raw := file.read(READ_BYTES):
            chunk = b""
            while raw or len(chunk) == CHUNK_BYTES:  # then the decompressor may hold more
                if inflater.eof:
                    raw = raw.lstrip(b"\0")  # padding after a member is allowed
                    if not raw:
                        break
                    inflater = zlib.decompressobj(wbits=31)
                chunk = inflater.decompress(raw, CHUNK_BYTES)
                raw = inflater.unconsumed_tail or inflater.unused_data
                yield chunk, None, inflater
            yield b"", file.tell(), inflater
    if not inflater.eof:
        raise EOFError("it ends too early")


def split_lines(chunks: Iterable[bytes], path: Path, document_limit: float = 1.0) -> Iterator[bytes]:
    """The lines of a file, with their ends.

    Raises:
        InputError: a line is longer than `document_limit` times `MAX_LINE_BYTES`.
    """
    most, begun, number, num_begun = MAX_LINE_BYTES * document_limit, list[bytes](), 1, 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*begun, line, b"\n"])
            begun, num_begun, number = [], 0, number + 1
        begun.append(rest)
        num_begun += len(rest)
        if num_begun > most:
            raise InputError(
                f"{path}, line {number} is longer than {most:,.0f} bytes: divide it, put a long text into a .txt file, "
                "which is read in pieces, or raise document_limit"
            )
    if line := b"".join(begun):
        yield line
