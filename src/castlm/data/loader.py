"""Gives each rank its rows of every global micro-batch, prepared ahead, with a position that can be saved."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from castlm.data.packing import Sequences


class BatchLoader:
    """One rank's rows of each global micro-batch of the sequences that `open_sequences` gives.

    With R ranks of b rows, global batch g holds the sequences `[g*R*b, (g+1)*R*b)`, and rank r its rows `[r*b,
    (r+1)*b)`: dicts of `input_ids` and `labels`, int64, shape (rows_per_rank, seq_len), with `position_ids` for packed
    documents or with other tensors for the model's forward. Every rank tokenizes all text, but prepares only the images
    of its own rows. `state_dict` is the position after the last batch that was returned, whatever has been prepared
    ahead. It is the same on every rank and may be loaded with another `rows_per_rank`, `rank` and `world_size`.

    Args:
        prefetch: prepare the next batch in a thread meanwhile (fast tokenizers release the interpreter lock).
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        rows_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: bool = False,
    ) -> None:
        self.sequences, self.rows_per_rank, self.rank, self.world_size = sequences, rows_per_rank, rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: Future[tuple[dict[str, Any], dict[str, Any]]] | None = None
        self._position = sequences.state_dict()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        item = self._ahead.result() if self._ahead is not None else self._next()
        if self._thread is not None:
            self._ahead = self._thread.submit(self._next)
        batch, self._position = item
        return batch

    def _next(self) -> tuple[dict[str, Any], dict[str, Any]]:
        taken: Any = self.sequences.take(self.world_size * self.rows_per_rank)
        first = self.rank * self.rows_per_rank
        return self.sequences.batch(taken[first : first + self.rows_per_rank]), self.sequences.state_dict()

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
