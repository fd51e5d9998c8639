"""Renders chat templates in a process of its own, with a limit on its memory and on its time.

A chat template is a program by the model's author. It may build a text of any length, or never end, and a single
operation on large integers takes hours inside Python, where no thread can stop it. One process renders for all
conversations of this one. It starts with the first, and again after a rendering that had to be ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from castlm_runtime.limited import LimitedProcess

_RENDERER = LimitedProcess("castlm_runtime.template_worker:render", "the chat template")


class RenderedText(NamedTuple):
    """A conversation as text, and the spans of characters inside the generation marks of the template."""

    text: str
    spans: list[tuple[int, int]]


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any,
    reply: bool,
    marks: bool,
    variables: Mapping[str, Any],
    num_bytes: int,
    seconds: float,
) -> RenderedText:
    """Renders messages as transformers does.

    Args:
        template: a Jinja template.
        messages: each with a role and its content, a text or a list of parts; what is no JSON becomes a placeholder.
        tools: JSON schemas, or None.
        reply: add the header that asks the assistant for an answer.
        marks: find the generation marks.
        variables: more variables of the template, such as the special tokens.
        num_bytes: most memory.
        seconds: most processor time.

    Raises:
        CallError, OutOfTimeError, MemoryError, InputError: as `LimitedProcess.call`.
    """
    request = {
        **variables,
        "messages": messages,
        "tools": tools,
        "documents": None,
        "template": template,
        "add_generation_prompt": reply,
        "marks": marks,
    }
    (text, spans), _ = _RENDERER.call(request, num_bytes=num_bytes, seconds=seconds)
    return RenderedText(text, [(begin, end) for begin, end in spans])


def start() -> None:
    """Starts the process, so that the first rendering does not wait for it."""
    _RENDERER.start()
