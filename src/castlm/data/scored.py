"""The tokens of an evaluation text, which of them are scored, and where a sequence has to start again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.data.chat import begin_of
from castlm.data.documents import Documents, open_documents
from castlm.data.hub import HubDocuments
from castlm.data.images import ImageEncoder, ImageInputs, ImageTokens
from castlm.data.readers import Position
from castlm.data.tokens import IGNORED, Encoder, first_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

ALL, ASSISTANT = "all", "assistant"


class ScoredImages(NamedTuple):
    """The images of a conversation, prepared each time they are needed: those of a whole text may not fit in memory."""

    load: Callable[[], ImageInputs | None]
    end: int
    """Number of tokens up to the end of the last image."""
    begin: str
    """The first words of the conversation, for messages."""


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
    images: tuple[ScoredImages | None, ...] = ()
    """Of each part that begins at one of `starts`; empty of a text without images."""
    is_chat: bool = False
    """Whether it consists of conversations, each scored by itself."""

    @classmethod
    def of(cls, ids: Tensor) -> ScoredText:
        """A plain text, of which every token is scored."""
        return cls(ids, ids)

    @classmethod
    def joined(cls, parts: Sequence[ScoredText]) -> ScoredText:
        """Several texts as one, each of which begins a sequence."""
        starts: list[int] = []
        images: list[ScoredImages | None] = []
        at = 0
        for part in parts:
            starts += [at + start for start in part.starts]
            images += part.images or [None] * len(part.starts)
            at += len(part.ids)
        ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels"))
        tokens = " and ".join(dict.fromkeys(part.tokens for part in parts))
        is_chat = any(part.is_chat for part in parts)
        return cls(ids, labels, tuple(starts), tokens, tuple(images) if any(images) else (), is_chat)

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
    processor: ProcessorMixin | None = None,
    seed: int | None = None,
) -> ScoredText:
    """The tokens of an evaluation text, in file order.

    Args:
        limit: at most this many tokens, from the start. A conversation with images is not cut there.
        seed: of a text that is longer, take documents in the order of this seed, not those at its start.
        assistant_only: of conversations, score the tokens of the assistant alone.
        processor: prepares the images of conversations that have some; see `castlm.models.opening.open_processor`.

    Raises:
        InputError: as `open_documents` and `castlm.data.chat.Chat`; or no token of the assistant is within `limit`.
    """
    if isinstance(documents, str | Path):
        documents = open_documents(documents)
    if documents.has_images and processor is not None:
        return _with_images(documents, ImageEncoder(processor, assistant_only), limit, assistant_only, seed)
    tokens = first_tokens(documents, Encoder(tokenizer, None, assistant_only), limit, seed)
    ids = torch.from_numpy(tokens.ids).long()
    labels = torch.from_numpy(tokens.labels).long()
    if not documents.is_chat:
        return ScoredText(ids, labels)
    text = ScoredText(
        ids,
        labels,
        tuple(tokens.begins.nonzero()[0].tolist()),
        ASSISTANT if assistant_only else ALL,
        is_chat=True,
    )
    return _checked(text, documents)


def _with_images(
    documents: Documents | HubDocuments,
    encoder: ImageEncoder,
    limit: int | None,
    assistant_only: bool,
    seed: int | None,
) -> ScoredText:
    found: list[ImageTokens] = []
    images, starts, count = list[ScoredImages | None](), list[int](), 0
    for piece in documents.pieces(seed):
        tokens = encoder(piece.text)
        starts.append(count)
        if tokens.images is None:
            images.append(None)
        else:
            again = piece.position if isinstance(documents, Documents) else piece.text  # a stream is not read again
            load = partial(_images_of, encoder, documents, again, seed)
            images.append(ScoredImages(load, tokens.images.end, begin_of(piece.text)))
        found.append(tokens._replace(images=None))
        count += len(tokens.ids)
        if limit is not None and count >= limit:
            break
    ids, labels = torch.cat([tokens.ids for tokens in found]), torch.cat([tokens.labels for tokens in found])
    which = ASSISTANT if assistant_only else ALL
    return _checked(ScoredText(ids, labels, tuple(starts), which, tuple(images), is_chat=True), documents)


def _images_of(
    encoder: ImageEncoder, documents: Documents | HubDocuments, document: str | Position, seed: int | None
) -> ImageInputs | None:
    """The images of a conversation, given by its JSON or, of local documents, by its position."""
    if not isinstance(document, str):
        document = next(documents.pieces(seed, position=document)).text
    return encoder(document).images


def _checked(text: ScoredText, documents: Documents | HubDocuments) -> ScoredText:
    if not (text.labels != IGNORED).any():
        raise InputError(f"{documents.name}: no token of the assistant among the first {len(text.ids)}: give more text")
    return text
