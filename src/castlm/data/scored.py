"""The tokens of an evaluation text, which of them are scored, and where a sequence has to start again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.documents import Documents, open_documents
from castlm.data.hub import HubDocuments
from castlm.data.tokens import IGNORED, Encoder, first_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALL, ASSISTANT = "all", "assistant"


@dataclass(frozen=True)
class ScoredText:
    """Tokens for a perplexity. Plain text is one stretch of tokens; a conversation is never scored after another."""

    ids: Tensor
    """int64, (num_tokens,)."""
    labels: Tensor
    """int64, (num_tokens,): the same, not shifted, and -100 where a token is not scored."""
    starts: tuple[int, ...] = (0,)
    """Where a sequence begins in any case: at each conversation, and at the first token."""
    tokens: str = ALL
    """Which tokens are scored, in words: "all" or "assistant"; of several kinds of text both."""

    @classmethod
    def of(cls, ids: Tensor) -> ScoredText:
        """A plain text, of which every token is scored."""
        return cls(ids, ids)

    @classmethod
    def joined(cls, parts: Sequence[ScoredText]) -> ScoredText:
        """Several texts as one; plain text goes on in the sequence of the plain text before it."""
        starts: list[int] = []
        at, was_chat = 0, True
        for part in parts:
            starts += [at + start for start in part.starts] if part.is_chat or was_chat else []
            at, was_chat = at + len(part.ids), part.is_chat
        ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
        return cls(ids, labels, tuple(starts), " and ".join(dict.fromkeys(part.tokens for part in parts)))

    @property
    def is_chat(self) -> bool:
        """Whether it consists of conversations, each scored by itself."""
        return self.starts != (0,) or self.tokens != ALL

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Begin and end of each part that is scored by itself."""
        return list(zip(self.starts, (*self.starts[1:], len(self.ids))))


def scored_text(
    documents: Documents | HubDocuments | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    *,
    assistant_only: bool = True,
) -> ScoredText:
    """The tokens of an evaluation text, in file order.

    Args:
        limit: at most this many tokens, from the start.
        assistant_only: of conversations, score the tokens of the assistant alone.

    Raises:
        InputError: as `open_documents` and `castlm.data.chat.Chat`; or no token of the assistant is within `limit`.
    """
    if isinstance(documents, str | Path):
        documents = open_documents(documents)
    tokens = first_tokens(documents, Encoder(tokenizer, None, assistant_only), limit)
    ids = torch.from_numpy(tokens.ids).long()
    if not documents.is_chat:
        return ScoredText.of(ids)
    text = ScoredText(
        ids,
        torch.from_numpy(tokens.labels).long(),
        tuple(tokens.begins.nonzero()[0].tolist()),
        ASSISTANT if assistant_only else ALL,
    )
    if not (text.labels != IGNORED).any():
        raise InputError(f"{documents.name}: no token of the assistant among the first {len(ids)}: give more text")
    return text
