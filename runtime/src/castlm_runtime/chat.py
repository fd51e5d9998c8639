"""Conversations as text, by the chat template of a tokenizer; `castlm` builds on it the tokens that are trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from castlm_runtime.errors import InputError, one_line
from castlm_runtime.limited import OutOfTimeError
from castlm_runtime.templates import RenderedText, render_template

_PROBE = "castlm"
"""A probe that shows whether a template renders message content given as a string."""
TEMPLATE_BYTES = 512 << 20
"""Most memory for rendering: a chat template is a program by the model's author and may build any text."""
TEMPLATE_SECONDS = 10.0
"""Most processor time for rendering: the program may never end."""


class ChatTemplate:
    """Renders messages by the chat template of a tokenizer, of this package or of transformers.

    Args:
        tokenizer: has `get_chat_template`, `special_tokens_map` and `name_or_path`.
        document_limit: factor on `TEMPLATE_BYTES` and `TEMPLATE_SECONDS`.
    """

    def __init__(self, tokenizer: Any, document_limit: float = 1.0) -> None:
        self._tokenizer = tokenizer
        self._template_bytes = round(min(TEMPLATE_BYTES * document_limit, 1e18))  # no infinity
        self._template_seconds = TEMPLATE_SECONDS * document_limit
        self._reads_text: bool | None = None  # whether the template does, or lists of parts alone

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        *,
        reply: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders messages by the chat template; with `reply`, also the header that asks the assistant for an answer.

        Args:
            messages: each with a role and its content, a text or a list of parts of type text or image.
            tools: JSON schemas.
            variables: more variables of the template.
        """
        return self._rendered(messages, tools, reply=reply, variables=variables).text

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        *,
        reply: bool = False,
        marks: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedText:
        self.template(tools)
        try:
            return self._apply(self._as_read(messages), tools, reply=reply, marks=marks, variables=variables)
        except Exception as error:
            raise self._refused(messages, error) from error

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a template for conversations without tools."""
        with contextlib.suppress(InputError):
            return bool(self.template())
        return False

    def template(self, tools: Any = None) -> str:
        """The template for conversations with or without tools. Raises `InputError` if there is none."""
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise InputError(
                f"the tokenizer {self._tokenizer.name_or_path} has no chat template, which conversations need: give "
                "one with chat_template_path"
            ) from error

    def _as_read(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """`messages` with each text as a list of parts, if the template reads only those: some vision-language
        templates drop plain texts without an error.
        """
        if self._reads_text is None:
            as_text, as_parts = self._probe(_PROBE), self._probe([{"type": "text", "text": _PROBE}])
            self._reads_text = _PROBE in as_text or _PROBE not in as_parts or "{'" in as_parts  # a list, printed
        if self._reads_text:
            return list(messages)
        return [
            {**message, "content": [{"type": "text", "text": content}]}
            if isinstance(content := message.get("content"), str)
            else message
            for message in messages
        ]

    def _probe(self, content: Any) -> str:
        try:
            return self._apply([{"role": "user", "content": content}]).text
        except OutOfTimeError:
            raise
        except Exception:  # of any type; rendering the conversation raises it again
            return ""

    def _apply(
        self,
        messages: list[Mapping[str, Any]],
        tools: Any = None,
        *,
        reply: bool = False,
        marks: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedText:
        if not messages:
            raise InputError("a conversation without a message")
        return render_template(
            self.template(tools),
            messages,
            tools=tools,
            reply=reply,
            marks=marks,
            variables={**self._tokenizer.special_tokens_map, **(variables or {})},
            num_bytes=self._template_bytes,
            seconds=self._template_seconds,
        )

    def _refused(self, messages: Sequence[Mapping[str, Any]], error: Exception) -> InputError:
        roles = ", ".join(str(message["role"]) for message in messages[:6])
        reason = one_line(error)
        if isinstance(error, MemoryError):
            reason = f"it takes more than {self._template_bytes >> 20} MiB of memory; see document_limit"
        return InputError(f"the chat template cannot render the messages (roles {roles}): {reason}")
