"""Conversations with images, as the processor of a vision-language model prepares them.

A processor puts a run of tokens in the place of each image and makes the tensors that the vision tower reads. It does
not say which tokens the assistant wrote; those are found in the conversation before the images are put in
(`castlm.data.chat`) and carried over by aligning the two rows of tokens.
"""

from __future__ import annotations

import base64
import binascii
import copy
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.data.chat import Rendered
from castlm.data.image_columns import BYTES, message_content
from castlm.data.tokens import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

_OF_TEXT = ("input_ids", "attention_mask")


class ImageInputs(NamedTuple):
    """What a model's forward takes beside the tokens of one conversation."""

    by_image: dict[str, Tensor]
    """As `pixel_values`: joined along the first dimension, whatever it counts."""
    by_token: dict[str, Tensor]
    """As `mm_token_type_ids`: one number a token, (num_tokens,)."""
    end: int
    """Number of tokens up to the end of the last image."""


class ImageTokens(NamedTuple):
    """The tokens of a conversation."""

    ids: Tensor
    """int64, (num_tokens,)."""
    labels: Tensor
    """int64: the ids themselves, not shifted, and -100 where a token does not count, as those of images never do."""
    images: ImageInputs | None
    """None without images."""


class ImageEncoder:
    """Tokens and images of the conversations that `castlm.data.columns` checks.

    Args:
        processor: as `castlm.opening.open_processor` gives it.
        assistant_only: only the tokens of the assistant count; see `castlm.data.chat`.
    """

    def __init__(self, processor: ProcessorMixin, assistant_only: bool = True) -> None:
        self._processor = copy.deepcopy(processor)  # a thread prepares batches while another evaluates
        tokenizer = self._processor.tokenizer
        self._encoder = Encoder(tokenizer, None, assistant_only)
        self._chat, self.eos = self._encoder.chat, self._encoder.eos
        known = tokenizer.get_vocab()
        names = (getattr(processor, name, None) for name in ("image_token", "boi_token"))
        self._placeholders = {known[name] for name in names if name in known}

    def __call__(self, document: str) -> ImageTokens:
        """The tokens of a conversation, given as JSON, with an end-of-text behind them.

        Raises:
            InputError: as `Chat`; an image that cannot be read; or a processor that cannot take it, or changes more of
                the text than the images.
        """
        content = json.loads(document)
        sources = content.pop("images", [])
        plain = json.dumps(content)
        rendered = self._chat(plain)
        if (count := sum(token in self._placeholders for token in rendered.ids)) != len(sources):
            raise InputError(
                f"the conversation {self._chat.text(plain)[:60]!r} has {len(sources)} images, and {count} tokens that "
                "stand for one in the text that its chat template makes: take them out of the text, or correct the "
                "template (chat_template_path)"
            )
        if not sources:
            return self._of(rendered, None)
        images = [open_image(source) for source in sources]
        try:
            options = {"return_tensors": "pt", "add_special_tokens": False}
            found = self._processor(text=[self._chat.text(plain)], images=images, **options)
        except Exception as error:  # a processor is a program, with errors of many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self._name} cannot prepare the images {_names(sources)}: {reason}") from error
        ids = found["input_ids"][0].tolist()
        counts, end = self._aligned(rendered.ids, rendered.counts, ids)
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and name not in _OF_TEXT}
        by_token = {name: value[0] for name, value in tensors.items() if value.shape == (1, len(ids))}
        by_image = {name: value for name, value in tensors.items() if name not in by_token}
        return self._of(Rendered(ids, counts, rendered.is_rendered), ImageInputs(by_image, by_token, end))

    def text_alone(self, document: str) -> list[int]:
        """The tokens of a conversation without its images, with an end-of-text behind them."""
        content = json.loads(document)
        content.pop("images", None)
        for messages in (content.get(name) for name in ("messages", "prompt", "completion")):
            for message in messages if isinstance(messages, list) else []:
                if isinstance(message.get("content"), list):
                    message["content"] = message_content([p for p in message["content"] if p["type"] == "text"], "")
        return [*self._chat(json.dumps(content)).ids, self.eos]

    @property
    def _name(self) -> str:
        return type(self._processor).__name__

    def _of(self, rendered: Rendered, images: ImageInputs | None) -> ImageTokens:
        ids, labels, _ = self._encoder.conversation(rendered)
        return ImageTokens(torch.from_numpy(ids).long(), torch.from_numpy(labels).long(), images)

    def _aligned(self, before: list[int], counts: list[bool], after: list[int]) -> tuple[list[bool], int]:
        """Which tokens of `after` count, and where the last image ends, from the tokens before images were put in.

        Between images the tokens are the same, so each stretch of text is found behind the one before it.
        """
        cuts = [number for number, token in enumerate(before) if token in self._placeholders]
        begins, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(before)]
        found, at = list[bool](), 0
        for number, (begin, end) in enumerate(zip(begins, ends)):
            text = before[begin:end]
            first = at if number == 0 else at + 1  # an image has a token at least
            last = len(after) - len(text)
            start = last if number == len(cuts) else _find(text, after, first)
            if start is None or start < first or after[start : start + len(text)] != text:
                raise InputError(
                    f"{self._name} changes more of a conversation than its images, so that the tokens that count "
                    f"cannot be told (from {len(before)} tokens with {len(cuts)} images to {len(after)})"
                )
            found += [False] * (start - at) + counts[begin:end]
            at = start + len(text)
        return found, len(after) - len(before[begins[-1] :])


def _find(part: list[int], row: list[int], start: int) -> int | None:
    return next((i for i in range(start, len(row) - len(part) + 1) if row[i : i + len(part)] == part), None)


def open_image(source: str) -> Image:
    """An image of a conversation, RGB.

    Args:
        source: as `castlm.data.image_columns.collect_images` gives it.

    Raises:
        InputError: it cannot be read.
    """
    from PIL import Image

    try:
        file = io.BytesIO(base64.b64decode(source.removeprefix(BYTES))) if source.startswith(BYTES) else source
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read the image {_names([source])}: {reason}; remove its row") from error


def _names(sources: Sequence[str]) -> str:
    return ", ".join("(bytes in the dataset)" if source.startswith(BYTES) else source for source in sources)


def join_images(rows: Sequence[ImageInputs | None], width: int) -> dict[str, Tensor]:
    """What the forward of a model takes beside the tokens of a batch, `width` tokens a row; empty without images.

    Tensors of images that differ in another dimension than the first, as in their number of tiles, are filled up with
    zeros, as processors do it.
    """
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows if row is not None for name in row.by_image):
        parts = [row.by_image[name] for row in rows if row is not None and name in row.by_image]
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        joined[name] = torch.cat([_filled(part, largest) for part in parts])
    for name in dict.fromkeys(name for row in rows if row is not None for name in row.by_token):
        empty = torch.zeros(0, dtype=next(row.by_token[name].dtype for row in rows if row is not None))
        found = [empty if row is None else row.by_token[name][:width] for row in rows]
        joined[name] = torch.stack([F.pad(row, (0, width - len(row))) for row in found])
    return joined


def _filled(part: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, part.shape[1:])]
    return F.pad(part, [n for size in reversed(missing) for n in (0, size)])


def fits(images: ImageInputs | None, num_tokens: int) -> bool:
    """Whether all images lie within the first `num_tokens` tokens."""
    return images is None or images.end <= num_tokens
