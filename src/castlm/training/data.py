"""Packs documents into blocks of tokens, in one order for all ranks, with a position that can be saved and restored.

The position names the next token (epoch, document, token), not a rank: a run goes on exactly on any number of ranks.
Not `StatefulDataLoader`: its state is one of worker processes; here it travels with each batch, and is six numbers.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from castlm.core.errors import InputError
from castlm.training.documents import (
    Documents,
    HubDocuments,
    Piece,
    open_documents,
    read_text,
    split_documents,
    text_hash,
)
from castlm.training.tokens import Encoder, check_vocabulary, end_of_text_id, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BatchLoader",
    "BlockStream",
    "check_vocabulary",
    "end_of_text_id",
    "open_documents",
    "read_text",
    "split_documents",
    "text_hash",
    "token_ids",
]

# Tokenized at once: enough for the cores of a fast tokenizer, little enough that no step waits long.
_BATCH_PIECES = 64
_BATCH_CHARS = 128 << 10

_Encoded = tuple[int, Any, np.ndarray]  # of a piece: epoch, position, token ids int32


class BlockStream(IterableDataset):
    """Blocks of `seq_len` tokens: documents shuffled by (seed, epoch), an end-of-text after each, nothing dropped.

    Yields dicts of `input_ids` and `labels`, int64 of shape (seq_len,); the labels are already shifted:
    `labels[i]` is the token after `input_ids[i]`. Consecutive blocks share one token, so that each token is a label
    once. A document starts with the tokenizer's own beginning-of-text if it adds one. The end of an epoch runs on into
    the next. Iterating continues where it stopped.

    Args:
        eos_token_id: what ends a document; `end_of_text_id(tokenizer)` if None.
        epochs: None for no end. The last incomplete block of the last epoch is left out.
        repeat: every epoch has the blocks of the first, in its order; the last incomplete one of each is left out.

    Raises:
        InputError: all the text is shorter than one block.
    """

    def __init__(
        self,
        documents: Documents | HubDocuments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_len: int,
        seed: int,
        eos_token_id: int | None = None,
        epochs: int | None = None,
        repeat: bool = False,
    ) -> None:
        if seq_len < 1 or seed < 0:
            raise InputError(f"seq_len {seq_len} must be at least 1 and seed {seed} at least 0")
        self.documents, self.seq_len, self.seed, self.epochs = documents, seq_len, seed, epochs
        self.repeat = repeat
        self._encoder = Encoder(tokenizer, eos_token_id)
        self._go_to({"epoch": 0, "document": None, "token": 0, "blocks": 0})
        self._fill(seq_len + 1)  # raises on too short a text before a run

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if (worker := get_worker_info()) is not None and worker.num_workers > 1:
            raise InputError(f"{worker.num_workers} workers would each yield the whole stream: use one or BatchLoader")
        while (tokens := self.take(1)) is not None:
            yield {"input_ids": tokens[:-1], "labels": tokens[1:]}

    def take(self, num_blocks: int) -> Tensor | None:
        """The next blocks in one row, int64, shape (num_blocks * seq_len + 1,); block i starts at `i * seq_len`.

        None where the last epoch has no more of as many.
        """
        used = num_blocks * self.seq_len
        if not self._fill(used + 1):
            return None
        parts, missing = [], used + 1
        for _, _, ids in self._pending:
            parts.append(ids[self._token if not parts else 0 :][:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        self._available -= used
        self._token += used
        while self._token >= len(self._pending[0][2]):
            self._token -= len(self._pending.popleft()[2])
        self._blocks += num_blocks
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position of the next block's first token, JSON-able; the same on every rank."""
        epoch, document = self._pending[0][:2] if self._pending else self._start
        return {
            "epoch": epoch,
            "document": copy.deepcopy(document),
            "token": self._token,
            "blocks": self._blocks,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "repeat": self.repeat,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            InputError: it was saved with another seed, seq_len or repeat.
        """
        for name, now in (("seed", self.seed), ("seq_len", self.seq_len), ("repeat", self.repeat)):
            if state.get(name, False) != now:
                raise InputError(
                    f"the data position was saved with {name} {state.get(name, False)}, not {now}: keep {name}"
                )
        self._go_to(state)

    def _go_to(self, state: dict[str, Any]) -> None:
        # Tokenized and not yet all taken; `_token` counts in the first.
        self._pending: deque[_Encoded] = deque()
        self._start = (state["epoch"], copy.deepcopy(state["document"]))
        self._token, self._blocks = state["token"], state["blocks"]
        self._available = -self._token
        self._reader = self._read()

    def _fill(self, num_tokens: int) -> bool:
        while self._available < num_tokens:
            batch = next(self._reader, None)
            if batch is None:
                return False
            self._pending.extend(batch)
            self._available += _num_tokens(batch)
        return True

    def _read(self) -> Iterator[list[_Encoded]]:
        epoch, position = self._start
        skipped = self._token  # of the first piece, by blocks that were taken before
        while self.epochs is None or epoch < self.epochs:
            whole, num_tokens = position is None, 0
            order = 0 if self.repeat else epoch
            batches = (
                [(epoch, piece.position, ids) for piece, ids in zip(pieces, self._encoder(pieces)) if len(ids)]
                for pieces in _batches(self.documents.pieces(self.seed, order, position))
            )
            for batch in self._whole_blocks(batches, skipped) if self.repeat else batches:
                num_tokens += _num_tokens(batch)
                yield batch
            skipped = 0
            if whole and num_tokens <= self.seq_len:
                raise InputError(
                    f"{self.documents.name}: {num_tokens} tokens are fewer than one block of seq_len {self.seq_len} "
                    "and the token after it; give more text or a smaller seq_len"
                )
            epoch, position = epoch + 1, None

    def _whole_blocks(self, batches: Iterator[list[_Encoded]], skipped: int) -> Iterator[list[_Encoded]]:
        """`batches` of one epoch without the tokens at its end that fill no block."""
        num_tokens, held, num_held = -skipped, deque[list[_Encoded]](), 0
        for batch in batches:
            held.append(batch)
            num_tokens, num_held = num_tokens + _num_tokens(batch), num_held + _num_tokens(batch)
            while num_held - _num_tokens(held[0]) >= self.seq_len:
                num_held -= _num_tokens(held[0])
                yield held.popleft()
        last = [piece for batch in held for piece in batch]
        surplus = num_tokens % self.seq_len
        while surplus:
            epoch, position, ids = last.pop()
            kept = max(0, len(ids) - surplus)
            surplus -= len(ids) - kept
            if kept:
                last.append((epoch, position, ids[:kept]))
        yield last


def _num_tokens(batch: list[_Encoded]) -> int:
    return sum(len(ids) for _, _, ids in batch)


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


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, num_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if len(batch) == _BATCH_PIECES or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
