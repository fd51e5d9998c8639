"""Sequences of conversations with images: one conversation each, with what the vision tower reads.

Unlike text (`castlm.data.packing`), conversations are not packed together: the positions around an image depend on the
model, and a processor prepares one conversation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import Documents
from castlm.data.extra import Extra, join_extra
from castlm.data.mixture import AnyDocuments
from castlm.data.packing import Resumable
from castlm.data.readers import Piece, Position
from castlm.data.tokens import IGNORED, Encoder, Tokens


class _Sequence(NamedTuple):
    """One conversation with the token after the sequence: ids and labels, int64, (seq_len + 1,)."""

    ids: Tensor
    labels: Tensor
    extra: Extra | None


class ImageRow(NamedTuple):
    """Consecutive conversations; `batch` prepares their images."""

    pieces: list[Piece]
    encode: Callable[[Piece], _Sequence]

    def batch(self, seq_len: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`input_ids` and shifted `labels`, int64, (num_sequences, seq_len), and the further arguments of the model's
        forward; no `position_ids`, which the model derives from the images. `rows` selects some sequences.
        """
        found = [self.encode(piece) for piece in self.pieces[rows]]
        return {
            "input_ids": torch.stack([sequence.ids[:-1] for sequence in found]),
            "labels": torch.stack([sequence.labels[1:] for sequence in found]),
            **join_extra([sequence.extra for sequence in found], seq_len),
        }


class ImageSequences(Resumable):
    """Sequences of `seq_len` tokens: conversations shuffled by (seed, epoch), each in a sequence of its own.

    End-of-text tokens that do not count fill the rest of a sequence. A longer conversation is cut. A conversation whose
    images do not fit or cannot be prepared keeps its sequence, but none of its tokens count.

    Args:
        documents: conversations, with images or without.
        encoder: with a processor; this class alone uses it.
        repeat: every epoch has the order of the first.
        say: called with a line for each conversation that cannot be prepared, and for the first that is too long.
    """

    def __init__(
        self,
        documents: AnyDocuments,
        encoder: Encoder,
        *,
        seq_len: int,
        seed: int,
        repeat: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.documents, self.seq_len, self.seed, self.repeat = documents, seq_len, seed, repeat
        self._encoder, self._say, self._said = encoder, say, set[str]()
        self._go_to({"epoch": 0, "document": None, "token": 0, "sequences": 0})

    def take(self, num_sequences: int) -> ImageRow:
        """The next conversations."""
        found = list(islice(self._reader, num_sequences))
        self.num_taken += num_sequences
        return ImageRow(found, self._encode)

    def tokens_per_epoch(self) -> int:
        """Number of tokens of one epoch."""
        assert isinstance(self.documents, Documents)
        return len(self.documents) * self.seq_len

    def _position(self) -> tuple[int, Position, int]:
        """The last conversation and 1, or the next conversation and 0."""
        epoch, position, is_used = self._at
        return epoch, position, int(is_used)

    def _go_to(self, state: dict[str, Any]) -> None:
        self._at: tuple[int, Position, bool] = (state["epoch"], state["document"], bool(state["token"]))
        self.num_taken = state["sequences"]
        self._reader = self._read()

    def _read(self) -> Iterator[Piece]:
        epoch, position, is_used = self._at
        while True:
            pieces = self.documents.pieces(self.seed, 0 if self.repeat else epoch, position)
            has_any = position is not None
            for piece in islice(pieces, int(is_used), None):
                self._at, has_any = (epoch, piece.position, True), True
                yield piece
            if not has_any:
                raise InputError(f"{self.documents.name} holds no conversation: give some")
            epoch, position, is_used = epoch + 1, None, False

    def _encode(self, piece: Piece) -> _Sequence:
        try:
            tokens = self._encoder.conversation(piece.text)
        except InputError as error:
            if piece.kind is not Kind.WITH_EXTRA:  # no image file can be the cause
                raise
            self._say_once(str(error), f"a conversation does not count: {error}")
            return self._filled(None)
        count = len(tokens.ids)
        if tokens.extra is not None and not tokens.extra.fits(self.seq_len):
            self._say_once(
                "left out",
                f"the images of a conversation take {count:,} tokens with its text, more than seq_len {self.seq_len}: "
                "it does not count, and so for others as long; raise seq_len",
            )
            return self._filled(None)
        if count > self.seq_len + 1:
            self._say_once(
                "cut",
                f"a conversation of {count:,} tokens is longer than seq_len {self.seq_len}: it is cut, and so are "
                "others as long",
            )
        return self._filled(tokens)

    def _filled(self, tokens: Tokens | None) -> _Sequence:
        """`tokens` cut to length, or padded with end-of-text tokens that do not count; None gives only padding."""
        count, eos = self.seq_len + 1, self._encoder.eos
        if tokens is None:
            return _Sequence(torch.full((count,), eos), torch.full((count,), IGNORED), None)
        ids, labels = (torch.from_numpy(array[:count]).long() for array in (tokens.ids, tokens.labels))
        missing = count - len(ids)
        return _Sequence(F.pad(ids, (0, missing), value=eos), F.pad(labels, (0, missing), value=IGNORED), tokens.extra)

    def _say_once(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)
