"""Reads the documents of one file in place, any of them by its number, without a copy on disk and in little memory.

Plain text and JSON lines are memory-mapped. A gzip file is read from seek points, a parquet file
(`castlm.data.parquet`) by row groups. All files share a `Pool` of bounded size for decompressed parts.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import re
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Document, Kind
from castlm.data.json_rows import JsonRows, Share
from castlm.data.options import TextOptions
from castlm.files.reading import open_regular, sha256_file

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 256 << 10  # a longer document of a text file is read and tokenized in pieces of about this size
SEGMENT_BYTES = 8 << 20  # between two seek points of a gzip file
READ_BYTES = 1 << 20
CHUNK_BYTES = 16 << 20  # decompressed at a time, as a file may be 1,000 times smaller than its text
MAX_LINE_BYTES = 64 << 20  # of a JSON line, with the images in it, times `document_limit`

_INK = re.compile(rb"\S")
# Tokenizers split at these places themselves, so the tokens are those of the whole text, as `castlm.data.tokens` shows
# them what stands on the other side. The start of a line behind a blank one is the last choice.
_LINE_START = re.compile(rb"(?<=\S\n)(?=\S)")
_WORD_START = re.compile(rb"(?<=\S)(?= \S)")
_ANY_START = re.compile(rb"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


Position = int | dict[str, Any] | None


class Piece(NamedTuple):
    """A document, or a part of a very long one."""

    text: str
    """For a conversation its JSON, which `castlm.data.chat` renders."""
    first: bool
    """Whether it is the first piece of its document."""
    last: bool
    """Whether it is the last piece of its document."""
    position: Position
    """The `position` with which `pieces` starts at this piece again, as plain JSON."""
    is_cut: bool = False
    """Whether the document was cut off, so that the end-of-text after it does not count."""
    kind: Kind = Kind.TEXT
    extra: tuple[str, ...] = ()
    """What a conversation brings beside its text; see `Document`."""


class Source(Protocol):
    """The pieces of one file, numbered from 0. A document is one piece or a few consecutive ones.

    `last` (bool, num_pieces): whether the piece ends its document. `unit` (int64, num_pieces): its unit of
    decompression. `unit_bytes` (int64, num_units): memory of the decompressed unit, 0 if the file is not compressed.
    `kind`: the largest kind among the documents. Blank documents are dropped.
    """

    last: np.ndarray
    unit: np.ndarray
    unit_bytes: np.ndarray
    kind: Kind

    def read(self, piece: int) -> Document: ...

    def sha256(self) -> str: ...


class Pool:
    """Keeps the most recently read units, at most `limit` bytes of them (but always the last one)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[tuple[int, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # evaluation may read while the loader reads ahead

    def get(self, key: tuple[int, int], num_bytes: int, load: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            while self._held and self._bytes + num_bytes > self.limit:
                self._bytes -= self._held.popitem(last=False)[1][1]
            value = load()
            self._held[key] = (value, num_bytes)
            self._bytes += num_bytes
            return value


class Spans:
    """Pieces that are byte ranges of a buffer (a mapped file, or bytes in memory); `decode` reads one."""

    def __init__(
        self,
        buffer: bytes | mmap.mmap,
        start: Sequence[int] | np.ndarray,
        stop: Sequence[int] | np.ndarray,
        last: Sequence[bool] | np.ndarray,
        decode: Callable[[bytes], Document],
        path: Path | None = None,
    ) -> None:
        self._buffer, self._decode, self._path = buffer, decode, path
        self.kind = Kind.TEXT
        self._start, self._stop = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
        self.last = np.asarray(last, dtype=bool)
        self.unit = np.cumsum(self.last) - self.last  # every document is a unit of its own
        self.unit_bytes = np.zeros(int(self.last.sum()), dtype=np.int64)

    def read(self, piece: int) -> Document:
        return self._decode(self._buffer[self._start[piece] : self._stop[piece]])

    def sha256(self) -> str:
        if self._path is not None:
            return sha256_file(self._path)
        ends = self._stop[self.last].tobytes()
        return hashlib.sha256(ends + bytes(self._buffer)).hexdigest()


def open_text(path: Path) -> Spans:
    """A UTF-8 text file: one document, byte for byte, or several where it contains `<|endoftext|>`.

    The line breaks around that separator are dropped.
    """
    buffer = _map(path)
    _check_utf8(buffer, path)
    return _cut_text(buffer, path)


def texts_in_memory(texts: Iterable[str]) -> Spans:
    """Texts in memory, each one document."""
    encoded = [text.encode() for text in texts]
    stops = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    starts = stops - [len(text) for text in encoded]
    return _pieces(b"".join(encoded), zip(starts.tolist(), stops.tolist()))


def _cut_text(buffer: bytes | mmap.mmap, path: Path) -> Spans:
    begin = len(codecs.BOM_UTF8) if buffer[:3] == codecs.BOM_UTF8 else 0
    cuts = [match.span() for match in re.finditer(re.escape(SEPARATOR.encode()), buffer)]
    if not cuts:
        return _pieces(buffer, [(begin, len(buffer))], path)
    starts, stops = [begin, *(stop for _, stop in cuts)], [*(start for start, _ in cuts), len(buffer)]
    return _pieces(buffer, (_trim(buffer, *span) for span in zip(starts, stops)), path)


def _trim(buffer: bytes | mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    while start < stop and buffer[start] in b"\r\n":
        start += 1
    while start < stop and buffer[stop - 1] in b"\r\n":
        stop -= 1
    return start, stop


def _pieces(buffer: bytes | mmap.mmap, documents: Iterable[tuple[int, int]], path: Path | None = None) -> Spans:
    """Drops blank documents and splits long ones at line starts, else between words, else not at all."""
    starts, stops, last = array("q"), array("q"), []
    for start, stop in documents:
        if not _INK.search(buffer, start, stop):
            continue
        while stop - start > 2 * PIECE_BYTES:
            near = start + PIECE_BYTES, start + 2 * PIECE_BYTES
            cut = _LINE_START.search(buffer, *near) or _WORD_START.search(buffer, *near)
            cut = cut or _ANY_START.search(buffer, start + PIECE_BYTES, stop)
            if cut is None:
                break
            starts.append(start)
            stops.append(cut.start())
            last.append(False)
            start = cut.start()
        starts.append(start)
        stops.append(stop)
        last.append(True)
    return Spans(buffer, starts, stops, last, lambda span: Document(span.decode()), path)


def open_json_lines(path: Path, options: TextOptions, share: Share) -> Spans:
    """A file with one JSON object per line."""
    rows = JsonRows(options, path.parent, share)
    with open_regular(path) as file:
        lines = split_lines(iter(partial(file.read, READ_BYTES), b""), path, options.document_limit)
        found = rows.index(lines, path)
    last = np.ones(len(found.start), dtype=bool)
    decode = partial(rows.read, where=str(path))
    spans = Spans(_map(path), found.start, found.stop, last, decode, path)
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


def _map(path: Path) -> bytes | mmap.mmap:
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return b""


def _check_utf8(buffer: bytes | mmap.mmap, path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(buffer), READ_BYTES):
        try:
            decoder.decode(buffer[at : at + READ_BYTES], final=at + READ_BYTES >= len(buffer))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 near byte {at + error.start} ({error.reason}): convert the file to UTF-8"
            ) from error
