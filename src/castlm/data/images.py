"""Conversations with images, as the processor of a vision-language model prepares them.

A processor puts a run of tokens in the place of each image and makes the tensors that the vision tower reads. It does
not say which tokens the assistant wrote; those are found in the conversation before the images are put in
(`castlm.data.chat`) and carried over by aligning the two texts.
"""

from __future__ import annotations

import base64
import binascii
import copy
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from castlm.core.errors import InputError
from castlm.data.chat import Rendered, begin_of
from castlm.data.image_columns import BYTES, message_content
from castlm.data.tokens import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

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
        processor: as `castlm.models.opening.open_processor` gives it.
        assistant_only: only the tokens of the assistant count; see `castlm.data.chat`.
    """

    def __init__(self, processor: ProcessorMixin, assistant_only: bool = True) -> None:
        self._processor = copy.deepcopy(processor)  # a thread prepares batches while another evaluates
        self._tokenizer = self._processor.tokenizer
        self._encoder = Encoder(self._tokenizer, None, assistant_only)
        self._chat, self.eos = self._encoder.chat, self._encoder.eos
        known = self._tokenizer.get_vocab()
        names = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
        self._placeholders = {name: known[name] for name in names if name in known}

    def __call__(self, document: str) -> ImageTokens:
        """The tokens of a conversation, given as JSON, with an end-of-text behind them.

        Raises:
            InputError: as `Chat`; an image that cannot be read; a text that has more or fewer placeholders than there
                are images; or a processor that cannot take it, or changes more of the text than the images.
        """
        content = json.loads(document)
        sources = content.pop("images", [])
        plain = json.dumps(content)
        rendered, begin = self._chat(plain), begin_of(plain)
        if (count := sum(token in self._placeholders.values() for token in rendered.ids)) != len(sources):
            raise InputError(
                f"the conversation that begins {begin} has {len(sources)} images, and {count} tokens that "
                "stand for one in the text that its chat template makes: take them out of the text, or correct the "
                "template (chat_template_path)"
            )
        if not sources:
            return self._of(rendered, None)
        images = [open_image(source, begin) for source in sources]
        text = self._chat.text(plain)
        found, expanded = self._prepare(text, images, begin)
        ids = found["input_ids"][0].tolist()
        counts, end = self._counts(text, rendered, expanded, ids)
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
        ids = self._chat(json.dumps(content)).ids
        return [*(token for token in ids if token not in self._placeholders.values()), self.eos]

    @property
    def _name(self) -> str:
        return type(self._processor).__name__

    def _of(self, rendered: Rendered, images: ImageInputs | None) -> ImageTokens:
        ids, labels, _ = self._encoder.conversation(rendered)
        return ImageTokens(torch.from_numpy(ids).long(), torch.from_numpy(labels).long(), images)

    def _prepare(self, text: str, images: list[Image], begin: str) -> tuple[Mapping[str, Any], str]:
        """What the processor makes of a text and its images, and the text with the images put in."""
        watched = _Watched(self._tokenizer)
        self._processor.tokenizer = watched
        try:
            return prepare(self._processor, text, images, begin), watched.text
        finally:
            self._processor.tokenizer = self._tokenizer

    def _counts(self, text: str, rendered: Rendered, expanded: str, ids: list[int]) -> tuple[list[bool], int]:
        """Which tokens of the `expanded` text count, as those of the rendered `text` do, and where the last image ends.

        By characters: around an image, tokens may be merged otherwise than in the text alone.
        """
        before, after = (
            self._tokenizer(t, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for t in (text, expanded)
        )
        pieces = _align(text, expanded, tuple(self._placeholders))
        if before["input_ids"] != rendered.ids or after["input_ids"] != ids or pieces is None:
            raise InputError(
                f"{self._name} changes more of a conversation than its images, so that the tokens that count cannot "
                f"be told: its text has {len(rendered.ids)} tokens, and {len(ids)} with its images"
            )
        counts_at = bytearray(len(expanded))
        spans = [span for span, counts in zip(before["offset_mapping"], rendered.counts) if counts]
        for start, stop in spans:
            for begin, length, moved in pieces:
                for at in range(max(start, begin), min(stop, begin + length)):
                    counts_at[at + moved] = 1
        last_image = pieces[-1][0] + pieces[-1][2]
        end = next((n for n, (start, _) in enumerate(after["offset_mapping"]) if start >= last_image), len(ids))
        stand_for = set(self._placeholders.values())
        found = [any(counts_at[start:stop]) for start, stop in after["offset_mapping"]]
        return [counts and token not in stand_for for counts, token in zip(found, ids)], end


def prepare(processor: ProcessorMixin, text: str, images: Sequence[Image], begin: str) -> Mapping[str, Any]:
    """What the processor of a model makes of a text, which a chat template has rendered, and its images.

    Raises:
        InputError: it cannot; the message has the first words of the conversation, `begin`.
    """
    try:
        found: Mapping[str, Any] = processor(
            text=[text], images=list(images), return_tensors="pt", add_special_tokens=False
        )
    except Exception as error:  # a processor is a program, with errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        name = type(processor).__name__
        raise InputError(f"{name} cannot prepare the conversation that begins {begin}: {reason}") from error
    return found


class _Watched:
    """A tokenizer that remembers the text it is given, which a processor does not tell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.text = tokenizer, ""

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _align(text: str, expanded: str, placeholders: Sequence[str]) -> list[tuple[int, int, int]] | None:
    """Where the stretches of `text` between its images lie in `expanded`: begin, length and how far each is moved.

    None if they do not all lie there, in their order.
    """
    pieces, at = list[tuple[int, int, int]](), 0
    cuts = [match.span() for match in re.finditer("|".join(map(re.escape, placeholders)), text)]
    begins, ends = [0, *(stop for _, stop in cuts)], [*(start for start, _ in cuts), len(text)]
    for number, (begin, end) in enumerate(zip(begins, ends)):
        stretch, is_last = text[begin:end], number == len(cuts)
        start = len(expanded) - len(stretch) if is_last else expanded.find(stretch, at)
        if start < at or (number == 0 and start > 0) or not expanded.startswith(stretch, start):
            return None
        pieces.append((begin, len(stretch), start - begin))
        at = start + len(stretch) + (0 if is_last else 1)  # an image has a character at least
    return pieces


def open_image(source: str, begin: str) -> Image:
    """As `read_image`, of the conversation that begins with the words `begin`, which an error names too."""
    try:
        return read_image(source)
    except InputError as error:
        raise InputError(f"{error}; remove the row of the conversation that begins {begin}") from error


def read_image(source: str) -> Image:
    """An image, RGB, turned as its camera says.

    Args:
        source: a path, or bytes as `castlm.data.image_columns.collect_images` gives them.

    Raises:
        InputError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        file = io.BytesIO(base64.b64decode(source.removeprefix(BYTES))) if source.startswith(BYTES) else source
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        where = "in the dataset" if source.startswith(BYTES) else source
        reason = re.sub(r" <_io.*?>", " it", " ".join(str(error).split())[:200])
        raise InputError(f"cannot read the image {where}: {reason}") from error


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
