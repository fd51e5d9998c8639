"""Conversations with images: the row that holds them, and what the processor of a vision-language model makes of them.

A row is checked where file and line are known; its images are decoded when a batch needs them, in a process with
limits. A processor replaces each image by a run of tokens and makes the tensors that the vision tower reads. It does
not tell which tokens the assistant wrote: `castlm.data.chat` finds them before the images are inserted, and aligning
the two texts carries them over.

The tensors of a conversation are a `castlm.data.extra.Extra`; nothing outside this file knows what they show.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from castlm.core.errors import InputError, one_line
from castlm.data.chat import Chat, Rendered, messages_of
from castlm.data.extra import Extra
from castlm.models.architecture import is_vision_language
from castlm.models.io import PROCESSOR_FILES, as_input_error, load_config, quiet
from castlm.models.locate import find
from castlm_runtime.limited import CallError, LimitedProcess
from castlm_runtime.reading import check_regular, user_path

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_COLUMNS = ("images", "image")
BYTES = "data:image;base64,"
"""Prefix of an image that is given by its bytes instead of its path."""
IMAGE_PART = '{"type": "image"'
"""Beginning of an image part in the JSON of a conversation."""
_PLACEHOLDER = "<image>"
_OF_TEXT = ("input_ids", "attention_mask")
MAX_PIXELS = 256_000_000
"""Most pixels of all images of a conversation, which are in memory together."""
MAX_MEMORY = 1 << 30
"""Bytes that decoding an image may take. A file may hold 10,000 times its size, or ask its decoder for more."""
MAX_SECONDS = 10.0
"""Seconds of processor time to decode an image: a JPEG of a megabyte may have thousands of scans."""
_DECODER = LimitedProcess("castlm.data.image_worker:decode", "the images")


# ------------------------------------------------------------------------------------------------------------ rows


def collect_images(messages: Sequence[dict[str, Any]], listed: Any, folder: Path | None) -> list[str]:
    """Takes the images out of `messages`, leaving parts that mark the place of each.

    In plain text messages `<image>` stands for an image, as in LLaVA's data; without it, the images go before the text
    of the user's first message, as in TRL.

    Args:
        listed: the value of the column of images.
        folder: base of relative paths; None if there are no files.

    Returns:
        Each image in order: the absolute path of a file, or its bytes as `BYTES` and base64.

    Raises:
        InputError: more or fewer images than parts, or an image that is not there.
    """
    in_parts = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    parts = [part for part in itertools.chain(*in_parts) if part["type"] == "image"]
    inline = [part.pop("image") for part in parts if "image" in part]
    if not isinstance(listed, list):
        listed = [] if listed is None else [listed]
    images = listed or inline
    if images and not parts:
        parts = _cut_at_placeholders(messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if images and not parts and first is not None:
        parts = [{"type": "image"} for _ in images]
        first["content"] = [*parts, {"type": "text", "text": first.get("content", "")}]
    if len(images) != len(parts) or (inline and listed):
        count = len(listed) + len(inline)
        raise InputError(
            f"{count} images for {len(parts)} places in the messages: give one for each, all in the messages "
            "or all beside them"
        )
    return [_source(image, folder, f"image {number}") for number, image in enumerate(images, 1)]


def _cut_at_placeholders(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns each `<image>` in the texts of `messages` into a part; returns these parts."""
    parts: list[dict[str, Any]] = []
    for message in messages:
        texts = str(message.get("content", "")).split(_PLACEHOLDER)
        if len(texts) > 1:
            cut: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
            for text in texts[1:]:
                parts.append({"type": "image"})
                cut += [parts[-1], {"type": "text", "text": text}]
            message["content"] = [part for part in cut if part["type"] == "image" or part["text"]]
    return parts


def _source(image: Any, folder: Path | None, name: str) -> str:
    if isinstance(image, dict):  # as `datasets` stores images in parquet
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return BYTES + base64.b64encode(image).decode()
    if isinstance(image, str) and image.startswith("data:image") and ";base64," in image[:64]:
        return BYTES + image.split(";base64,", 1)[1]
    if isinstance(image, str) and image and "://" not in image[:16]:
        path = user_path(image) if folder is None else folder / user_path(image)
        if path.is_file():
            return str(path.absolute())
    raise InputError(
        f"{name} is {str(image)[:200]!r}: give the path of a file, relative to the folder of the dataset; images are "
        "not downloaded"
    )


# -------------------------------------------------------------------------------------------------------- processor


def open_processor(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> ProcessorMixin:
    """The processor of a vision-language model, with `tokenizer` in the place of its own.

    Args:
        tokenizer: the model's; without a chat template it gets the processor's.
    """
    where = find(name, revision)
    config = load_config(where, trust_remote_code)
    processor = None
    if is_vision_language(config):
        with quiet(where), as_input_error(where):
            processor = AutoProcessor.from_pretrained(
                where.target, revision=where.revision, trust_remote_code=trust_remote_code
            )
    if not isinstance(processor, ProcessorMixin):
        raise InputError(
            f"{where} is a {config.model_type}, which reads no images, or lacks {' or '.join(PROCESSOR_FILES[:2])}: "
            "give a vision-language model, or leave the images out (by naming the column of a dataset's conversations)"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    processor.tokenizer = tokenizer
    return processor


class ImageReader:
    """Tokens and images of the conversations that `castlm.data.columns` checks.

    Args:
        processor: as `open_processor` gives it.
        assistant_only: only the tokens of the assistant count; see `castlm.data.chat`.
        document_limit: factor on `MAX_PIXELS`, `MAX_MEMORY` and `MAX_SECONDS`.
    """

    def __init__(self, processor: ProcessorMixin, assistant_only: bool, document_limit: float = 1.0) -> None:
        self._processor = copy.deepcopy(processor)  # a thread prepares batches while another evaluates
        self._tokenizer = self._processor.tokenizer
        self._chat = Chat(self._tokenizer, assistant_only, document_limit)
        self._document_limit = document_limit
        known = self._tokenizer.get_vocab()
        names = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
        self._placeholders = {name: known[name] for name in names if name is not None and name in known}

    def __call__(self, document: str, sources: Sequence[str]) -> tuple[Rendered, Extra | None]:
        """The tokens of a conversation, given as JSON, and what its images add to them; None without images.

        The tokens that stand for an image never count.

        Raises:
            InputError: as `Chat`; an image that cannot be read; a text that has more or fewer placeholders than there
                are images; or a processor that cannot take it, or changes more of the text than the images.
        """
        rendered = self._chat(document)
        if (count := sum(token in self._placeholders.values() for token in rendered.ids)) != len(sources):
            raise InputError(
                f"it has {len(sources)} images, and {count} tokens that stand for one in the text that its chat "
                "template makes: take them out of the text, or correct the template (chat_template_path)"
            )
        if not sources:
            return rendered, None
        images = open_images(sources, self._document_limit)
        content = json.loads(document)
        text = self._chat.render(messages_of(content), content.get("tools"))
        watched = self._processor.tokenizer = _Watched(self._tokenizer)
        try:
            found = prepare(self._processor, text, images)
        finally:
            self._processor.tokenizer = self._tokenizer
        ids = found["input_ids"][0].tolist()
        counts, end = self._counts(text, rendered, watched.text, ids)
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and name not in _OF_TEXT}
        by_token = {name: value[0] for name, value in tensors.items() if value.shape == (1, len(ids))}
        by_item = {name: value for name, value in tensors.items() if name not in by_token}
        return Rendered(ids, counts, rendered.is_rendered), Extra(by_item, by_token, end)

    def text_alone(self, document: str) -> list[int]:
        """The token ids of a conversation without its images."""
        content = json.loads(document)
        for message in messages_of(content):
            if isinstance(message.get("content"), list):
                message["content"] = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        ids = self._chat(json.dumps(content)).ids
        return [token for token in ids if token not in self._placeholders.values()]

    def _counts(self, text: str, rendered: Rendered, expanded: str, ids: list[int]) -> tuple[list[bool], int]:
        """Whether each token of the `expanded` text counts, as it does in `rendered`, and the end of the last image.

        Compares characters, because tokens around an image may merge differently than in the text alone.
        """
        before, after = (
            self._tokenizer(t, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for t in (text, expanded)
        )
        pieces = _align(text, expanded, tuple(self._placeholders))
        if before["input_ids"] != rendered.ids or after["input_ids"] != ids or pieces is None:
            raise InputError(
                f"{type(self._processor).__name__} changes more of a conversation than its images, so that the tokens "
                f"that count cannot be told: its text has {len(rendered.ids)} tokens, and {len(ids)} with its images"
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


def prepare(processor: ProcessorMixin, text: str, images: Sequence[Image]) -> Mapping[str, Any]:
    """The tensors that a processor makes from a text, which a chat template has rendered, and its images.

    An error of the processor becomes an `InputError`.
    """
    try:
        found: Mapping[str, Any] = processor(
            text=[text], images=list(images), return_tensors="pt", add_special_tokens=False
        )
    except Exception as error:  # a processor is a program, with errors of many types
        raise InputError(
            f"{type(processor).__name__} cannot prepare the text and its images: {one_line(error)}"
        ) from error
    return found


def encode_image_prompt(
    processor: ProcessorMixin, prompt: str, paths: Sequence[str], raw: bool, document_limit: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Encodes a prompt about images: token ids (1, num_tokens), and the further arguments of the model's forward.

    Args:
        processor: as `open_processor` gives it.
        paths: the images, which come before the text in the user's turn.
        raw: take the prompt as it is, with its own image placeholders.
    """
    images = open_images(paths, document_limit)
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    parts += [{"type": "text", "text": prompt}] if prompt else []
    text = prompt if raw else Chat(processor.tokenizer).render([{"role": "user", "content": parts}], reply=True)
    found = dict(prepare(processor, text, images))
    return found.pop("input_ids"), {k: v for k, v in found.items() if isinstance(v, Tensor) and k != "attention_mask"}


class _Watched:
    """Wraps a tokenizer to record the text that a processor gives it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.text = tokenizer, ""

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _align(text: str, expanded: str, placeholders: Sequence[str]) -> list[tuple[int, int, int]] | None:
    """The stretches of `text` between its images: begin, length, and shift in `expanded`.

    None if `expanded` does not contain all of them in this order.
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


def open_images(sources: Sequence[str], document_limit: float = 1.0) -> list[Image]:
    """The images of a conversation, as RGB, rotated by their EXIF orientation.

    Each is decoded in a process of its own, whose memory and time are limited.

    Args:
        sources: paths, or bytes as `collect_images` gives them.
        document_limit: factor on the limits.

    Raises:
        InputError: an image cannot be read, is in no format of `castlm.data.image_worker.FORMATS`, takes more than
            `MAX_MEMORY` or `MAX_SECONDS`, or they have more than `MAX_PIXELS` together.
    """
    from PIL import Image

    images: list[Image.Image] = []
    left = int(MAX_PIXELS * document_limit)
    for source in sources:
        is_inline = source.startswith(BYTES)
        try:
            size, pixels = _DECODER.call(
                {"path": None if is_inline else os.path.abspath(check_regular(source)), "most_pixels": left},
                source.removeprefix(BYTES).encode() if is_inline else b"",
                num_bytes=int(MAX_MEMORY * document_limit),
                seconds=MAX_SECONDS * document_limit,
            )
        except (CallError, MemoryError, InputError) as error:
            where = "in the dataset" if is_inline else source
            reason = re.sub(r" <_io.*?>", " it", one_line(error))
            if isinstance(error, MemoryError):
                reason = f"it takes more than {MAX_MEMORY * document_limit / 2**30:g} GiB to decode; see document_limit"
            raise InputError(f"cannot read the image {where}: {reason}; correct or remove it") from error
        images.append(Image.frombytes("RGB", tuple(size), pixels))
        left -= size[0] * size[1]
    return images
