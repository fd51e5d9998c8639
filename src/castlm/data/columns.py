"""Finds the columns of a row that hold its document: a text, a conversation, or prompt and completion."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from castlm.core.errors import InputError
from castlm.data.chat import conversation, messages_of
from castlm.data.images import IMAGE_COLUMNS, IMAGE_PART, collect_images
from castlm.data.options import TextOptions

_FORMS = ("messages", "prompt", "text")
"""Columns that hold a document; a dataset has one of them, and `completion` beside `prompt`."""
_NEITHER = ("video", "videos", "audio", "audios")
"""Columns that castlm does not read; nothing would tell that they are lost."""
CUT_COLUMN = "is_cut"
"""Column that `castlm sample` writes beside a text: true if `max_new_tokens` cut the text off."""
MAX_CHARACTERS = 16 << 20
"""Most characters of a row's text, times `document_limit`. Tokenizing takes some 40 times its size in memory."""


class Kind(IntEnum):
    """The kind of a document. A dataset is of the largest kind among its documents."""

    TEXT = 0
    """Plain text."""
    CHAT = 1
    """A conversation, as JSON that `castlm.data.chat` renders."""
    WITH_EXTRA = 2
    """A conversation with tensors beside its tokens, such as images; see `castlm.data.images`."""


Position = int | dict[str, Any] | None
"""A place in the order of documents, as plain JSON; None is the first."""


class Document(NamedTuple):
    """A document, or a piece of a very long one."""

    text: str
    """The text, or the JSON of a conversation, which `castlm.data.chat` renders; "" where the row is blank."""
    is_cut: bool = False
    """Whether a plain text was cut off, so that the end-of-text behind it does not count."""
    kind: Kind = Kind.TEXT
    extra: tuple[str, ...] = ()
    """The images of a conversation: the path or the bytes of each."""
    first: bool = True
    """Whether it is the first piece of its document."""
    last: bool = True
    """Whether it is the last piece of its document."""
    position: Position = None
    """The `position` with which `Documents.pieces` starts here again."""


class Columns(NamedTuple):
    """The columns of a dataset that hold its documents."""

    name: str
    """Name of the column."""
    is_chat: bool
    """Whether a document is a conversation instead of a text."""
    has_completion: bool = False
    """Whether a document is a prompt with the completion in the column `completion`."""
    extra: tuple[str, ...] = ()
    """Columns that may hold the images of a conversation; the first of them with a value counts."""
    folder: Path | None = None
    """Base folder of relative image paths."""
    refused: tuple[str, ...] = ()
    """Columns that would be lost without an error."""
    document_limit: float = 1.0

    def kind_of(self, names: Collection[str]) -> Kind:
        """The kind of documents in a dataset whose columns `names` hold something."""
        if not self.is_chat:
            return Kind.TEXT
        return Kind.WITH_EXTRA if any(name in names for name in self.extra) else Kind.CHAT

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns to read for a document, as far as the dataset has them; `extra` holds those of its images."""
        if not self.is_chat:
            return (self.name, CUT_COLUMN)
        return (self.name, "tools", "completion") if self.has_completion else (self.name, "tools")

    def document(self, row: Mapping[str, Any], text_alone: bool = False) -> Document:
        """The document of a row; with `text_alone`, without its images, whose columns may be missing."""
        if self.name not in row:
            _refuse_without(self.name, row)
        self.check_beside(row)
        if not self.is_chat:
            text = row[self.name]
            if not isinstance(text, str | None):
                raise InputError(f"column {self.name!r} holds a {type(text).__name__}: strings are needed")
            return Document(self._checked(text or ""), row.get(CUT_COLUMN) is True)
        content = conversation(row, self.name, has_completion=self.has_completion)
        if not content:
            return Document("")
        extra: tuple[str, ...] = ()
        if not text_alone:
            listed = next((row[name] for name in self.extra if row.get(name)), None)
            extra = tuple(collect_images(messages_of(content), listed, self.folder))
        text = self._checked(json.dumps(content, ensure_ascii=False))
        has_images = IMAGE_PART in text if text_alone else bool(extra)
        return Document(text, kind=Kind.WITH_EXTRA if has_images else Kind.CHAT, extra=extra)

    def _checked(self, text: str) -> str:
        most = MAX_CHARACTERS * self.document_limit
        if len(text) > most:
            raise InputError(
                f"a text of {len(text):,} characters, more than {most:,.0f}: divide it, put it into a .txt "
                "file, which is read in pieces, or raise document_limit"
            )
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"half a surrogate pair at character {error.start}: correct it") from error
        return text

    def check_beside(self, row: Mapping[str, Any]) -> None:
        """Refuses a column beside the document that holds something and would not be read."""
        for column in self.refused:
            if row.get(column):
                what = "needs conversations" if column in IMAGE_COLUMNS else "is neither text nor images"
                what = f"could be meant as well as {self.name!r}" if column in _FORMS else what
                raise InputError(f"the column {column!r} {what}: name the column of the text with column")


def find_columns(row: Mapping[str, Any], options: TextOptions, folder: Path | None = None) -> Columns | None:
    """The columns of a dataset, found by a row; None if the row holds nothing in any that could be the document's.

    Args:
        options: `column` is the only column to use, without images; None finds `messages`, `prompt` with `completion`,
            or `text`, and images beside conversations.
        folder: base of relative image paths; None if there are no files.

    Raises:
        InputError: there is no such column. Columns beside it that would be lost are refused by `check_beside`.
    """
    has_pair = "completion" in row
    forms = [options.column] if options.column is not None else [n for n in _FORMS if n != "prompt" or has_pair]
    holds = {form: row[form] is not None for form in forms if form in row}
    if not holds:
        _refuse_without(options.column or "text", row)
    if "prompt" in holds:
        holds["prompt"] |= row.get("completion") is not None
    name = next((form for form, is_held in holds.items() if is_held), None)
    if name is None:
        return None
    is_pair = name == "prompt" and has_pair
    is_chat = is_pair or isinstance(row[name], list) or name == "messages"
    limit = options.document_limit
    if options.column is not None:
        return Columns(name, is_chat, is_pair, folder=folder, document_limit=limit)
    images, refused = (IMAGE_COLUMNS, _NEITHER) if is_chat else ((), (*IMAGE_COLUMNS, *_NEITHER))
    others = (form for form in forms if form != name)  # empty in the rows that were read so far
    return Columns(name, is_chat, is_pair, images, folder, (*refused, *others), limit)


def _refuse_without(name: str, columns: Mapping[str, Any]) -> NoReturn:
    names = ", ".join(columns)[:400] or "none"
    raise InputError(
        f"no column {name!r}; there are: {names}: name the column of the text with column; messages, and "
        "prompt with completion, are known too"
    )
