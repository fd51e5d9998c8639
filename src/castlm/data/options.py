"""Options of every command that reads a text. They stand apart from the code that reads it, which imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from castlm.fields import Bound, Bounded


@dataclass(frozen=True, kw_only=True)
class TextOptions(Bounded):
    """Options of reading and rendering documents."""

    column: str | None = None
    """Column of .jsonl and .parquet with the text or the messages. The default is the first of: messages, prompt with
    completion, text. Images of messages are in the column images or image."""

    chat_template_path: str | None = None
    """File with a Jinja chat template to use, and to save with a result, in place of the tokenizer's own."""

    document_limit: float = 1.0
    """Factor on the limits of one document, to raise for data that you trust: 64 MiB for a line of .jsonl, 16 Mi
    characters of text, 512 messages, 512 MiB of memory to render them, 64 million pixels for an image and 256 million
    for all images."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Takes these options out of others, by name."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    @property
    def assistant_only(self) -> bool:
        """Whether the tokens of the assistant alone count in a conversation; all count in a calibration text."""
        return False

    def out_of_range(self) -> Iterator[Bound]:
        yield "document_limit", 0 < self.document_limit < math.inf, "above 0"


DEFAULTS = TextOptions()


@dataclass(frozen=True, kw_only=True)
class ScoredTextOptions(TextOptions):
    """Options of reading documents for a loss or a perplexity."""

    assistant_only_loss: bool = True
    """In the loss and the perplexity, count only the assistant's tokens of a conversation, and only the completion of a
    prompt. Plain text counts in full."""

    @property
    def assistant_only(self) -> bool:
        return self.assistant_only_loss


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Bounded):
    """Options of drawing a batch of texts, as `castlm sample` does."""

    max_new_tokens: int = 256
    """Maximum number of tokens of a text. A conversation with a turn that reaches it is dropped."""

    temperature: float = 1.0
    """Sampling temperature: above 1, rare tokens become more likely; below 1, less likely."""

    top_p: float = 1.0
    """Sample from the most probable tokens that together have this probability. 1 samples from all tokens."""

    batch_size: int = 16
    """Number of texts that are sampled together."""

    seed: int = 0
    """Seed of the samples, and of the order of the sequences in teacher_cache."""

    def out_of_range(self) -> Iterator[Bound]:
        yield "max_new_tokens", self.max_new_tokens >= 1, "at least 1"
        yield "temperature", self.temperature >= 1e-6, "at least 1e-6 (0 would write the same text each time)"
        yield "top_p", 0 < self.top_p <= 1, "in (0, 1]"
        yield "batch_size", self.batch_size >= 1, "at least 1"
        yield "seed", self.seed >= 0, "at least 0"


OF_CONVERSATIONS = {
    "assistant_only_loss": "conversations, and the texts are plain",
    "chat_template_path": "conversations, and the texts are plain; the template is saved with the result",
}
"""The options without an effect on plain text, with what they need."""
