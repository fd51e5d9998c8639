"""Finds the columns of a row that hold its document: a text, a conversation, or prompt and completion.

The names of the columns are TRL's. A conversation is checked here, where its line is known, and travels on as JSON
until `castlm.data.chat` renders it with the template of a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from castlm.core.errors import InputError
from castlm.data.images.columns import IMAGE_COLUMNS, IMAGE_PART, collect_images, message_content
from castlm.data.options import TextOptions

ROLES = ("system", "developer", "user", "assistant", "tool")
_NEITHER = ("video", "videos", "audio", "audios")
"""Columns that would be lost without an error."""
_TEXT_COLUMNS = ("messages", "text")
"""Columns that hold a document by themselves; a dataset has one of them."""
CUT_COLUMN = "is_cut"
"""Column that `castlm sample` writes beside a text: true if `max_new_tokens` cut the text off."""
MOST_CHARACTERS = 16 << 20
"""Most characters of a row's text, times `document_limit`. Tokenizing takes some 40 times its size in memory."""
_IMAGES = '{"images": '
"""Prefix of the JSON of a conversation with images."""
_MESSAGE = "each with a role and its content"


class Kind(IntEnum):
    """The kind of a document. A dataset is of the largest kind among its documents."""

    TEXT = 0
    """Plain text."""
    CHAT = 1
    """A conversation, as JSON that `castlm.data.chat` reads."""
    WITH_EXTRA = 2
    """A conversation with tensors beside its tokens, such as images; see `castlm.data.extra`."""


class Document(NamedTuple):
    """A row as a document."""

    text: str
    """The JSON of a conversation, or the text itself; "" where the row is blank."""
    is_cut: bool = False
    """Whether a plain text was cut off, so that the end-of-text behind it does not count."""
    kind: Kind = Kind.TEXT


class Columns(NamedTuple):
    """The columns of a dataset that hold its documents."""

    form: Literal["text", "messages", "prompt"]
    name: str
    """Name of the column; "prompt" has its completion in the column `completion`."""
    images: tuple[str, ...] = ()
    """Columns that may hold the images of a conversation; the first of them with a value counts."""
    folder: Path | None = None
    """Base folder of relative image paths."""
    document_limit: float = 1.0
    refused: tuple[str, ...] = ()
    """Columns that would be lost without an error."""

    @property
    def is_chat(self) -> bool:
        """Whether a document is the JSON of a conversation instead of a text."""
        return self.form != "text"

    def kind_of(self, holds: Mapping[str, str]) -> Kind:
        """The kind of documents in a dataset with these columns; `holds` as for `find_columns`."""
        if not self.is_chat:
            return Kind.TEXT
        brings = any(holds.get(name, "NoneType") != "NoneType" for name in self.images)
        return Kind.WITH_EXTRA if brings else Kind.CHAT

    @property
    def read(self) -> tuple[str, ...]:
        """The columns to read for a document, as far as the dataset has them."""
        return (*self.text_columns, *self.images, *(() if self.is_chat else (CUT_COLUMN,)))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """`read` without images."""
        return (self.name, *(("completion",) if self.form == "prompt" else ()), *(("tools",) if self.is_chat else ()))

    def document(self, row: Mapping[str, Any], where: str, text_alone: bool = False) -> Document:
        """The document of a row.

        Args:
            where: file and line, for messages.
            text_alone: ignore images; the row may lack their columns.

        Raises:
            InputError: the row has no such column, or the column holds something else.
        """
        if self.name not in row:
            raise InputError(f"{where}: no column {self.name!r}; there are: {', '.join(row)[:400] or 'none'}")
        if beside := next((name for name in self.refused if row.get(name)), None):
            raise InputError(self.lost(beside, where))
        if self.is_chat:
            return self._conversation(row, where, text_alone)
        return Document(self._text(row[self.name], where), row.get(CUT_COLUMN) is True)

    def _text(self, value: Any, where: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise InputError(f"{where}: column {self.name!r} holds a {_type(value)}: strings are needed")
        return self._checked_text(value, where)

    def _conversation(self, row: Mapping[str, Any], where: str, text_alone: bool) -> Document:
        if self.form == "messages":
            messages = [] if row[self.name] is None else _checked(row[self.name], self.name, where)
            content: dict[str, Any] = {"messages": messages}
            if not messages:
                return Document("")
            if all(message["role"] != "assistant" for message in messages):
                raise InputError(f"{where}: no message of the assistant in the conversation: remove it, or add a reply")
        else:
            content = _prompt_and_completion(row, where)
            if not content:
                return Document("")
        if tools := row.get("tools"):
            content["tools"] = _tools(tools, where)
        if text_alone:
            text = self._checked_text(json.dumps(content, ensure_ascii=False), where)
            return Document(text, kind=Kind.WITH_EXTRA if IMAGE_PART in text else Kind.CHAT)
        listed = next((row[name] for name in self.images if row.get(name)), None)
        images = collect_images(_messages_of(content, listed, where), listed, self.folder, where)
        text = self._checked_text(json.dumps(content, ensure_ascii=False), where)
        if not images:
            return Document(text, kind=Kind.CHAT)
        return Document(f"{_IMAGES}{json.dumps(images)}, {text[1:]}", kind=Kind.WITH_EXTRA)

    def _checked_text(self, text: str, where: str) -> str:
        most = MOST_CHARACTERS * self.document_limit
        if len(text) > most:
            raise InputError(
                f"{where}: a text of {len(text):,} characters, more than {most:,.0f}: divide it, put it into a .txt "
                "file, which is read in pieces, or raise document_limit"
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: half a surrogate pair at character {error.start}: correct the line"
                ) from error
        return text

    def lost(self, column: str, where: str) -> str:
        """The error for an unread column that holds something."""
        if column in _TEXT_COLUMNS:
            return _ambiguous((column, self.name), where)
        if column in IMAGE_COLUMNS:
            what = "needs conversations, and this dataset has plain text: give messages, or"
        else:
            what = "is neither text nor images, which castlm cannot train on:"
        return f"{where}: the column {column!r} {what} name the column of the text with column to leave it out"


def text_length(document: str) -> int:
    """Number of characters of a document without its images."""
    if not document.startswith(_IMAGES):
        return len(document)
    begin = len(_IMAGES)
    _, end = json.JSONDecoder().raw_decode(document, begin)
    return len(document) - (end - begin)


def is_undecided(holds: Mapping[str, str], column: str | None) -> bool:
    """Whether a row is empty in every column that could hold its document, so that it does not show the type of others.

    Args:
        holds, column: as for `find_columns`.
    """
    names = [*_TEXT_COLUMNS, "prompt"] if column is None else [column]
    names += ["completion"] if "prompt" in names else []
    found = [holds[name] for name in names if name in holds]
    return bool(found) and all(kind == "NoneType" for kind in found)


def find_columns(holds: Mapping[str, str], options: TextOptions, where: str, folder: Path | None = None) -> Columns:
    """The columns of a dataset.

    Args:
        holds: the type of each column's values ("str", "list", "NoneType" or another), as `types_of` gives it for a row
            that is not `is_undecided`.
        options: `column` is the only column to use, without images; None finds `messages`, `prompt` with `completion`,
            or `text`, and images beside conversations.
        folder: base of relative image paths; None if there are no files.

    Raises:
        InputError: there is no such column, more than one could be meant, or the dataset has images, videos or audio
            beside a text and `column` is None.
    """
    found = _find_text(holds, options.column, where)._replace(document_limit=options.document_limit)
    if options.column is not None:
        return found
    others = tuple(name for name in _TEXT_COLUMNS if name != found.name)  # empty in the rows that were read so far
    if found.is_chat:
        found = found._replace(images=IMAGE_COLUMNS, folder=folder, refused=(*_NEITHER, *others))
    else:
        found = found._replace(refused=(*IMAGE_COLUMNS, *_NEITHER, *others))
    lost = [name for name in found.refused if holds.get(name, "NoneType") != "NoneType"]
    if lost:
        raise InputError(found.lost(lost[0], where))
    return found


def _find_text(holds: Mapping[str, str], column: str | None, where: str) -> Columns:
    names = ", ".join(holds)[:400] or "none"
    if column is not None:
        if column not in holds:
            raise InputError(f"{where}: no column {column!r}; there are: {names}")
        if column == "prompt" and "completion" in holds:
            return Columns("prompt", "prompt")
        return Columns("messages" if holds[column] == "list" or column == "messages" else "text", column)
    found = [Columns("messages", "messages")] if "messages" in holds else []
    found += [Columns("prompt", "prompt")] if "prompt" in holds and "completion" in holds else []
    found += [Columns("text", "text")] if "text" in holds else []
    found = [columns for columns in found if holds[columns.name] != "NoneType"] or found
    if not found:
        raise InputError(
            f"{where}: no column 'text'; there are: {names}: name the column with column; messages, and prompt with "
            "completion, are known too"
        )
    if len(found) > 1:
        raise InputError(_ambiguous([columns.name for columns in found], where))
    return found[0]


def _ambiguous(names: Sequence[str], where: str) -> str:
    return f"{where}: the columns {' and '.join(names)} could both be meant: choose one with column"


def types_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The type of each column of a row, for `find_columns`."""
    return {name: _type(value) for name, value in row.items()}


def _type(value: Any) -> str:
    return type(value).__name__


def _checked(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """The messages of a conversation, without keys that hold nothing."""
    if not isinstance(value, list):
        raise InputError(f"{where}: column {column!r} holds a {_type(value)}: a list of messages is needed, {_MESSAGE}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is a {_type(message)}: a conversation is a list of messages, {_MESSAGE}")
    message = {key: value for key, value in message.items() if value is not None}  # parquet fills up with nulls
    if "role" not in message:
        raise InputError(f"{where} has the keys {', '.join(message)[:200] or 'none'}: role and content are needed")
    role, content = message["role"], message.get("content", "")
    if role not in ROLES:
        raise InputError(f"{where} has the role {str(role)[:60]!r}: the roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        content = message["content"] = message_content(content, f"{where} ({role})")
    elif not isinstance(content, str):
        raise InputError(f"{where} ({role}) has a {_type(content)} as its content: text, or a list of parts, is needed")
    if isinstance(content, str) and not content.strip() and not message.get("tool_calls"):
        raise InputError(f"{where} ({role}) is empty: remove it, or the conversation")
    return message


def _prompt_and_completion(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = row["prompt"], row.get("completion")
    if prompt is None and completion is None:
        return {}
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise InputError(f"{where}: the completion is empty: remove the row")
        return {"prompt": prompt, "completion": completion}
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise InputError(
            f"{where}: prompt holds a {_type(prompt)} and completion a {_type(completion)}: both must be text, or both "
            "lists of messages"
        )
    prompt, completion = _checked(prompt, "prompt", where), _checked(completion, "completion", where)
    roles = [message["role"] for message in completion]
    if not prompt or roles != ["assistant"]:
        found = f"the roles {', '.join(roles) or 'none'}" if prompt else "no prompt"
        raise InputError(
            f"{where}: a completion is one message of the assistant after a prompt, not {found}: longer conversations "
            "go into messages"
        )
    return {"prompt": prompt, "completion": completion}


def _messages_of(content: Mapping[str, Any], listed: Any, where: str) -> list[dict[str, Any]]:
    """All messages of a row."""
    if isinstance(content.get("prompt"), str):
        if listed:
            raise InputError(f"{where}: images beside a prompt of plain text: give prompt and completion as messages")
        return []
    return [*content.get("messages", []), *content.get("prompt", []), *content.get("completion", [])]


def _tools(tools: Any, where: str) -> Sequence[Any]:
    """The schemas of a `tools` column, possibly as JSON text, because parquet would merge the types of different
    schemas.
    """
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise InputError(f"{where}: tools holds no list of JSON schemas: correct it, or remove the column")
    return found
