"""Hands each rank its rows of every global micro-batch, prepared ahead, with a position that can be saved."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from castlm.data.packing import BlockStream


class BatchLoader:
    """One rank's rows of each global micro-batch of a `BlockStream`.

    Global batch g holds the blocks `[g*R*b, (g+1)*R*b)` of the stream, rank r of R its rows `[r*b, (r+1)*b)`:
    dicts of `input_ids` and `labels`, int64, shape (rows_per_rank, seq_len). Every rank tokenizes the whole stream.
    `state_dict` is the position after the last batch handed out, whatever has been prepared ahead, the same on
    every rank; it may be loaded with other `rows_per_rank`, `rank` and `world_size`. A last incomplete batch is left
    out (only with `BlockStream(epochs=...)`).

    Args:
        prefetch: prepare the next batch in a thread meanwhile (fast tokenizers let go of the interpreter).
    """

    def __init__(
        self,
        stream: BlockStream,
        *,
        rows_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = False,
    ) -> None:
        if rows_per_rank < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rows_per_rank {rows_per_rank}, rank {rank} of {world_size}: no such rows")
        self.stream, self.rows_per_rank, self.rank, self.world_size = stream, rows_per_rank, rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: Future[tuple[dict[str, Tensor], dict[str, Any]] | None] | None = None
        self._position = stream.state_dict()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        item = self._ahead.result() if self._ahead is not None else self._next()
        if item is None:
            raise StopIteration
        if self._thread is not None:
            self._ahead = self._thread.submit(self._next)
        batch, self._position = item
        return batch

    def _next(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        tokens = self.stream.take(self.world_size * self.rows_per_rank)
        if tokens is None:
            return None
        size, shape = self.rows_per_rank * self.stream.seq_len, (self.rows_per_rank, self.stream.seq_len)
        rows = tokens[self.rank * size : (self.rank + 1) * size + 1]
        batch = {"input_ids": rows[:-1].view(shape), "labels": rows[1:].view(shape)}
        return batch, self.stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """See `BlockStream.state_dict`."""
        return copy.deepcopy(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BlockStream.load_state_dict`."""
        if self._ahead is not None:
            self._ahead.exception()  # waits
            self._ahead = None
        self.stream.load_state_dict(state)
        self._position = copy.deepcopy(state)
