"""Packs documents into sequences of tokens, in one order for all ranks, with a position that can be saved and restored.

The position names the next token (epoch, document, token) and no rank, so a run can be resumed on any number of ranks.
torchdata's `StatefulDataLoader` saves the state of its worker processes instead; here the state is six numbers that
travel with each batch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from castlm.core.errors import InputError
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments
from castlm.data.positions import Resumable, document_positions
from castlm.data.readers import Piece
from castlm.data.tokens import IGNORED, Encoder, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenized together: enough to keep a fast tokenizer's threads busy, little enough that no step waits long.
_BATCH_PIECES = 64
_BATCH_CHARS = 128 << 10

_Encoded = tuple[int, Any, Tokens]  # epoch, position and tokens of a piece


class Row(NamedTuple):
    """Consecutive sequences in one row, with the token after them: three tensors, (num_sequences * seq_len + 1,)."""

    ids: Tensor
    """int64."""
    labels: Tensor
    """int64: the ids themselves, not shifted, and -100 where a token does not count."""
    begins: Tensor
    """bool: whether the token is the first of a document."""

    def batch(self, seq_len: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`input_ids`, shifted `labels` and `position_ids`, int64, (num_sequences, seq_len); `rows` selects some."""
        ids, labels, begins = (
            tensor.view(-1, seq_len)[rows] for tensor in (self.ids[:-1], self.labels[1:], self.begins[:-1])
        )
        return {"input_ids": ids, "labels": labels, "position_ids": document_positions(begins)}


class PackedSequences(Resumable, IterableDataset):
    """Sequences of `seq_len` tokens: documents shuffled by (seed, epoch), an end-of-text after each, nothing dropped.

    Yields dicts of `input_ids`, `labels` and `position_ids`, int64 of shape (seq_len,). The labels are already shifted:
    `labels[i]` is the token after `input_ids[i]`. Consecutive sequences share one token, so that each token is a label
    once. The positions start again at 0 with each document. A document starts with a beginning-of-text token if its
    tokenizer adds one. The last sequence of an epoch is filled up with the start of the next. Iterating again continues
    after the last sequence.

    A conversation that does not fit into what is left of a sequence starts the next one, and the rest is filled with
    end-of-text tokens that do not count. A conversation longer than `seq_len` starts a sequence and goes on in the
    following ones, each of which sees its own part alone, as in a long document.

    Args:
        eos_token_id: the token that ends a document; default: `end_of_text_id(tokenizer)`.
        epochs: number of epochs, or None for no end. The last incomplete sequence of the last epoch is dropped.
        repeat: every epoch has the sequences of the first, in its order; the last incomplete one of each is dropped.
        assistant_only: of a conversation, only the tokens of the assistant count; see `castlm.data.chat`.
        say: called with a line when the first conversation longer than `seq_len` is met.

    Raises:
        InputError: the text is shorter than one sequence.
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
        assistant_only: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if seq_len < 1 or seed < 0:
            raise InputError(f"seq_len {seq_len} must be at least 1 and seed {seed} at least 0")
        self.documents, self.seq_len, self.seed, self.epochs = documents, seq_len, seed, epochs
        self.repeat, self._say, self._has_said = repeat, say, False
        self._encoder = Encoder(tokenizer, eos_token_id, assistant_only)
        self._go_to({"epoch": 0, "document": None, "token": 0, "sequences": 0})
        self._fill(seq_len + 1)  # raises before a run if the text is too short

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if (worker := get_worker_info()) is not None and worker.num_workers > 1:
            raise InputError(f"{worker.num_workers} workers would each yield the whole stream: use one or BatchLoader")
        while (row := self.take(1)) is not None:
            yield {name: tensor[0] for name, tensor in row.batch(self.seq_len).items()}

    def take(self, num_sequences: int) -> Row | None:
        """The next sequences; sequence i starts at `i * seq_len`. None if fewer are left in the last epoch."""
        used = num_sequences * self.seq_len
        if not self._fill(used + 1):
            return None
        parts, missing = [], used + 1
        for _, _, tokens in self._pending:
            start = self._token if not parts else 0
            parts.append(tokens.part(slice(start, start + missing)))
            missing -= len(parts[-1].ids)
            if not missing:
                break
        self._available -= used
        self._token += used
        while self._token >= len(self._pending[0][2].ids):
            self._token -= len(self._pending.popleft()[2].ids)
        self._num_sequences += num_sequences
        ids, labels, begins = (torch.from_numpy(array) for array in Tokens.joined(parts))
        return Row(ids.long(), labels.long(), begins)

    @property
    def num_taken(self) -> int:
        """How many sequences were taken before the next one, those before a saved position too."""
        return self._num_sequences

    def tokens_per_epoch(self) -> int:
        """Number of tokens of one epoch. Reads and tokenizes all documents once; the position stays as it is."""
        return sum(_num_tokens(batch) for batch in self._encode(0, 0, None, 0))

    def _position(self) -> tuple[int, Any, int]:
        """Of the next sequence's first token."""
        epoch, document = self._pending[0][:2] if self._pending else self._start
        return epoch, document, self._token

    def _go_to(self, state: dict[str, Any]) -> None:
        # Tokenized and not yet used up; `_token` is an offset in the first.
        self._pending: deque[_Encoded] = deque()
        self._start = (state["epoch"], copy.deepcopy(state["document"]))
        self._token, self._num_sequences = state["token"], state["sequences"]
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
        skipped = self._token  # tokens of the first piece that earlier sequences hold
        place = -skipped % self.seq_len  # of the next token in its sequence
        while self.epochs is None or epoch < self.epochs:
            whole, num_tokens = position is None, 0
            batches = self._encode(epoch, 0 if self.repeat else epoch, position, place)
            for batch in self._whole_sequences(batches, skipped) if self.repeat else batches:
                num_tokens += _num_tokens(batch)
                yield batch
            skipped, place = 0, (place + num_tokens) % self.seq_len
            needed = self.seq_len + (0 if self.repeat else 1)  # repeated, the first token comes after the last
            if whole and num_tokens < needed:
                raise InputError(
                    f"{self.documents.name}: the text is shorter than {needed} tokens, a sequence of seq_len "
                    f"{self.seq_len}{'' if self.repeat else ' and one more'}: give more text or a smaller seq_len"
                )
            epoch, position = epoch + 1, None

    def _encode(self, epoch: int, order: int, position: Any, place: int) -> Iterator[list[_Encoded]]:
        """The pieces of an epoch, a batch at a time; `place` is where in its sequence the first one begins."""
        for pieces in _batches(self.documents.pieces(self.seed, order, position)):
            batch = []
            for piece, tokens in zip(pieces, self._encoder(pieces)):
                if len(tokens.ids):
                    found = self._with_filler(tokens, place) if piece.is_chat else tokens
                    place = (place + len(found.ids)) % self.seq_len
                    batch.append((epoch, piece.position, found))
            yield batch

    def _with_filler(self, conversation: Tokens, place: int) -> Tokens:
        """`conversation` after as many tokens as leave it a sequence of its own, if it does not fit into this one."""
        count = len(conversation.ids)
        if count > self.seq_len and not self._has_said:
            self._has_said = True
            self._say(
                f"a conversation of {count:,} tokens is longer than seq_len {self.seq_len}: each of its sequences sees "
                "its own part alone, and so for others as long"
            )
        if not place or count <= self.seq_len - place:
            return conversation
        filler = Tokens.of([self._encoder.eos] * (self.seq_len - place), None, True)
        return Tokens.joined([filler._replace(labels=np.full_like(filler.ids, IGNORED)), conversation])

    def _whole_sequences(self, batches: Iterator[list[_Encoded]], skipped: int) -> Iterator[list[_Encoded]]:
        """`batches` of one epoch without the tokens at its end that do not fill a sequence."""
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
            epoch, position, tokens = last.pop()
            kept = max(0, len(tokens.ids) - surplus)
            surplus -= len(tokens.ids) - kept
            if kept:
                last.append((epoch, position, tokens.part(slice(kept))))
        yield last


def _num_tokens(batch: list[_Encoded]) -> int:
    return sum(len(tokens.ids) for _, _, tokens in batch)


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
