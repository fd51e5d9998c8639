"""Reads the documents of a parquet file; `castlm.data.readers` reads the other types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from castlm.core.errors import InputError
from castlm.data.columns import Document, Kind, find_columns
from castlm.data.options import TextOptions
from castlm.data.readers import Pool
from castlm.files.reading import check_regular, sha256_file

MAX_ROWS = 1 << 30


class ParquetRows:
    """The documents of a parquet file; a row group is decoded as a whole, and blank rows are empty pieces.

    Opening reads all conversations once, without images, so that a bad one is found before the run, as in JSON lines.
    """

    def __init__(self, path: Path, options: TextOptions, pool: Pool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._pool = path, pool
        check_regular(path)
        try:
            file = pq.ParquetFile(path, memory_map=True)
            schema = file.schema_arrow
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            rows = np.asarray([group.num_rows for group in groups], dtype=np.int64)
            if rows.size and (rows.min() < 0 or rows.sum() > MAX_ROWS):
                raise ValueError(f"{rows.sum():,} rows")
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
            raise InputError(f"{path}: not a whole parquet file ({_one_line(error)}): fetch it again") from error
        holds = {field.name: _arrow_kind(field.type) for field in schema}
        self._columns = find_columns(holds, options, str(path), path.parent)
        self.kind = self._columns.kind_of(holds)
        self._read_names = [name for name in self._columns.read if name in holds]
        self._first = np.cumsum(rows) - rows
        self.unit = np.repeat(np.arange(len(rows)), rows)
        self.last = np.ones(int(rows.sum()), dtype=bool)
        paths = [file.metadata.schema.column(index).path for index in range(file.metadata.num_columns)]
        leaves = [i for i, at in enumerate(paths) if any((at + ".").startswith(n + ".") for n in self._read_names)]
        sizes = [sum(group.column(leaf).total_uncompressed_size for leaf in leaves) for group in groups]
        self.unit_bytes = np.asarray(sizes, dtype=np.int64)
        if self.kind is not Kind.TEXT:
            names = [name for name in self._columns.text_columns if name in holds]
            for unit, first in enumerate(self._first.tolist()):
                table = self._read(unit, names)
                for row in range(len(table)):
                    self.kind = max(self.kind, self._document(table, row, first + row, text_alone=True).kind)

    def read(self, piece: int) -> Document:
        unit = int(self.unit[piece])
        table = self._pool.get((id(self), unit), int(self.unit_bytes[unit]), lambda: self._read(unit, self._read_names))
        return self._document(table, int(piece - self._first[unit]), piece)

    def _document(self, table: Any, row: int, number: int, text_alone: bool = False) -> Document:
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
        return self._columns.document(values, f"{self._path}, row {number}", text_alone)

    def _read(self, unit: int, names: list[str]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(self._path).read_row_group(unit, columns=names)
            table.validate(full=True)  # otherwise a corrupt offset would read out of bounds; checks UTF-8, too
            return table
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{self._path}: row group {unit} cannot be read ({_one_line(error)})") from error

    def sha256(self) -> str:
        return sha256_file(self._path)


def _arrow_kind(kind: Any) -> str:
    """The type of a column of an arrow type, in the words of `find_columns`."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "str"
    if pa.types.is_null(kind):
        return "NoneType"
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return "list" if any(is_list(kind) for is_list in lists) else str(kind)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
