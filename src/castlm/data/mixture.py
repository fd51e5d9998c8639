"""Several training texts in one run, each with its share of the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments
from castlm.data.readers import Piece, Position


class Mixture:
    """Several texts and their shares.

    Args:
        parts: the texts.
        weights: the share of each, above 0; they need not add up to 1.

    Raises:
        InputError: plain text beside conversations with images.
    """

    def __init__(self, parts: Sequence[Documents | HubDocuments], weights: Sequence[float]) -> None:
        for part in parts:
            if part.kind is Kind.TEXT and any(other.kind is Kind.WITH_EXTRA for other in parts):
                raise InputError(f"{part.name}: plain text beside conversations with images: give it as conversations")
        self.parts, self.weights = list(parts), [weight / sum(weights) for weight in weights]
        shares = (f"{part.name} ({weight:.0%})" for part, weight in zip(parts, self.weights))
        self.name = " + ".join(shares)
        self.kind = max(part.kind for part in parts)

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Piece]:
        """An endless stream of conversations in fixed shares of the characters; see `Documents.pieces`.

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
            used[number] += len(piece.text)

    def _open(self, number: int, seed: int | None, epoch: int, position: Position, is_used: bool) -> Iterator[Piece]:
        """The pieces of a text, starting at `position`, or after it if that piece `is_used`."""
        pieces = self.parts[number].pieces(seed, epoch, position)
        if is_used:
            next(pieces, None)
        return pieces

    def text_hash(self) -> str:
        """A SHA-256 of the texts and their shares, in hexadecimal."""
        content = [[part.text_hash(), weight] for part, weight in zip(self.parts, self.weights)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def furthest_behind(used: Sequence[float], weights: Sequence[float]) -> int:
    """The number of the text that is furthest behind its share.

    Adding one half makes the counts equal rounded shares, so a text of small weight does not come first.
    """
    return min(range(len(used)), key=lambda number: (used[number] + 0.5) / weights[number])


def turns_by_share(weights: Sequence[float], total: int) -> list[int]:
    """The number of the text that each of the first `total` sequences of a mixture comes from.

    Examples:
        >>> turns_by_share([0.7, 0.28, 0.02], 10)
        [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    """
    counts, turns = [0] * len(weights), []
    for _ in range(total):
        turns.append(furthest_behind(counts, weights))
        counts[turns[-1]] += 1
    return turns


AnyDocuments = Documents | HubDocuments | Mixture
