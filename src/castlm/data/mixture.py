"""Several training texts in one run, each with its share of the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from castlm.core.errors import InputError
from castlm.data.columns import Kind
from castlm.data.documents import Documents
from castlm.data.hub import HubDocuments


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
