"""Packs documents into sequences of tokens, in one order for all ranks, with a position that can be saved and restored.

The position is that of the next token (epoch, document, token), independent of ranks, so a run can be resumed on any
number of ranks. torchdata's `StatefulDataLoader` saves the state of its worker processes instead; here the state is six
numbers that travel with each batch.

Position ids alone keep documents apart: transformers builds a block-diagonal attention mask when the position ids of a
sequence restart at 0 and no other mask is given (`find_packed_sequence_indices` in its masking_utils).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.columns import Document, Kind, Position
from castlm.data.documents import AnyDocuments, Documents, HubDocuments, Mixture, furthest_behind
from castlm.data.extra import join_extra
from castlm.data.tokens import Encoder, Tokens
from castlm.say import Say, silent

# Tokenized together: enough to keep a fast tokenizer's threads busy, little enough that no step waits long.
_BATCH_PIECES = 64
_BATCH_CHARS = 128 << 10


class _Encoded(NamedTuple):
    """The tokens of a piece, and its place."""

    epoch: int
    position: Position
    tokens: Tokens


class Resumable:
    """Sequences that continue from a saved position of the same seed, seq_len and repeat.

    Args:
        encoder: of one document at a time; this object alone uses it.
        repeat: every epoch has the sequences of the first, in its order.
        say: called with a line on the first document that is too long, and on each that cannot be prepared.
    """

    num_taken: int
    """Number of sequences before the next one, including those before a saved position."""

    def __init__(
        self,
        documents: Documents | HubDocuments,
        encoder: Encoder,
        *,
        seq_len: int,
        seed: int,
        repeat: bool = False,
        say: Say = silent,
    ) -> None:
        self.documents, self.seq_len, self.seed, self.repeat = documents, seq_len, seed, repeat
        self._encoder, self._say, self._said = encoder, say, set[str]()
        self._go_to({"epoch": 0, "document": None, "token": 0, "sequences": 0})

    def state_dict(self) -> dict[str, Any]:
        """The position of the next sequence, as plain JSON, the same on every rank."""
        epoch, document, token = self._position()
        return {
            "epoch": epoch,
            "document": copy.deepcopy(document),
            "token": token,
            "sequences": self.num_taken,
            "seq_len": self.seq_len,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a position of the same seed, seq_len and repeat; a checkpoint compares these options."""
        assert state["seq_len"] == self.seq_len
        self._go_to(state)

    def _position(self) -> tuple[int, Any, int]:
        """Epoch, position of a document as its reader gives it, and a number of tokens in it."""
        raise NotImplementedError

    def _go_to(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _say_once(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)


class PackedSequences(Resumable):
    """Sequences of `seq_len` tokens: documents shuffled by (seed, epoch), an end-of-text after each, nothing dropped.

    The labels are shifted: `labels[i]` is the token after `input_ids[i]`. Consecutive sequences share one token, so
    that each token is a label once. The positions start again at 0 with each document. A document starts with a token
    for the beginning of a text if its tokenizer adds one. The last sequence of an epoch is filled up with the start of
    the next; there is no last epoch.

    A conversation that does not fit into the rest of a sequence starts the next one, and end-of-text tokens that do not
    count fill the rest. A conversation longer than `seq_len` starts a sequence and continues in the following ones;
    each sees its own part alone, as in a long document.

    With `repeat`, the last incomplete sequence of an epoch is dropped.
    """

    _token: int

    def __init__(self, documents: Documents | HubDocuments, encoder: Encoder, **options: Any) -> None:
        super().__init__(documents, encoder, **options)
        self._fill(self.seq_len + 1)  # raises before a run if the text is too short

    def take(self, num_sequences: int) -> list[Tokens]:
        """The next sequences, each with the token after it: `seq_len` + 1 tokens."""
        first, end = self._token, self._token + num_sequences * self.seq_len
        self._fill(end + 1)  # one more: the label of the last token
        joined = Tokens.joined([piece.tokens for piece in self._pending])
        self._token = end
        # The position names the document that the next sequence begins in: used-up documents leave the queue.
        while self._token >= len(self._pending[0].tokens.ids):
            self._token -= len(self._pending.popleft().tokens.ids)
        self.num_taken += num_sequences
        # seq_len 512: tokens 0 to 512, 512 to 1,024, ... Token 512 is the last label here and the first input there.
        return [joined.part(slice(start, start + self.seq_len + 1)) for start in range(first, end, self.seq_len)]

    def batch(self, sequences: Sequence[Tokens]) -> dict[str, Tensor]:
        """`input_ids`, shifted `labels` and `position_ids`, int64, (num_sequences, seq_len)."""
        begins = torch.from_numpy(np.stack([sequence.begins[:-1] for sequence in sequences]))
        return {**_shifted(sequences), "position_ids": document_positions(begins)}

    def tokens_per_epoch(self) -> int:
        """Number of tokens of one epoch. Reads and tokenizes all documents once; the position stays as it is."""
        return sum(len(piece.tokens.ids) for piece in self._encode(0, 0, None, 0))

    def _position(self) -> tuple[int, Any, int]:
        """The position of the next sequence's first token."""
        epoch, document = self._pending[0][:2] if self._pending else self._start
        return epoch, document, self._token

    def _go_to(self, state: dict[str, Any]) -> None:
        # Tokenized and not yet used up; `_token` is an offset in the first.
        self._pending: deque[_Encoded] = deque()
        self._start = (state["epoch"], copy.deepcopy(state["document"]))
        self._token, self.num_taken = state["token"], state["sequences"]
        self._reader = self._read()

    def _fill(self, num_tokens: int) -> None:
        """Reads pieces until `num_tokens` are pending."""
        pending = sum(len(piece.tokens.ids) for piece in self._pending)
        while pending < num_tokens:
            self._pending.append(next(self._reader))
            pending += len(self._pending[-1].tokens.ids)

    def _read(self) -> Iterator[_Encoded]:
        epoch, position = self._start
        skipped = self._token  # tokens of the first piece that earlier sequences hold
        # Where in its sequence the first piece begins: the next sequence begins at the token `skipped` of the piece,
        # which therefore began `skipped` tokens before a border. With seq_len 8 and 3 skipped: at 5, as 5 + 3 = 8.
        place = -skipped % self.seq_len
        while True:
            whole, num_tokens = position is None, 0
            pieces = self._encode(epoch, 0 if self.repeat else epoch, position, place)
            for piece in self._whole_sequences(pieces, skipped) if self.repeat else pieces:
                num_tokens += len(piece.tokens.ids)
                yield piece
            skipped, place = 0, (place + num_tokens) % self.seq_len
            needed = self.seq_len + (0 if self.repeat else 1)  # repeated, the first token comes after the last
            if whole and num_tokens < needed:
                raise InputError(
                    f"{self.documents.name}: the text is shorter than {needed} tokens, a sequence of seq_len "
                    f"{self.seq_len}{'' if self.repeat else ' and one more'}: give more text or a smaller seq_len"
                )
            epoch, position = epoch + 1, None

    def _encode(self, epoch: int, order: int, position: Any, place: int) -> Iterator[_Encoded]:
        """The pieces of an epoch; `place` is where in its sequence the first one begins.

        A conversation that does not fit into its sequence is preceded by filler up to the next one.
        """
        for pieces in _batches(self.documents.pieces(self.seed, order, position)):
            for piece, tokens in zip(pieces, self._encoder(pieces)):
                count = len(tokens.ids)
                if piece.kind is not Kind.TEXT and count > self.seq_len:
                    self._say_once(
                        "long",
                        f"a conversation of {count:,} tokens is longer than seq_len {self.seq_len}: each of its "
                        "sequences sees its own part alone, and so for others as long",
                    )
                if piece.kind is not Kind.TEXT and count and place and count > self.seq_len - place:
                    tokens = Tokens.joined([Tokens.filler(self._encoder.eos, self.seq_len - place), tokens])
                if count:
                    place = (place + len(tokens.ids)) % self.seq_len
                    yield _Encoded(epoch, piece.position, tokens)

    def _whole_sequences(self, pieces: Iterator[_Encoded], skipped: int) -> Iterator[_Encoded]:
        """The `pieces` of one epoch, without the last tokens that do not fill a sequence."""
        num_tokens, held, num_held = -skipped, deque[_Encoded](), 0
        for piece in pieces:
            held.append(piece)
            num_tokens += len(piece.tokens.ids)
            num_held += len(piece.tokens.ids)
            # Less than one sequence is dropped at the end: a piece with a whole sequence behind it is safe.
            while num_held - len(held[0].tokens.ids) >= self.seq_len:
                num_held -= len(held[0].tokens.ids)
                yield held.popleft()
        surplus = num_tokens % self.seq_len
        while surplus:
            last = held.pop()
            kept = max(0, len(last.tokens.ids) - surplus)
            surplus -= len(last.tokens.ids) - kept
            if kept:
                held.append(last._replace(tokens=last.tokens.part(slice(kept))))
        yield from held


def _batches(pieces: Iterator[Document]) -> Iterator[list[Document]]:
    batch, num_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if len(batch) == _BATCH_PIECES or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class UnpackedSequences(Resumable):
    """Sequences of `seq_len` tokens: conversations shuffled by (seed, epoch), each in a sequence of its own.

    For conversations with images or other tensors beside their tokens: the positions around an image depend on the
    model, and a processor prepares one conversation at a time. End-of-text tokens that do not count fill the rest of a
    sequence. A longer conversation is cut. A conversation whose images do not fit or cannot be prepared keeps its
    sequence, but none of its tokens count.
    """

    def take(self, num_sequences: int) -> list[Document]:
        """The next conversations, not yet prepared."""
        self.num_taken += num_sequences
        return list(islice(self._reader, num_sequences))

    def batch(self, sequences: Sequence[Document]) -> dict[str, Tensor]:
        """`input_ids` and shifted `labels`, int64, (num_sequences, seq_len), and the further arguments of the model's
        forward; no `position_ids`, which the model derives from the images.
        """
        found = [self._encode(piece) for piece in sequences]
        return {**_shifted(found), **join_extra([tokens.extra for tokens in found], self.seq_len)}

    def tokens_per_epoch(self) -> int:
        """Number of tokens of one epoch."""
        assert isinstance(self.documents, Documents)
        return len(self.documents) * self.seq_len

    def _position(self) -> tuple[int, Any, int]:
        """The last conversation and 1, or the next conversation and 0."""
        epoch, position, is_used = self._at
        return epoch, position, int(is_used)

    def _go_to(self, state: dict[str, Any]) -> None:
        self._at: tuple[int, Any, bool] = (state["epoch"], state["document"], bool(state["token"]))
        self.num_taken = state["sequences"]
        self._reader = self._read()

    def _read(self) -> Iterator[Document]:
        epoch, position, is_used = self._at
        while True:
            pieces = self.documents.pieces(self.seed, 0 if self.repeat else epoch, position)
            for piece in islice(pieces, int(is_used), None):
                self._at = (epoch, piece.position, True)
                yield piece
            epoch, position, is_used = epoch + 1, None, False

    def _encode(self, piece: Document) -> Tokens:
        """The tokens of a conversation, cut or filled to `seq_len` + 1."""
        try:
            tokens = self._encoder.conversation(piece)
        except InputError as error:
            if piece.kind is not Kind.WITH_EXTRA:  # no image file can be the cause
                raise
            self._say_once(str(error), f"a conversation does not count: {error}")
            tokens = Tokens.of([], None, True)
        count, most = len(tokens.ids), self.seq_len + 1
        if tokens.extra is not None and not tokens.extra.fits(self.seq_len):
            self._say_once(
                "left out",
                f"the images of a conversation take {count:,} tokens with its text, more than seq_len {self.seq_len}: "
                "it does not count, and so for others as long; raise seq_len",
            )
            tokens = Tokens.of([], None, True)
        elif count > most:
            self._say_once(
                "cut",
                f"a conversation of {count:,} tokens is longer than seq_len {self.seq_len}: it is cut, and so are "
                "others as long",
            )
        filler = Tokens.filler(self._encoder.eos, max(0, most - len(tokens.ids)))
        return Tokens.joined([tokens.part(slice(most)), filler])._replace(extra=tokens.extra)


class MixedSequences:
    """Sequences of several texts, each packed by itself, in fixed shares of the tokens.

    The next sequence comes from the text that is furthest behind its share. So the shares hold at every point of a run,
    whatever the lengths of the documents, and no random state needs to be saved.

    Args:
        parts: the sequences of each text: endless, of one length and one class.
        weights: the share of each.
    """

    def __init__(self, parts: Sequence[PackedSequences | UnpackedSequences], weights: Sequence[float]) -> None:
        self.batch = parts[0].batch
        self._parts: list[PackedSequences | UnpackedSequences] = list(parts)
        self._weights = list(weights)

    def take(self, num_sequences: int) -> list[Any]:
        """The next sequences, for `batch`."""
        sequences: list[Any] = []
        while len(sequences) < num_sequences:
            number = furthest_behind([part.num_taken for part in self._parts], self._weights)
            sequences += self._parts[number].take(1)
        return sequences

    def state_dict(self) -> dict[str, Any]:
        """The position in each text, as plain JSON; the same on every rank."""
        taken = sum(part.num_taken for part in self._parts)
        return {"sequences": taken, "texts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position of the same texts; see `Resumable.load_state_dict`."""
        for part, position in zip(self._parts, state["texts"], strict=True):
            part.load_state_dict(position)


Sequences = PackedSequences | UnpackedSequences | MixedSequences


def open_sequences(
    documents: AnyDocuments,
    encoder: Encoder,
    *,
    seq_len: int,
    seed: int,
    repeat: bool = False,
    say: Say = silent,
) -> Sequences:
    """Opens the training sequences of documents: packed text, or one sequence per conversation with images.

    Args:
        encoder: copied, as a fast tokenizer that two threads use at a time may raise "Already borrowed".
        repeat: every epoch has the sequences of the first.
        say: called with lines on documents that are too long or cannot be prepared.
    """
    encoder = copy.deepcopy(encoder)
    options: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "repeat": repeat, "say": say}
    kind = UnpackedSequences if documents.kind is Kind.WITH_EXTRA else PackedSequences
    if isinstance(documents, Mixture):
        return MixedSequences([kind(part, encoder, **options) for part in documents.parts], documents.weights)
    return kind(documents, encoder, **options)


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
        # The position travels with its batch: the thread is a batch ahead, and a checkpoint must not skip it.
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


def _shifted(sequences: Sequence[Tokens]) -> dict[str, Tensor]:
    """`input_ids` and `labels`, the token after each, of sequences that each have one token more."""
    ids = torch.from_numpy(np.stack([sequence.ids for sequence in sequences])).long()  # (8, 513)
    labels = torch.from_numpy(np.stack([sequence.labels for sequence in sequences])).long()
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels[:, 1:].contiguous()}


def document_positions(begins: Tensor) -> Tensor:
    """The position of each token in its own document.

    Args:
        begins: bool, (batch, seq), for example (8, 512): whether a token is the first of a document.

    Returns:
        int64, (batch, seq). The first document of a row starts at 0, even if an earlier row holds its beginning.

    Examples:
        >>> document_positions(torch.tensor([[0, 0, 0, 1, 0, 1, 1]]).bool())
        tensor([[0, 1, 2, 0, 1, 0, 0]])
    """
    index = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)  # (8, 512)
    return index - torch.where(begins, index, 0).cummax(dim=1).values  # 0 1 2 3 4 minus 0 0 0 3 3 = 0 1 2 0 1


class DocumentOffsets(NamedTuple):
    """The documents of a batch, with its rows laid end to end."""

    offsets: Tensor
    """int32, (num_documents + 1,): where each begins, and the number of tokens."""
    longest: int
    """Tokens of the longest."""


def document_offsets(positions: Tensor) -> DocumentOffsets:
    """The offsets of the documents of a batch; `positions` are (batch, seq), from `document_positions`.

    Examples:
        >>> document_offsets(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])).offsets
        tensor([0, 3, 4, 6, 8], dtype=torch.int32)
    """
    begins = (positions.flatten() == 0).nonzero().flatten()
    # the begin of each document, and the end of the last
    offsets = torch.cat([begins, begins.new_tensor([positions.numel()])]).to(torch.int32)
    return DocumentOffsets(offsets, int(offsets.diff().max()))


def document_mask(positions: Tensor) -> Tensor:
    """The causal mask in which no token attends to another document, for models that do not derive it from positions.

    Returns:
        bool, (batch, 1, seq, seq), True = attends; `positions` are (batch, seq), from `document_positions`.
    """
    document = (positions == 0).cumsum(dim=1)  # 0 1 2 0 1 0 1 2 -> 1 1 1 2 2 3 3 3
    same = document[:, :, None] == document[:, None, :]  # (8, 512, 512)
    return torch.tril(same)[:, None]
