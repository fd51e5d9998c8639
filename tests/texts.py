"""Files of text for tests, and the sequences that are read from them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor


def write_rows(path: Path, rows: list[Any], row_group_size: int = 3) -> str:
    """Writes .jsonl, .jsonl.gz or .parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_texts(path: Path, texts: list[str | None], row_group_size: int = 3) -> Path:
    """A file with a text in each row."""
    write_rows(path, [{"id": number, "text": text} for number, text in enumerate(texts)], row_group_size)
    return path


def sequences(stream: Any, count: int) -> list[dict[str, Tensor]]:
    """The next sequences of a stream, one by one: `input_ids`, `labels` and `position_ids`, (seq_len,)."""
    batches = [stream.batch(stream.take(1)) for _ in range(count)]
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(torch.equal(a[key], b[key]) for a, b in zip(one, other) for key in a)
