"""Calls of tools in the text of a model.

Qwen 2.5, Qwen 3, Hermes and SmolLM 3 are told of tools by their chat templates, and write each call as JSON between two
marks [1], which the templates name:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Other families have forms of their own, which castlm does not read: their requests with tools are refused.

[1] Hermes function calling, github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

BEGIN, END = "<tool_call>", "</tool_call>"


def has_form(template: str) -> bool:
    """Whether a chat template tells the model to call tools in the form that is read here."""
    return BEGIN in template and END in template and "tools" in template


@dataclass(frozen=True)
class Call:
    """A call of a tool, with its arguments as JSON."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, object]:
        """The call in the words of the API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """Divides text as it comes into content and calls; text between marks that is no call is content."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._held = ""

    def put(self, text: str, is_last: bool = False) -> str:
        """Adds text; returns the content that can be no part of a call. Calls join `calls`.

        Args:
            is_last: no further text comes.
        """
        self._held += text
        said = ""
        while True:
            before, mark, after = self._held.partition(BEGIN)
            if not mark:
                keep = 0 if is_last else _overlap(self._held, BEGIN)
                said += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            said, self._held = said + before, mark + after
            inside, end, rest = after.partition(END)
            if not end and not is_last:
                break
            call = _call_of(inside)
            if call is None:
                said += mark + inside + end
            else:
                self.calls.append(call)
            self._held = rest
        if not self.calls:
            return said
        return said.strip()  # the lines between calls


def _overlap(text: str, mark: str) -> int:
    """The characters at the end of a text that may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _call_of(text: str) -> Call | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{uuid.uuid4().hex}", call["name"], json.dumps(arguments, ensure_ascii=False))
