"""Reads the documents of one file in place, any of them by its number, without a copy on disk and in little memory.

Plain text and JSON lines are memory-mapped. A gzip file is read from seek points and a parquet file by row groups,
which share a `Pool` of bounded size. Opening a file reads its lines or conversations once, so that a bad one is found
before a run.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import mmap
import re
import threading
import zlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from castlm.core.errors import InputError, naming, one_line
from castlm.data.columns import Columns, Document, Kind, find_columns
from castlm.data.options import TextOptions
from castlm.say import silent
from castlm_runtime.reading import check_regular, open_regular, parse_json, sha256_file

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 256 << 10  # a longer document of a text file is read and tokenized in pieces of about this size
READ_BYTES = 1 << 20
SEGMENT_BYTES = 8 << 20  # between two seek points of a gzip file
CHUNK_BYTES = 16 << 20  # decompressed at a time, as a file may be 1,000 times smaller than its text
MAX_LINE_BYTES = 64 << 20  # of a line, with the images in it, times `document_limit`
# Of a parquet file, which says a thousand million equal ones in a few bytes. Each takes 25 bytes of memory.
MAX_ROWS = 1 << 26
MAX_GROUP_BYTES = 4 << 30  # of a decoded row group of a parquet file, times `document_limit`
_ROWS_AT_ONCE = 64  # of a row group, decoded between two looks at its size

_INK = re.compile(rb"\S")
_BLANK = re.compile(rb"\s*")
# Tokenizers split at these places too, so the pieces have the tokens of the whole text: `castlm.data.tokens` tokenizes
# each with the character beyond its end. The start of a line behind a blank one is the last choice.
_LINE_START = re.compile(rb"(?<=\S\n)(?=\S)")
_WORD_START = re.compile(rb"(?<=\S)(?= \S)")
_ANY_START = re.compile(rb"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


class Pieces:
    """The pieces of one file, numbered from 0. A document is one piece or a few consecutive ones.

    Attributes:
        last: bool, (num_pieces,): whether the piece ends its document. Blank documents are dropped.
        unit: int64, (num_pieces,): the unit of decompression of each piece.
        unit_bytes: int64, (num_units,): memory of the decompressed unit, 0 if the file is not compressed.
        kind: the largest kind among the documents.
    """

    path: Path
    kind: Kind
    last: np.ndarray
    unit: np.ndarray
    unit_bytes: np.ndarray

    def read(self, piece: int) -> Document:
        """The content of a piece; only `Documents` knows whether it begins and ends its document."""
        raise NotImplementedError

    def sha256(self) -> str:
        """The hash of the file, in hexadecimal."""
        return sha256_file(self.path)


class Pool:
    """Keeps the most recently read units, at most `limit` bytes of them (but always the last one).

    Args:
        told: called by the readers that share the pool, while they open their files, with the bytes that they have read
            since the last call.
    """

    def __init__(self, limit: int, told: Callable[[int], object] = silent) -> None:
        self.limit, self.told = limit, told
        self._held: OrderedDict[tuple[Path, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # evaluation may read while the loader reads ahead

    def get(self, source: Pieces, unit: int, load: Callable[[int], Any]) -> Any:
        """A unit of a source; `load` reads it if it is not held."""
        key, num_bytes = (source.path, unit), int(source.unit_bytes[unit])
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            self._make_room(num_bytes)
            value = load(unit)
            # a table of equal texts takes far more memory than its file tells
            num_bytes = max(num_bytes, len(value) if isinstance(value, bytes) else value.nbytes)
            self._make_room(num_bytes)
            self._held[key] = (value, num_bytes)
            self._bytes += num_bytes
            return value

    def _make_room(self, num_bytes: int) -> None:
        while self._held and self._bytes + num_bytes > self.limit:
            self._bytes -= self._held.popitem(last=False)[1][1]


# ------------------------------------------------------------------------------------------------------- plain text


class Spans(Pieces):
    """Pieces that are byte ranges of a buffer: a mapped file, or bytes in memory.

    Args:
        start, stop: int64, (num_pieces,): the bytes of each piece.
        decode: reads the bytes of a piece.
    """

    def __init__(
        self,
        buffer: bytes | mmap.mmap,
        start: Sequence[int] | np.ndarray,
        stop: Sequence[int] | np.ndarray,
        last: Sequence[bool] | np.ndarray,
        decode: Callable[[bytes], Document] = lambda span: Document(span.decode()),
        kind: Kind = Kind.TEXT,
    ) -> None:
        self._buffer, self._decode, self.kind = buffer, decode, kind
        self._start, self._stop = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
        self.last = np.asarray(last, dtype=bool)
        self.unit = np.cumsum(self.last) - self.last  # every document is a unit of its own
        self.unit_bytes = np.zeros(int(self.last.sum()), dtype=np.int64)

    def read(self, piece: int) -> Document:
        return self._decode(self._buffer[self._start[piece] : self._stop[piece]])

    def sha256(self) -> str:
        if isinstance(self._buffer, mmap.mmap):
            return hashlib.sha256(self._buffer).hexdigest()
        ends = self._stop[self.last].tobytes()
        return hashlib.sha256(ends + self._buffer).hexdigest()


def open_text(path: Path, told: Callable[[int], object] = silent) -> Spans:
    """A UTF-8 text file: one document, byte for byte, or several where it contains `<|endoftext|>`.

    The line breaks around that separator are dropped. For `told` see `Pool`.
    """
    buffer = map_file(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(buffer), READ_BYTES):
        try:
            decoder.decode(buffer[at : at + READ_BYTES], final=at + READ_BYTES >= len(buffer))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: not UTF-8 near byte {at + error.start} ({error.reason}): convert the file to UTF-8"
            ) from error
        told(READ_BYTES)
    begin = len(codecs.BOM_UTF8) if buffer[:3] == codecs.BOM_UTF8 else 0
    cuts = [match.span() for match in re.finditer(re.escape(SEPARATOR.encode()), buffer)]
    starts, stops = [begin, *(stop for _, stop in cuts)], [*(start for start, _ in cuts), len(buffer)]
    if not cuts:
        return _pieces(buffer, zip(starts, stops))
    spans = []
    for start, stop in zip(starts, stops):
        while start < stop and buffer[start] in b"\r\n":
            start += 1
        while start < stop and buffer[stop - 1] in b"\r\n":
            stop -= 1
        spans.append((start, stop))
    return _pieces(buffer, spans)


def texts_in_memory(texts: Iterable[str]) -> Spans:
    """Texts in memory, each one document."""
    encoded = [text.encode() for text in texts]
    stops = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    starts = stops - [len(text) for text in encoded]
    return _pieces(b"".join(encoded), zip(starts.tolist(), stops.tolist()))


def _pieces(buffer: bytes | mmap.mmap, documents: Iterable[tuple[int, int]]) -> Spans:
    """Drops blank documents and splits long ones at line starts, else between words, else not at all."""
    starts, stops, last = array("q"), array("q"), []
    for start, stop in documents:
        if not _INK.search(buffer, start, stop):
            continue
        while stop - start > 2 * PIECE_BYTES:
            least, most = start + PIECE_BYTES, start + 2 * PIECE_BYTES
            cut = _LINE_START.search(buffer, least, most) or _WORD_START.search(buffer, least, most)
            cut = cut or _ANY_START.search(buffer, least, stop)
            if cut is None:
                break
            starts.append(start)
            stops.append(cut.start())
            last.append(False)
            start = cut.start()
        starts.append(start)
        stops.append(stop)
        last.append(True)
    return Spans(buffer, starts, stops, last)


def map_file(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file, mapped into memory."""
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return b""


# ------------------------------------------------------------------------------------------------------- JSON lines


class JsonRows:
    """The documents in the lines of a file; the first row with a document determines the columns."""

    def __init__(self, path: Path, options: TextOptions) -> None:
        self._path, self._options = path, options
        self._columns: Columns | None = None
        self.columns_row = b""
        """The row that determined the columns."""
        self.kind = Kind.TEXT
        """Kind of the lines read so far; after `index`, of the whole file."""

    def index(self, chunks: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The first byte of each line that holds a document, and the one after it: two int64 arrays, (num_documents,).

        Raises `InputError` for the first line that is wrong.
        """
        starts, stops = array("q"), array("q")
        for number, at, line in split_lines(chunks, self._path, self._options.document_limit):
            if self._read(line, f"{self._path}, line {number}").text.strip():
                starts.append(at)
                stops.append(at + len(line))
        return np.asarray(starts, dtype=np.int64), np.asarray(stops, dtype=np.int64)

    def read(self, line: bytes) -> Document:
        """The document of a line that `index` has checked."""
        return self._read(line, str(self._path))

    def _read(self, line: bytes, where: str) -> Document:
        row = parse_json(line, where)
        with naming(where):
            if not isinstance(row, dict):
                raise InputError(f"holds a JSON {type(row).__name__}: put one JSON object on each line")
            if self._columns is None:
                self._columns = find_columns(row, self._options, self._path.parent)
                if self._columns is None:
                    return Document("")
                self.columns_row = line
            document = self._columns.document(row)
        self.kind = max(self.kind, document.kind)
        return document


def _telling(chunks: Iterable[bytes], told: Callable[[int], object]) -> Iterator[bytes]:
    """The chunks of a file; calls `told` with the bytes of each when the next one is asked for."""
    for chunk in chunks:
        yield chunk
        told(len(chunk))


class JsonLines(Spans):
    """A file with one JSON object per line.

    Args:
        told: see `Pool`.
    """

    def __init__(self, path: Path, options: TextOptions, told: Callable[[int], object] = silent) -> None:
        rows, buffer = JsonRows(path, options), map_file(path)
        with open_regular(path) as file:
            start, stop = rows.index(_telling(iter(partial(file.read, READ_BYTES), b""), told))
        super().__init__(buffer, start, stop, np.ones(len(start), dtype=bool), rows.read, rows.kind)


class GzipJsonLines(Pieces):
    """Gzipped JSON lines with random access: a copy of the decompressor is kept every `SEGMENT_BYTES`.

    A run reads documents in a random order and resumes in the middle of it. Without these seek points each of them
    would take the decompression of all before it, or a copy of the text on the disk.
    """

    def __init__(self, path: Path, options: TextOptions, pool: Pool) -> None:
        self.path, self._rows, self._pool = path, JsonRows(path, options), pool
        # For each segment: where it starts in the decompressed text and in the file, and the decompressor there.
        self._points: list[tuple[int, int, Any]] = [(0, 0, None)]

        def scan() -> Iterator[bytes]:
            total = read = 0
            for chunk, offset, inflater in _inflate(path):
                yield chunk
                total += len(chunk)
                if offset is not None:
                    pool.told(offset - read)
                    read = offset
                if offset is not None and total - self._points[-1][0] >= SEGMENT_BYTES:
                    self._points.append((total, offset, inflater.copy()))

        try:
            self._start, self._stop = self._rows.index(scan())
        except (zlib.error, EOFError, OSError) as error:
            raise InputError(f"{path}: not a whole gzip file ({error}): fetch or compress it again") from error
        begins = np.asarray([point[0] for point in self._points])
        self.kind = self._rows.kind
        self.last = np.ones(len(self._start), dtype=bool)
        self.unit = np.searchsorted(begins, self._start, side="right") - 1
        ends = begins.copy()  # a line belongs to the segment that it starts in, and may reach into the next
        np.maximum.at(ends, self.unit, self._stop)
        self.unit_bytes = ends - begins

    def read(self, piece: int) -> Document:
        unit = int(self.unit[piece])
        segment, begin = self._pool.get(self, unit, self._segment), self._points[unit][0]
        return self._rows.read(segment[self._start[piece] - begin : self._stop[piece] - begin])

    def _segment(self, unit: int) -> bytes:
        _, offset, inflater = self._points[unit]
        parts, missing = [], int(self.unit_bytes[unit])
        for chunk, _, _ in _inflate(self.path, offset, inflater):
            parts.append(chunk[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        return b"".join(parts)


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


def split_lines(chunks: Iterable[bytes], path: Path, document_limit: float = 1.0) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file that are not blank, with their ends; refuses one longer than `document_limit` times
    `MAX_LINE_BYTES`.

    Yields:
        The number of the line, from 1, its first byte in the file, and its content.
    """
    most, begun, num_begun, number, at = MAX_LINE_BYTES * document_limit, list[bytes](), 0, 1, 0
    for chunk in chunks:
        here = 0
        while end := chunk.find(b"\n", here) + 1:
            piece = chunk[here:end]
            if not begun and piece.isspace():  # 3 MB of gzip may hold 3,000 million of them: skip all at once
                blank = _BLANK.match(chunk, here)
                assert blank is not None
                end = chunk.rfind(b"\n", here, blank.end()) + 1
                number += chunk.count(b"\n", here, end)
                at += end - here
            else:
                line = b"".join([*begun, piece])
                if not line.isspace():
                    yield number, at, line
                begun, num_begun, number, at = [], 0, number + 1, at + len(line)
            here = end
        if here < len(chunk):
            begun.append(chunk[here:])
            num_begun += len(chunk) - here
        if num_begun > most:
            raise InputError(
                f"{path}, line {number} is longer than {most:,.0f} bytes: divide it, put a long text into a .txt file, "
                "which is read in pieces, or raise document_limit"
            )
    line = b"".join(begun)
    if line and not line.isspace():
        yield number, at, line


# ---------------------------------------------------------------------------------------------------------- parquet


class ParquetRows(Pieces):
    """The documents of a parquet file; a row group is decoded as a whole, and blank rows are empty pieces.

    Opening reads all conversations once, without images, so that a bad one is found before the run, as in JSON lines.
    """

    def __init__(self, path: Path, options: TextOptions, pool: Pool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self._pool, self.kind = path, pool, Kind.TEXT
        check_regular(path)
        with _parquet_errors(path):
            file = pq.ParquetFile(path, memory_map=True)
            names = Counter(file.schema_arrow.names)
            holding = [field.name for field in file.schema_arrow if not pa.types.is_null(field.type)]
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            rows = np.asarray([group.num_rows for group in groups], dtype=np.int64)
            if rows.size and rows.min() < 0:
                raise ValueError(f"{rows.min():,} rows")
        if rows.sum() > MAX_ROWS:
            raise InputError(f"{path} has {rows.sum():,} rows, more than {MAX_ROWS:,}: divide it into several files")
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"{path} has two columns {twice[0]!r}: rename or remove one of them")
        columns = None
        for row in self._first_rows(file):
            with naming(str(path)):
                columns = find_columns(row, options, path.parent)
                if columns is not None:
                    columns.check_beside(dict.fromkeys(holding, True))
                    break
        if columns is None:  # no row holds anything
            rows, columns = rows * 0, Columns("text", is_chat=False)
        self._columns, self._most = columns, MAX_GROUP_BYTES * options.document_limit
        text_names = [name for name in columns.text_columns if name in holding]
        self._names = [*text_names, *(name for name in columns.extra if name in holding)]
        self._first = np.cumsum(rows) - rows
        self.unit = np.repeat(np.arange(len(rows)), rows)
        self.last = np.ones(int(rows.sum()), dtype=bool)
        paths = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
        leaves = [i for i, at in enumerate(paths) if any((at + ".").startswith(n + ".") for n in self._names)]
        sizes = [sum(group.column(leaf).total_uncompressed_size for leaf in leaves) for group in groups]
        self.unit_bytes = np.asarray(sizes, dtype=np.int64)
        if columns.is_chat:
            self.kind = columns.kind_of(holding)
            for unit, first in enumerate(self._first.tolist()):
                table = self._group(unit, text_names)
                for at in range(len(table)):
                    self.kind = max(self.kind, self._document(table, at, first + at, text_alone=True).kind)
                pool.told(groups[unit].total_byte_size)

    def read(self, piece: int) -> Document:
        unit = int(self.unit[piece])
        table = self._pool.get(self, unit, partial(self._group, names=self._names))
        return self._document(table, int(piece - self._first[unit]), piece)

    def _document(self, table: Any, row: int, number: int, text_alone: bool = False) -> Document:
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
        with naming(f"{self.path}, row {number}"):
            return self._columns.document(values, text_alone)

    def _first_rows(self, file: Any) -> Iterator[dict[str, Any]]:
        """The rows in order, and at last one of nulls, so that even a file without rows has all columns."""
        with _parquet_errors(self.path):
            for batch in file.iter_batches(64):
                batch.validate(full=True)
                yield from batch.to_pylist()
            yield dict.fromkeys(file.schema_arrow.names)

    def _group(self, unit: int, names: list[str]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _parquet_errors(self.path):
            file = pq.ParquetFile(self.path)
            batches, num_bytes = [], 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[unit], columns=names):
                batch.validate(full=True)  # otherwise a corrupt offset would read out of bounds; checks UTF-8, too
                batches.append(batch)
                num_bytes += batch.nbytes
                if num_bytes > self._most:  # its size in the file may be 10,000 times smaller
                    break
            table = pa.Table.from_batches(batches, schema=None if batches else file.schema_arrow)
        if num_bytes > self._most:
            raise InputError(
                f"{self.path}: row group {unit} takes more than {self._most:,.0f} bytes of memory: write it with "
                "smaller row groups, or raise document_limit"
            )
        return table


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turns an error of pyarrow into `InputError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise InputError(f"{path}: not a whole parquet file ({one_line(error)}): fetch it again") from error
