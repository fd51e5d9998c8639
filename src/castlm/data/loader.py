"""Gives each rank its rows of every global micro-batch, prepared ahead, with a position that can be saved."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from castlm.data.image_sequences import ImageSequences
from castlm.data.mixture import MixedSequences
from castlm.data.packing import PackedSequences


class BatchLoader:
    """One rank's rows of each global micro-batch of `PackedSequences`, `MixedSequences` or `ImageSequences`.

    With R ranks of b rows, global batch g holds the sequences `[g*R*b, (g+1)*R*b)`, and rank r its rows
    `[r*b, (r+1)*b)`: dicts of `input_ids`, `labels` and `position_ids`, int64, shape (rows_per_rank, seq_len), and of
    `images` where there are some. Every rank tokenizes all text, and prepares its own images alone. `state_dict` is the
    position after the last batch that was returned, whatever has been prepared ahead. It is the same on every rank and
    may be loaded with another `rows_per_rank`, `rank` and `world_size`. The last batch is dropped if it is incomplete
    (only with `PackedSequences(epochs=...)`).

    Args:
        prefetch: prepare the next batch in a thread meanwhile (fast tokenizers release the interpreter lock).
    """

    def __init__(
        self,
        sequences: PackedSequences | MixedSequences | ImageSequences,
        *,
        rows_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = False,
    ) -> None:
        if rows_per_rank < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rows_per_rank {rows_per_rank}, rank {rank} of {world_size}: there are no such rows")
        self.sequences, self.rows_per_rank, self.rank, self.world_size = sequences, rows_per_rank, rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: Future[tuple[dict[str, Any], dict[str, Any]] | None] | None = None
        self._position = sequences.state_dict()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        item = self._ahead.result() if self._ahead is not None else self._next()
        if item is None:
            raise StopIteration
        if self._thread is not None:
            self._ahead = self._thread.submit(self._next)
        batch, self._position = item
        return batch

    def _next(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        row = self.sequences.take(self.world_size * self.rows_per_rank)
        if row is None:
            return None
        first = self.rank * self.rows_per_rank
        batch = row.batch(self.sequences.seq_len, slice(first, first + self.rows_per_rank))
        return batch, self.sequences.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """See `PackedSequences.state_dict`."""
        return copy.deepcopy(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `PackedSequences.load_state_dict`."""
        if self._ahead is not None:
            self._ahead.exception()  # waits
            self._ahead = None
        self.sequences.load_state_dict(state)
        self._position = copy.deepcopy(state)
