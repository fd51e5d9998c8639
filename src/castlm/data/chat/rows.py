"""Checks the conversation in a row, where file and line are known. It travels on as JSON until a template renders it.

The names of the columns are TRL's: `messages`, or `prompt` with `completion`, and `tools` beside either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from castlm.core.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SOURCES = ("image", "path", "url")
"""Keys of a message part that may hold its image."""


def conversation(row: Mapping[str, Any], column: str, where: str, *, has_completion: bool) -> dict[str, Any]:
    """The conversation of a row: `messages`, or `prompt` and `completion`, with `tools`; empty if the row is blank.

    Args:
        column: the column of messages, or of a prompt whose completion is in the column `completion`.
        where: file and line, for messages.

    Raises:
        InputError: the row holds something else.
    """
    if has_completion:
        content = _prompt_and_completion(row[column], row.get("completion"), where)
    else:
        messages = _messages(row[column] or [], column, where)
        if messages and all(message["role"] != "assistant" for message in messages):
            raise InputError(f"{where}: no message of the assistant in the conversation: remove it, or add a reply")
        content = {"messages": messages} if messages else {}
    if content and (tools := row.get("tools")):
        content["tools"] = _tools(tools, where)
    return content


def messages_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All messages of a conversation; none where prompt and completion are plain text."""
    if isinstance(content.get("prompt"), str):
        return []
    return [*content.get("messages", []), *content.get("prompt", []), *content.get("completion", [])]


def _prompt_and_completion(prompt: Any, completion: Any, where: str) -> dict[str, Any]:
    if prompt is None and completion is None:
        return {}
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and isinstance(completion, list) and prompt:
        prompt, completion = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
        if [message["role"] for message in completion] == ["assistant"]:
            return {"prompt": prompt, "completion": completion}
    raise InputError(
        f"{where}: prompt is {_shown(prompt)} and completion {_shown(completion)}: both must be text, or the prompt "
        "messages and the completion one message of the assistant; longer conversations go into messages"
    )


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    """The messages of a conversation, without keys that hold nothing."""
    if not isinstance(value, list):
        raise InputError(f"{where}: column {column!r} is {_shown(value)}: a list of messages is needed")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, 1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    content = found.get("content", "")
    if found.get("role") not in ROLES or not isinstance(content, str | list):
        raise InputError(
            f"{where} is {_shown(message)}: it needs a role ({', '.join(ROLES)}) and a content, text or a list of parts"
        )
    if isinstance(content, list):
        parts = [_part(part, where) for part in content]
        is_text = all(part["type"] == "text" for part in parts)
        content = found["content"] = "".join(part["text"] for part in parts) if is_text else parts
    if isinstance(content, str) and not content.strip() and not found.get("tool_calls"):
        raise InputError(f"{where} ({found['role']}) is empty: remove it, or the conversation")
    return found


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message: a text, or an image with its source as `image`, if it is given here."""
    found = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if found.get("type") == "text" and isinstance(found.get("text"), str):
        return {"type": "text", "text": found["text"]}
    if found.get("type") == "image":
        source = next((found[key] for key in _SOURCES if key in found), None)
        return {"type": "image"} if source is None else {"type": "image", "image": source}
    raise InputError(f"{where} has the part {_shown(part)}: a part is of type text, with a text, or of type image")


def _tools(tools: Any, where: str) -> list[Any]:
    """The JSON schemas of tools, possibly as text, because parquet would merge the types of different schemas."""
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise InputError(f"{where}: tools is {_shown(tools)}: give a list of JSON schemas, or remove the column")
    return found


def _shown(value: Any) -> str:
    """The beginning of a value, in one line."""
    return json.dumps(value, ensure_ascii=False, default=str)[:100]
