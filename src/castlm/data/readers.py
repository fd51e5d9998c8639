"""Reads the documents of one file in place, any of them by its number, without a copy on disk and in little memory.

Plain text is memory-mapped here, as JSON lines are (`castlm.data.json_lines`). A gzip file is read from seek points, a
parquet file (`castlm.data.parquet`) by row groups. All files share a `Pool` of bounded size for decompressed parts.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Document, Kind
from castlm.files.reading import open_regular, sha256_file

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 256 << 10  # a longer document of a text file is read and tokenized in pieces of about this size
READ_BYTES = 1 << 20

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
    """The extra inputs of a conversation, such as images; see `Document`."""


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
    buffer = map_file(path)
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


def map_file(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file, mapped into memory."""
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
