"""Sequences of conversations with images: one conversation each, with what the vision tower reads.

`castlm.data.loader` takes them as it takes those of `castlm.data.packing`, which puts several documents into a
sequence: the position of an image among them would depend on the model, and a processor prepares one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.data.columns import has_images
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments
from castlm.data.images import ImageEncoder, ImageTokens, fits, join_images
from castlm.data.mixture import Mixture
from castlm.data.positions import Resumable
from castlm.data.readers import Piece, Position
from castlm.data.tokens import IGNORED

AnyDocuments = Documents | HubDocuments | Mixture


class ImageRow(NamedTuple):
    """Consecutive conversations, whose images are prepared when a batch is made of them."""

    documents: list[str]
    encode: Callable[[str], ImageTokens]

    def batch(self, seq_len: int, rows: slice = slice(None)) -> dict[str, Any]:
        """`input_ids`, shifted `labels` and `position_ids`, int64, (num_sequences, seq_len), and `images`, which is
        what the model's forward takes beside them; `rows` selects some sequences."""
        found = [self.encode(document) for document in self.documents[rows]]
        return {
            "input_ids": torch.stack([tokens.ids[:-1] for tokens in found]),
            "labels": torch.stack([tokens.labels[1:] for tokens in found]),
            "position_ids": torch.arange(seq_len).repeat(len(found), 1),
            "images": join_images([tokens.images for tokens in found], seq_len),
        }


class ImageSequences(Resumable):
    """Sequences of `seq_len` tokens: conversations shuffled by (seed, epoch), each in a sequence of its own.

    What is left of a sequence is filled with end-of-text tokens that do not count. A longer conversation is cut; one
    whose images do not fit or cannot be prepared keeps its place and counts for nothing. That is said, for those that
    are too long once.

    Args:
        documents: conversations, with images or without.
        repeat: every epoch has the order of the first.
        say: called with these lines.
    """

    def __init__(
        self,
        documents: AnyDocuments,
        encoder: ImageEncoder,
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
        self._num_sequences += num_sequences
        return ImageRow(found, self._encode)

    def _position(self) -> tuple[int, Position, int]:
        """Of the last conversation, with a 1, or of the next, with a 0."""
        epoch, position, is_used = self._at
        return epoch, position, int(is_used)

    def _go_to(self, state: dict[str, Any]) -> None:
        self._at: tuple[int, Position, bool] = (state["epoch"], state["document"], bool(state["token"]))
        self._num_sequences = state["sequences"]
        self._reader = self._read()

    def _read(self) -> Iterator[str]:
        epoch, position, is_used = self._at
        while True:
            pieces = self.documents.pieces(self.seed, 0 if self.repeat else epoch, position)
            has_any = position is not None
            for piece in islice(pieces, int(is_used), None):
                self._at, has_any = (epoch, piece.position, True), True
                yield conversation_of(piece, self.documents.name)
            if not has_any:
                raise InputError(f"{self.documents.name} holds no conversation: give some")
            epoch, position, is_used = epoch + 1, None, False

    def _encode(self, document: str) -> ImageTokens:
        wanted = self.seq_len + 1
        try:
            tokens = self._encoder(document)
        except InputError as error:
            if not has_images(document):  # what is wrong is not in a file beside the dataset
                raise
            self._say_once(str(error), f"a conversation does not count: {error}")
            return filled(self._nothing(), wanted, self._encoder.eos)
        count = len(tokens.ids)
        if not fits(tokens.images, self.seq_len):
            self._say_once(
                "left out",
                f"the images of a conversation take {count:,} tokens with its text, more than seq_len {self.seq_len}: "
                "it does not count, and so for others as long; raise seq_len",
            )
            tokens = self._nothing()
        elif count > wanted:
            self._say_once(
                "cut",
                f"a conversation of {count:,} tokens is longer than seq_len {self.seq_len}: it is cut, and so are "
                "others as long",
            )
        return filled(tokens, wanted, self._encoder.eos)

    def _nothing(self) -> ImageTokens:
        return ImageTokens(torch.tensor([self._encoder.eos]), torch.tensor([IGNORED]), None)

    def _say_once(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)


def filled(tokens: ImageTokens, num_tokens: int, eos: int) -> ImageTokens:
    """`tokens` cut to `num_tokens`, or filled up with end-of-text tokens that do not count."""
    missing = max(0, num_tokens - len(tokens.ids))
    ids = F.pad(tokens.ids[:num_tokens], (0, missing), value=eos)
    return ImageTokens(ids, F.pad(tokens.labels[:num_tokens], (0, missing), value=IGNORED), tokens.images)


def conversation_of(piece: Piece, name: str) -> str:
    """The JSON of a conversation.

    Raises:
        InputError: the piece is plain text.
    """
    if not piece.is_chat:
        raise InputError(f"{name}: plain text beside conversations with images: give it as conversations")
    return piece.text
