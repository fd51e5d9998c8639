"""Conversations: checks the rows that hold them, renders them, and finds the tokens that the assistant wrote.

The names of the columns are TRL's: `messages`, or `prompt` with `completion`, and `tools` beside either. A row is
checked where file and line are known; the conversation travels on as JSON until a tokenizer's chat template renders it.

Where the template marks the assistant's tokens with `{% generation %}`, the marks decide. Otherwise the conversation is
rendered twice more, up to the assistant's turn with the header that asks for a reply, and up to the end of the turn.
Both texts must be prefixes of the whole; the difference is the turn. A template that renders a turn differently once
others follow (Qwen3 drops its reasoning) is refused, because the shorter texts then do not locate the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from castlm.core.errors import InputError
from castlm_runtime.chat import ChatTemplate
from castlm_runtime.reading import parse_json, read_text, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
_SOURCES = ("image", "path", "url")
"""Keys of a message part that may hold its image."""
_STAND_IN = 9041735286
"""Replaces the text of a message, with its number added, to see whether a template renders it."""
MAX_MESSAGES = 512
"""Most messages of a conversation without generation marks, whose turns are each rendered with all turns before."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


# ------------------------------------------------------------------------------------------------------------ rows


def conversation(row: Mapping[str, Any], column: str, *, has_completion: bool) -> dict[str, Any]:
    """The conversation of a row: `messages`, or `prompt` and `completion`, with `tools`; empty if the row is blank.

    Args:
        column: the column of messages, or of a prompt whose completion is in the column `completion`.
    """
    content: dict[str, Any] = {}
    prompt, completion, tools = row[column], row.get("completion"), row.get("tools")
    if not has_completion:
        content = {"messages": _messages(prompt)} if prompt else {}
        if content and all(message["role"] != "assistant" for message in content["messages"]):
            raise InputError("no message of the assistant in the conversation: remove it, or add a reply")
    elif isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        content = {"prompt": prompt, "completion": completion}
    elif prompt is not None or completion is not None:
        if isinstance(prompt, list) and isinstance(completion, list) and prompt:
            content = {"prompt": _messages(prompt), "completion": _messages(completion)}
        if not content or [message["role"] for message in content["completion"]] != ["assistant"]:
            raise InputError(
                f"prompt is {_shown(prompt)} and completion {_shown(completion)}: both must be text, or the "
                "prompt messages and the completion one message of the assistant; longer conversations go into messages"
            )
    if content and tools:
        # Text is read as JSON, because parquet would merge the types of different schemas.
        if isinstance(tools, str):
            tools = parse_json(tools, f"tools is {_shown(tools)}, which")
        content["tools"] = tools
        if not isinstance(tools, list):
            raise InputError(f"tools is {_shown(tools)}: give a list of JSON schemas, or remove the column")
    return content


def messages_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All messages of a conversation; none where prompt and completion are plain text."""
    if isinstance(content.get("prompt"), str):
        return []
    return [*content.get("messages", []), *content.get("prompt", []), *content.get("completion", [])]


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, without keys that hold nothing; several parts of text become one text."""
    messages = []
    for number, given in enumerate(value if isinstance(value, list) else [value], 1):
        message = {key: held for key, held in given.items() if held is not None} if isinstance(given, dict) else {}
        content = message.get("content", "")
        if isinstance(content, list):
            parts = [_part(part) for part in content]
            is_text = all(part is not None and part["type"] == "text" for part in parts)
            content = message["content"] = "".join(part["text"] for part in parts if part) if is_text else parts
        if isinstance(content, list):
            has_content = None not in content
        else:
            has_content = isinstance(content, str) and bool(content.strip() or message.get("tool_calls"))
        if message.get("role") not in ROLES or not has_content:
            raise InputError(
                f"message {number} is {_shown(given)}: it needs a role ({', '.join(ROLES)}) and a content: a "
                "text that is not blank, or a list of parts of type text, with a text, or of type image"
            )
        messages.append(message)
    return messages


def _part(part: Any) -> dict[str, Any] | None:
    """A part of a message: a text, or an image with its source as `image`, if it is given here; None for another."""
    found = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if found.get("type") == "text" and isinstance(found.get("text"), str):
        return {"type": "text", "text": found["text"]}
    if found.get("type") == "image":
        source = next((found[key] for key in _SOURCES if key in found), None)
        return {"type": "image"} if source is None else {"type": "image", "image": source}
    return None


def _shown(value: Any) -> str:
    """The beginning of a value, in one line."""
    return json.dumps(value, ensure_ascii=False, default=str)[:100]


# -------------------------------------------------------------------------------------------------------- templates


class Rendered(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    counts: list[bool]
    """Whether the assistant wrote the token; all are True if every token counts."""
    is_rendered: bool
    """Whether a chat template rendered it, which adds its own first and last tokens."""


class Chat(ChatTemplate):
    """Renders and tokenizes the conversations that `castlm.data.chat` checks.

    In `messages` the assistant's turns count, each with the token that ends it; in `prompt` and `completion`, the
    completion. A token counts if any of its characters does, as in transformers.

    Args:
        assistant_only: False counts every token.
        document_limit: factor on `MAX_MESSAGES`, `TEMPLATE_BYTES` and `TEMPLATE_SECONDS`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True, document_limit: float = 1.0
    ) -> None:
        super().__init__(tokenizer, document_limit)
        self._assistant_only = assistant_only
        self._most_messages = round(min(MAX_MESSAGES * document_limit, 1e18))  # no infinity
        self._special = tuple(tokenizer.all_special_tokens)

    def __call__(self, document: str) -> Rendered:
        """The tokens of a conversation, given as JSON.

        Raises:
            InputError: the tokenizer has no template; the template refuses the conversation, leaves out a message, or
                does not show which tokens the assistant wrote.
        """
        content = json.loads(document)
        if isinstance(content.get("prompt"), str):
            start, whole = len(content["prompt"]), content["prompt"] + content["completion"]
            return self._counted(whole, [(start, len(whole))], is_rendered=False)
        messages, tools, prompt = messages_of(content), content.get("tools"), content.get("prompt", [])
        if self._assistant_only and not prompt and _MARK.search(self.template()):
            return self._marked(messages, tools)
        whole = self.render(messages, tools)
        self._check_whole(messages, tools)
        spans: list[tuple[int, int]] = []
        if self._assistant_only:
            if len(messages) > self._most_messages:
                most = f"{self._most_messages:,} (divide it, or raise document_limit)"
                _refuse_unmarked(f"it has {len(messages):,} messages, more than {most}")
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            turns = [number for number in turns if number >= len(prompt)]
            spans = [self._turn(whole, messages, number, tools) for number in turns]
        return self._counted(whole, spans, is_rendered=True)

    def _check_whole(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> None:
        """Raises `InputError` if the template leaves out the text of a message.

        A template may rewrite a text, so each text is replaced by a number, and the numbers are looked for.
        """
        replaced: list[Mapping[str, Any]] = []
        marks: dict[int, str] = {}
        for number, message in enumerate(messages):
            if _texts_of(message):
                content, mark = message["content"], str(_STAND_IN + number)
                if isinstance(content, list):
                    content = [part if part["type"] != "text" else {**part, "text": mark} for part in content]
                message = {**message, "content": content if isinstance(content, list) else mark}
                marks[number] = mark
            replaced.append(message)
        try:
            rendered = self.render(replaced, tools)
        except InputError:  # it reads the messages, and refuses the others
            return
        left_out = next((number for number, mark in marks.items() if mark not in rendered), None)
        if left_out is not None:
            raise InputError(
                f"the chat template leaves out the text of message {left_out + 1} ({messages[left_out]['role']}): "
                "remove it, or give a template that renders it (chat_template_path)"
            )

    def _marked(self, messages: list[Any], tools: Any) -> Rendered:
        """Finds the assistant's tokens by the `{% generation %}` marks of the template."""
        found = self._rendered(messages, tools, marks=True)
        rendered = self._counted(found.text, found.spans, is_rendered=True)
        if not any(rendered.counts):
            _refuse_unmarked("the generation marks of the chat template cover no token of it")
        self._check_whole(messages, tools)
        return rendered

    def _turn(self, whole: str, messages: list[Any], number: int, tools: Any) -> tuple[int, int]:
        """Begin and end of the turn `number` of the assistant in the rendered conversation."""
        before = self.render(messages[:number], tools, reply=True) if number else whole  # no template renders nothing
        upto = self.render(messages[: number + 1], tools)
        if not (whole.startswith(before) and whole.startswith(upto) and len(upto) > len(before)):
            why = "is the first, or rendered differently if the conversation is cut there"
            _refuse_unmarked(f"the chat template has no generation marks, and turn {number + 1} of it {why}")
        bare = upto.rstrip()  # the line break after the token that ends a turn is the template's
        return len(before), len(bare) if bare.endswith(self._special) and len(bare) > len(before) else len(upto)

    def _counted(self, text: str, spans: list[tuple[int, int]], is_rendered: bool) -> Rendered:
        """The tokens of a text; with `assistant_only`, a token counts if it overlaps one of the spans."""
        if not self._assistant_only:
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return Rendered(ids, [True] * len(ids), is_rendered)
        self._check_fast()
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counts, left = [], list(reversed(spans))
        for start, stop in found["offset_mapping"]:  # both in order
            while left and start >= left[-1][1]:
                left.pop()
            counts.append(bool(left) and stop > left[-1][0])
        return Rendered(found["input_ids"], counts, is_rendered)

    def _check_fast(self) -> None:
        if not self._tokenizer.is_fast:
            name = type(self._tokenizer).__name__
            _refuse_unmarked(f"{name} does not tell which characters a token stands for, as a fast tokenizer does")


def _refuse_unmarked(why: str) -> NoReturn:
    """Refuses a conversation in which the tokens of the assistant cannot be found."""
    raise InputError(
        f"which tokens the assistant wrote is not known: {why}; mark them with {{% generation %}} in the chat template "
        "(chat_template_path), or set assistant_only_loss to false"
    )


def _texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts in a message that are not blank."""
    content = message.get("content", "")
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return [text for text in texts if text.strip()]


def begin_of(document: str) -> str:
    """The first words of a conversation, given as JSON, for messages."""
    content = json.loads(document)
    prompt = content.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else [" ".join(_texts_of(m)) for m in messages_of(content)]
    first = next(filter(None, texts), "")
    return repr(" ".join(first.split())[:40])


def with_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """Gives `tokenizer` the chat template in the file `path`, if given; it is also saved with the result.

    A file that cannot be read raises `InputError`; mistakes in a template appear when it renders.
    """
    if path is not None:
        tokenizer.chat_template = read_text(user_path(path))
    return tokenizer
