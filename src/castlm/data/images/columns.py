"""Finds the images of a conversation: the message part that stands for each, and its file or bytes.

They are checked here, where file and line are known. `castlm.data.images.reader` opens them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import user_path

IMAGE_COLUMNS = ("images", "image")
BYTES = "data:image;base64,"
"""Prefix of an image that is given by its bytes instead of its path."""
IMAGE_PART = '{"type": "image"'
"""Beginning of an image part in the JSON of a conversation."""
_PLACEHOLDER = "<image>"


def collect_images(messages: Sequence[dict[str, Any]], listed: Any, folder: Path | None, where: str) -> list[str]:
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
    parts = [part for message in messages for part in _parts(message) if part["type"] == "image"]
    inline = [part.pop("image") for part in parts if "image" in part]
    images = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if inline and (images or len(inline) != len(parts)):
        raise InputError(f"{where}: some images are in the messages and some are not: give all of them in one place")
    images = images or inline
    if images and not parts:
        parts = _cut_at_placeholders(messages)
    first = next((message for message in messages if message["role"] == "user"), None)
    if images and not parts and first is not None:
        parts = [{"type": "image"} for _ in images]
        first["content"] = [*parts, {"type": "text", "text": first.get("content", "")}]
    if len(images) != len(parts):
        raise InputError(f"{where}: {len(images)} images for {len(parts)} places in the messages: give one for each")
    return [_source(image, folder, f"{where}: image {number}") for number, image in enumerate(images, 1)]


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


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content", "")
    return content if isinstance(content, list) else []


def _source(image: Any, folder: Path | None, where: str) -> str:
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
        f"{where} is {str(image)[:200]!r}: give the path of a file, relative to the folder of the dataset; images are "
        "not downloaded"
    )
