"""Several training texts in one run, each with its share of the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.columns import text_length
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments
from castlm.data.packing import PackedSequences, Row
from castlm.data.readers import Piece, Position


class Mixture:
    """Several texts and their shares.

    Args:
        parts: the texts.
        weights: the share of each, above 0; they need not add up to 1.

    Raises:
        InputError: a weight that is not above 0, or plain text beside conversations with images.
    """

    def __init__(self, parts: Sequence[Documents | HubDocuments], weights: Sequence[float]) -> None:
        for part, weight in zip(parts, weights, strict=True):
            if not weight > 0:
                raise InputError(f"dataset {part.name}: its weight {weight:g} is not above 0")
            if not part.is_chat and any(other.has_images for other in parts):
                raise InputError(f"{part.name}: plain text beside conversations with images: give it as conversations")
        self.parts, self.weights = list(parts), [weight / sum(weights) for weight in weights]
        shares = (f"{part.name} ({weight:.0%})" for part, weight in zip(parts, self.weights))
        self.name = " + ".join(shares)
        self.num_empty = sum(part.num_empty for part in parts)
        self.is_chat = any(part.is_chat for part in parts)
        """Whether a text of the mixture holds conversations."""
        self.has_images = any(part.has_images for part in parts)
        """Whether any of these has images."""

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Piece]:
        """Conversations without an end, in fixed shares of the characters, as `Documents.pieces`.

        The next one comes from the text that is furthest behind its share. A text that ends starts its next epoch, in
        another order; `epoch` counts from the epoch of each text.
        """
        count = range(len(self.parts))
        state = position or {"texts": [[epoch, None, False] for _ in count], "used": [0 for _ in count]}
        texts, used = [list(text) for text in state["texts"]], list(state["used"])
        streams = [self._open(number, seed, *texts[number]) for number in count]
        while True:
            number = furthest_behind(used, self.weights)
            piece = next(streams[number], None)
            if piece is None:
                texts[number] = [texts[number][0] + 1, None, False]
                streams[number] = self._open(number, seed, *texts[number])
                piece = next(streams[number], None)
                if piece is None:
                    raise InputError(f"dataset {self.parts[number].name} has no text: leave it out")
            texts[number] = [texts[number][0], piece.position, False]
            yield piece._replace(position={"texts": [list(text) for text in texts], "used": list(used)})
            texts[number][2] = True
            used[number] += text_length(piece.text)

    def _open(self, number: int, seed: int | None, epoch: int, position: Position, is_used: bool) -> Iterator[Piece]:
        """The pieces of a text from `position` on, or from the one after it if that `is_used`."""
        pieces = self.parts[number].pieces(seed, epoch, position)
        if is_used:
            next(pieces, None)
        return pieces

    def text_hash(self) -> str:
        """A SHA-256 of the texts and their shares, in hexadecimal."""
        content = [[part.text_hash(), weight] for part, weight in zip(self.parts, self.weights)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def furthest_behind(used: Sequence[float], weights: Sequence[float]) -> int:
    """The number of the text that has had the least of its share.

    The half makes the counts those of rounded shares: a text of small weight does not come first.
    """
    return min(range(len(used)), key=lambda number: (used[number] + 0.5) / weights[number])


def turns_by_share(weights: Sequence[float], total: int) -> list[int]:
    """Which text of a mixture each of the first `total` sequences is of, by its number.

    Examples:
        >>> turns_by_share([0.7, 0.28, 0.02], 10)
        [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    """
    counts, turns = [0] * len(weights), []
    for _ in range(total):
        turns.append(furthest_behind(counts, weights))
        counts[turns[-1]] += 1
    return turns


class MixedRow(NamedTuple):
    """Sequences of several texts."""

    rows: list[Row]
    """Of one sequence each."""

    def batch(self, seq_len: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """See `castlm.data.packing.Row.batch`."""
        batches = [row.batch(seq_len) for row in self.rows[rows]]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class MixedSequences:
    """Sequences of several texts, each packed by itself, in fixed shares of the tokens.

    The next sequence comes from the text that is furthest behind its share, so that the shares hold at every point of a
    run, however long the documents are, and no random number has to be saved.

    Args:
        parts: the sequences of each text, without an end and of one length.
        weights: the share of each.
    """

    def __init__(self, parts: Sequence[PackedSequences], weights: Sequence[float]) -> None:
        self.seq_len = parts[0].seq_len
        self._parts, self._weights = list(parts), list(weights)

    def take(self, num_sequences: int) -> MixedRow:
        """The next sequences."""
        rows: list[Row] = []
        while len(rows) < num_sequences:
            number = furthest_behind([part.num_taken for part in self._parts], self._weights)
            row = self._parts[number].take(1)
            assert row is not None  # a text starts again when it ends
            rows.append(row)
        return MixedRow(rows)

    def state_dict(self) -> dict[str, Any]:
        """The position in each text, as plain JSON; the same on every rank."""
        taken = sum(part.num_taken for part in self._parts)
        return {"sequences": taken, "texts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position of the same texts.

        Raises:
            InputError: the position was saved with another seed or seq_len.
        """
        for part, position in zip(self._parts, state["texts"], strict=True):
            part.load_state_dict(position)
