"""Options of every command that reads a text. They stand apart from the code that reads it, which imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from castlm.fields import Bounded, Needs, option

TEXT = Needs("a text", lambda options: options.reads_text)
CONVERSATIONS = Needs("conversations, and the texts are plain", lambda options: not options.is_plain)
TEMPLATE = CONVERSATIONS._replace(words=f"{CONVERSATIONS.words}; the template is saved with the result")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Bounded):
    """Options of reading and rendering documents."""

    column: str | None = option(
        None,
        needs=TEXT,
        help="Column of .jsonl and .parquet with the text or the messages. The default is the first of: messages, "
        "prompt with completion, text. Images of messages are in the column images or image.",
    )

    chat_template_path: str | None = option(
        None,
        needs=(TEXT, TEMPLATE),
        help="File with a Jinja chat template to use, and to save with a result, in place of the tokenizer's own.",
    )

    document_limit: float = option(
        1.0,
        above=0,
        needs=TEXT,
        may_change=True,
        help="Factor on the limits of one document, to raise for data that you trust: 64 MiB for a line of .jsonl, "
        "16 Mi characters of text, 512 messages, 512 MiB of memory to render them, 1 GiB of memory and 10 seconds "
        "to decode an image, and 256 million pixels for all images.",
    )  # a run that met a larger document continues

    @property
    def reads_text(self) -> bool:
        """Whether a text is read. In some commands it is optional; the options of reading it have no effect without."""
        return True

    @property
    def is_plain(self) -> bool:
        """Whether the texts are known to hold no conversation."""
        return False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Takes these options out of others, by name."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    @property
    def assistant_only(self) -> bool:
        """Whether the tokens of the assistant alone count in a conversation; all count in a calibration text."""
        return False


DEFAULTS = TextOptions()


@dataclass(frozen=True, kw_only=True)
class ScoredTextOptions(TextOptions):
    """Options of reading documents for a loss or a perplexity."""

    assistant_only_loss: bool = option(
        True,
        needs=(TEXT, CONVERSATIONS),
        help="In the loss and the perplexity, count only the assistant's tokens of a conversation, and only the "
        "completion of a prompt. Plain text counts in full.",
    )

    @property
    def assistant_only(self) -> bool:
        return self.assistant_only_loss


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Bounded):
    """Options of drawing a batch of texts, as `castlm sample` does."""

    max_new_tokens: int | None = option(
        None,
        at_least=1,
        help="Maximum number of tokens of a text. A conversation with a turn that reaches it is dropped. The "
        "default is 256, or as many as the model's context leaves beside the longest prompt.",
    )

    temperature: float = option(
        1.0,
        at_least=1e-6,
        help="Sampling temperature: above 1, rare tokens become more likely; below 1, less likely.",
    )

    top_p: float = option(
        1.0,
        above=0,
        at_most=1,
        help="Sample from the most probable tokens that together have this probability. 1 samples from all tokens.",
    )

    batch_size: int = option(
        16,
        at_least=1,
        help="Number of texts that are sampled together.",
    )

    seed: int = option(
        0,
        at_least=0,
        help="Seed of the samples, and of the order of the sequences in teacher_cache.",
    )
