"""The tokens of an evaluation text, a label for each scored one, and the sequences that a model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.chat import begin_of
from castlm.data.columns import Document, Kind, Position
from castlm.data.documents import Documents, HubDocuments
from castlm.data.extra import Extra, join_extra
from castlm.data.tokens import IGNORED, Encoder, Tokens, first_tokens


class ScoredExtra(NamedTuple):
    """Prepares the tensors of a document on each use: all tensors of a text may not fit in memory."""

    load: Callable[[], Extra | None]
    end: int
    """Number of tokens up to the end of the last that the tensors belong to."""
    begin: str
    """The first words of the document, for messages."""


class Scored(NamedTuple):
    """One sequence of a forward pass: the tokens begin .. end-1 of the text."""

    begin: int
    end: int
    first_scored: int  # scores the tokens first_scored .. end-1
    stretch: int = 0  # of the text, in which it lies


@dataclass(frozen=True)
class ScoredText:
    """Tokens for a perplexity. Plain text is one stretch of tokens; a conversation is never scored after another."""

    ids: Tensor
    """int64, (num_tokens,)."""
    labels: Tensor
    """int64, (num_tokens,): the token ids, not shifted, and -100 where a token is not scored."""
    starts: tuple[int, ...] = (0,)
    """Positions that always begin a sequence: the first token of the text and of each conversation."""
    tokens: str = "all"
    """Names the scored tokens: "all" or "assistant"; both for several kinds of text."""
    extra: tuple[ScoredExtra | None, ...] = ()
    """Tensors beside the tokens, by position in `starts`; empty if no document has any."""
    by_document: bool = False
    """Whether the text consists of conversations, each scored separately."""

    @classmethod
    def of(cls, ids: Tensor) -> ScoredText:
        """Wraps a plain text; all its tokens are scored."""
        return cls(ids, ids)

    @classmethod
    def joined(cls, parts: Sequence[ScoredText]) -> ScoredText:
        """Several texts as one; each begins a sequence."""
        starts: list[int] = []
        extra: list[ScoredExtra | None] = []
        at = 0
        for part in parts:
            starts += [at + start for start in part.starts]
            extra += part.extra or [None] * len(part.starts)
            at += len(part.ids)
        ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
        tokens = " and ".join(dict.fromkeys(part.tokens for part in parts))
        by_document = any(part.by_document for part in parts)
        return cls(ids, labels, tuple(starts), tokens, tuple(extra) if any(extra) else (), by_document)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Begin and end of each part that is scored separately."""
        return list(zip(self.starts, (*self.starts[1:], len(self.ids))))

    def sequences(self, seq_len: int, stride: int) -> list[Scored]:
        """The sequences of the text, each within one stretch, without those that score nothing.

        Only the first sequence of a conversation with images is scored, since the others do not contain the images.
        """
        scored: list[Scored] = []
        for number, (begin, end) in enumerate(self.stretches):
            parts = scored_sequences(end - begin, seq_len, stride)
            if self.extra and (extra := self.extra[number]) is not None:
                if extra.end > seq_len:
                    raise InputError(
                        f"the images of the conversation that begins {extra.begin} end at token {extra.end:,}, after "
                        f"seq_len {seq_len}: raise seq_len, or leave it out of the evaluation text"
                    )
                parts = parts[:1]
            scored += [Scored(begin + p.begin, begin + p.end, begin + p.first_scored, number) for p in parts]
        return [
            s for s in scored if not self.by_document or bool((self.labels[s.first_scored : s.end] != IGNORED).any())
        ]

    def batch(self, sequences: Sequence[Scored], width: int, rows: int | None = None) -> dict[str, Tensor]:
        """`input_ids` and shifted `labels`, int64, (rows, width), and the further arguments of the model's forward.

        Labels are -100 after the end of a sequence and where a token is not scored.

        Args:
            sequences: one a row.
            width: tokens of a row, at least the length of the longest sequence.
            rows: rows of the batch, padded with rows that score nothing. Default: one per sequence.
        """
        rows = len(sequences) if rows is None else rows
        input_ids = self.ids.new_zeros(rows, width)
        labels = torch.full_like(input_ids, IGNORED)
        for row, targets, (begin, end, first, _) in zip(input_ids, labels, sequences):
            row[: end - begin] = self.ids[begin:end]
            targets[first - begin - 1 : end - begin - 1] = self.labels[first:end]
        extra: list[Extra | None] = [None] * rows
        if self.extra:
            for row, sequence in enumerate(sequences):
                held = self.extra[sequence.stretch]
                extra[row] = None if held is None else held.load()
        return {"input_ids": input_ids, "labels": labels, **join_extra(extra, width)}


def scored_sequences(num_tokens: int, seq_len: int, stride: int) -> list[Scored]:
    """The sequences of `num_tokens` tokens, one every `stride`, without those that score nothing."""
    sequences, seen = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + seq_len, num_tokens)
        first_scored = max(seen, begin + 1)  # nothing predicts a sequence's first token
        if first_scored < end:
            sequences.append(Scored(begin, end, first_scored))
        if end == num_tokens:
            break
        seen = end
    return sequences


def scored_text(
    documents: Documents | HubDocuments, encoder: Encoder, limit: int | None = None, *, seed: int | None = None
) -> ScoredText:
    """The tokens of an evaluation text, in file order.

    Args:
        encoder: says which tokens of conversations are scored.
        limit: at most this many tokens, from the start. A conversation with images is not cut there.
        seed: of a text that is longer, take documents in the order of this seed, not those at its start.
    """
    extra: tuple[ScoredExtra | None, ...] = ()
    if documents.kind is Kind.WITH_EXTRA:
        tokens, extra = _with_extra(documents, encoder, limit, seed)
    else:
        tokens = first_tokens(documents, encoder, limit, seed)
    if documents.kind is Kind.TEXT:
        return ScoredText(torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.labels).long())
    if (tokens.labels == IGNORED).all():
        count = len(tokens.ids)
        raise InputError(f"{documents.name}: no token of the assistant among the first {count}: give more text")
    return ScoredText(
        torch.from_numpy(tokens.ids).long(),
        torch.from_numpy(tokens.labels).long(),
        tuple(tokens.begins.nonzero()[0].tolist()),
        encoder.counted,
        extra,
        by_document=True,
    )


def _with_extra(
    documents: Documents | HubDocuments, encoder: Encoder, limit: int | None, seed: int | None
) -> tuple[Tokens, tuple[ScoredExtra | None, ...]]:
    """The tokens of whole conversations up to `limit`, and what each brings beside them."""
    encoded, extra, count = list[Tokens](), list[ScoredExtra | None](), 0

    def load(held: Document | None, position: Position) -> Extra | None:
        return encoder.conversation(held or next(documents.pieces(seed, position=position))).extra

    for piece in documents.pieces(seed):
        tokens = encoder.conversation(piece)
        if tokens.extra is None:
            extra.append(None)
        else:
            held = None if isinstance(documents, Documents) else piece  # a stream is not read again
            extra.append(ScoredExtra(partial(load, held, piece.position), tokens.extra.end, begin_of(piece.text)))
        encoded.append(tokens._replace(extra=None))
        count += len(tokens.ids)
        if limit is not None and count >= limit:
            break
    return Tokens.joined(encoded), tuple(extra)
