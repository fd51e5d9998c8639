"""Several training texts as one stream of documents, each with its share of the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from castlm.core.errors import InputError
from castlm.data.columns import text_length
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments
from castlm.data.readers import Piece, Position


class Mixture:
    """Documents of several texts in fixed shares of the characters, without an end.

    The next document comes from the text that is furthest behind its share, so that the shares hold at every point of
    a run and no random number has to be saved. A text that ends starts its next epoch, in another order.

    Args:
        parts: the texts.
        weights: the share of each, above 0; they need not add up to 1.

    Raises:
        InputError: a weight that is not above 0, or plain text beside conversations with images.

    Examples:
        >>> texts = [Documents.from_texts([letter * 10] * 4) for letter in "ab"]
        >>> pieces = Mixture(texts, [3, 1]).pieces(seed=None)
        >>> "".join(next(pieces).text[0] for _ in range(8))
        'abaaabaa'
    """

    def __init__(self, parts: Sequence[Documents | HubDocuments], weights: Sequence[float]) -> None:
        for part, weight in zip(parts, weights, strict=True):
            if not weight > 0:
                raise InputError(f"dataset {part.name}: its weight {weight:g} is not above 0")
            if not part.is_chat and any(other.has_images for other in parts):
                raise InputError(f"{part.name}: plain text beside conversations with images: give it as conversations")
        self._parts, self._weights = list(parts), [weight / sum(weights) for weight in weights]
        shares = (f"{part.name} ({weight:.0%})" for part, weight in zip(parts, self._weights))
        self.name = " + ".join(shares)
        self.num_empty = sum(part.num_empty for part in parts)
        self.is_chat = any(part.is_chat for part in parts)
        """Whether a text of the mixture holds conversations."""
        self.has_images = any(part.has_images for part in parts)
        """Whether any of these has images."""

    def pieces(self, seed: int | None, epoch: int = 0, position: Position = None) -> Iterator[Piece]:
        """The pieces of the documents, as `Documents.pieces`; `epoch` counts from the epoch of each text."""
        count = range(len(self._parts))
        state = position or {"texts": [[epoch, None, False] for _ in count], "used": [0 for _ in count], "open": None}
        texts, used, current = [list(text) for text in state["texts"]], list(state["used"]), state["open"]
        streams = [self._open(number, seed, *texts[number]) for number in count]
        while True:
            number = min(count, key=lambda n: used[n] / self._weights[n]) if current is None else current
            piece = next(streams[number], None)
            if piece is None:
                texts[number] = [texts[number][0] + 1, None, False]
                streams[number] = self._open(number, seed, *texts[number])
                piece = next(streams[number], None)
                if piece is None:
                    raise InputError(f"dataset {self._parts[number].name} has no text: leave it out")
            texts[number] = [texts[number][0], piece.position, False]
            here = {"texts": [list(text) for text in texts], "used": list(used), "open": current}
            yield piece._replace(position=here)
            texts[number][2] = True
            used[number] += text_length(piece.text) if piece.is_chat else len(piece.text)
            current = None if piece.last else number

    def _open(self, number: int, seed: int | None, epoch: int, position: Position, is_used: bool) -> Iterator[Piece]:
        """The pieces of a text from `position` on, or from the one after it if that `is_used`."""
        pieces = self._parts[number].pieces(seed, epoch, position)
        if is_used:
            next(pieces, None)
        return pieces

    def text_hash(self) -> str:
        """A SHA-256 of the texts and their shares, in hexadecimal."""
        content = [[part.text_hash(), weight] for part, weight in zip(self._parts, self._weights)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
