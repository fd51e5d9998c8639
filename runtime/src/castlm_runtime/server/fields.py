"""The fields of a request: each is checked once, before the model runs; one without an effect is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from castlm_runtime.admission import RETRY_SECONDS
from castlm_runtime.engine import Answer, Engine
from castlm_runtime.sampler import Sampling

MAX_LOGPROBS = 20
_MAX_TOKENS = 512  # where a request does not say
_MAX_CHOICES = 64  # texts that one request may ask for
_MAX_STOPS = 4
_MAX_STOP_TOKENS = 64
_MAX_BIASES = 1024
_MAX_MESSAGES = 1000
_MAX_TOOLS = 128

_IGNORED = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}
"""Fields that say nothing about the text."""
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}
"""Fields of the API that are not supported, and the values that ask for nothing."""
_PENALTIES = ("repetition_penalty", "repeat_penalty")  # vLLM's name and llama.cpp's
_SHARED = {
    *("model", "n", "seed", "max_tokens", "stop", "stop_token_ids", "ignore_eos", "stream", "stream_options"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", *_PENALTIES, "logit_bias"),
    *("logprobs", "response_format"),
}
COMPLETION = frozenset({*_SHARED, "echo"})
"""The fields of a completion that are read, beside `prompt`."""
CHAT = frozenset({*_SHARED, "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "tools", "tool_choice"})
"""The fields of a chat that are read, beside `messages`."""
_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
_TAKEN = {"messages", "tools", "documents", "template", "add_generation_prompt", "marks"}  # by the renderer


class RefusedError(HTTPException):
    """A request that is answered with `status` and a sentence."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(status, message)
        self.parameter = parameter

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        error = {"message": self.detail, "type": kind, "param": self.parameter, "code": self.status_code}
        again = {"Retry-After": str(RETRY_SECONDS)} if self.status_code == 429 else None
        return JSONResponse({"error": error}, self.status_code, again)


@dataclass(frozen=True)
class Wanted:
    """What a request asks for beside the sampling of each of its texts.

    Attributes:
        n: texts for each prompt.
        is_streamed: as server-sent events.
        includes_usage: a last event has the numbers of tokens.
        echoes: each text begins with its prompt.
        num_logprobs: of the most probable tokens, beside the chosen one; None for no log probabilities.
        has_tools: the model may call tools.
    """

    n: int = 1
    is_streamed: bool = False
    includes_usage: bool = False
    echoes: bool = False
    num_logprobs: int | None = None
    has_tools: bool = False


def check_names(body: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuses fields that would be ignored."""
    for name, value in body.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _DEFAULTS:
            raise RefusedError(400, f"the field {name!r:.200} is not known: leave it out")
        if value not in _DEFAULTS[name]:
            raise RefusedError(400, f"{name} is not supported: leave it out", name)


def read_wanted(body: Mapping[str, Any], num_prompts: int, is_chat: bool) -> Wanted:
    """What a request asks for, every field in its range."""
    n = number(body, "n", 1, _MAX_CHOICES, least=1, whole=True)
    if n * num_prompts > _MAX_CHOICES:
        raise RefusedError(
            400, f"{num_prompts} prompts and n = {n} are more than {_MAX_CHOICES} texts: ask for less", "n"
        )
    is_streamed = _flag(body, "stream")
    options = {} if body.get("stream_options") is None else body["stream_options"]
    # Obfuscation is text that hides the lengths of tokens: the server adds none.
    if not isinstance(options, dict) or not all(
        isinstance(value, bool) and (name == "include_usage" or (name == "include_obfuscation" and not value))
        for name, value in options.items()
    ):
        raise RefusedError(400, "stream_options takes include_usage, true or false", "stream_options")
    if options and not is_streamed:
        raise RefusedError(400, "stream_options has an effect with stream alone: leave it out", "stream_options")
    if is_chat:
        top = number(body, "top_logprobs", 0, MAX_LOGPROBS, whole=True)
        num_logprobs = top if _flag(body, "logprobs") else None
        if top and num_logprobs is None:
            raise RefusedError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    else:
        given = body.get("logprobs")  # some clients send false
        num_logprobs = None if given is False else number(body, "logprobs", None, MAX_LOGPROBS, whole=True)
    has_tools = bool(read_tools(body))
    if has_tools and read_schema(body) is not None:
        raise RefusedError(
            400, "give one of tools and response_format: a call of a tool has a form of its own", "tools"
        )
    return Wanted(
        n,
        is_streamed,
        options.get("include_usage", False),
        _flag(body, "echo"),
        num_logprobs,
        has_tools,
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise RefusedError(400, f"{name} must be true or false", name)
    return bool(value)


def read_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | bool | None:
    """The JSON schema of `response_format`; None where any text will do."""
    given = body.get("response_format")
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or given == {"type": "text"}:
        return None
    if given == {"type": "json_object"}:
        return {"type": "object"}
    wrapped = given.get("json_schema") if kind == "json_schema" else None
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict | bool):
        raise RefusedError(
            400,
            'response_format must be {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
            '"json_schema": {"name": ..., "schema": {...}}}',
            "response_format",
        )
    return schema


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that the model may call; none with the choice "none"."""
    given, choice = body.get("tools"), body.get("tool_choice")
    if choice not in (None, "none", "auto") or (choice is not None and given is None):
        raise RefusedError(400, 'tool_choice must be "auto" or "none", beside tools', "tool_choice")
    tools = [] if given is None else given
    if not isinstance(tools, list) or len(tools) > _MAX_TOOLS:
        raise RefusedError(400, f"tools must be a list of at most {_MAX_TOOLS} tools", "tools")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(
                400, 'a tool is {"type": "function", "function": {"name": ..., "parameters": ...}}', "tools"
            )
        if function.get("strict"):
            raise RefusedError(400, "strict is not supported: the model chooses the arguments, leave it out", "tools")
    return [] if choice == "none" else tools


def read_variables(body: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that the chat template gets beside the messages."""
    variables = {} if body.get("chat_template_kwargs") is None else body["chat_template_kwargs"]
    if not isinstance(variables, dict) or not all(name.isidentifier() for name in variables):
        raise RefusedError(
            400, "chat_template_kwargs must be an object with names of variables", "chat_template_kwargs"
        )
    taken = sorted(_TAKEN & set(variables))
    if taken:
        raise RefusedError(400, f"chat_template_kwargs cannot set {taken[0]}", "chat_template_kwargs")
    return variables


def checked_prompts(prompt: Any, vocabulary: int, context: int) -> list[str | list[int]]:
    """The prompts of a request, each a text or token ids."""
    prompts: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        prompts = prompt
    if len(prompts) > _MAX_CHOICES:
        raise RefusedError(400, f"prompt has {len(prompts):,} prompts: give at most {_MAX_CHOICES}", "prompt")
    for one in prompts:
        if isinstance(one, str):
            check_text(one, "prompt")
            continue
        if not isinstance(one, list) or not all(type(token) is int and 0 <= token < vocabulary for token in one):
            raise RefusedError(
                400,
                f"prompt must be a text, a list of token ids from 0 to {vocabulary - 1}, or a list of these",
                "prompt",
            )
        check_room(len(one), context)  # before a long one waits in the memory
    return prompts


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of a chat, with their texts as strings and the arguments of calls as objects."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MAX_MESSAGES:
        raise RefusedError(400, f"messages must be a list of 1 to {_MAX_MESSAGES} messages", "messages")
    called: set[str] = set()
    return [_checked_message(message, called) for message in messages]


def _checked_message(message: Any, called: set[str]) -> dict[str, Any]:
    """A message; `called` has the ids of the calls before it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RefusedError(400, "a message is an object with a role and a content", "messages")
    message = {name: value for name, value in message.items() if value is not None}
    unknown = sorted(set(message) - _MESSAGE)
    if unknown:
        raise RefusedError(400, f"the field {unknown[0]!r:.200} of a message has no effect: leave it out", "messages")
    role, calls = message["role"], message.get("tool_calls")
    content = message.get("content", "" if calls else None)
    if isinstance(content, list):
        found = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [text for text in found if isinstance(text, str)]
        content = "".join(texts) if len(texts) == len(found) else None
    if not isinstance(content, str):
        raise RefusedError(400, "a content is a text, or a list of parts of the type text", "messages")
    checked: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "reasoning_content"):
        if name in message:
            if not isinstance(message[name], str):
                raise RefusedError(400, f"the {name} of a message must be a text", "messages")
            checked[name] = message[name]
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise RefusedError(400, "tool_calls must be a list, in a message of the assistant", "messages")
        checked["tool_calls"] = [_checked_call(call, called) for call in calls]
    if (role == "tool") != ("tool_call_id" in message):
        raise RefusedError(400, "a message has a tool_call_id if and only if its role is tool", "messages")
    if role == "tool":
        if message["tool_call_id"] not in called:
            raise RefusedError(400, f"no call before has the tool_call_id {message['tool_call_id']!r:.200}", "messages")
        checked["tool_call_id"] = message["tool_call_id"]
    check_text(json.dumps(checked, ensure_ascii=False), "messages")
    return checked


def _checked_call(call: Any, called: set[str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    try:
        assert isinstance(function, dict)
        assert isinstance(call["id"], str)
        assert isinstance(function["name"], str)
        arguments = json.loads(function["arguments"])
        assert isinstance(arguments, dict)
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError):
        what = "a call has an id, and a function with a name and the arguments as JSON"
        raise RefusedError(400, what, "messages") from None
    called.add(call["id"])
    function = {"name": function["name"], "arguments": arguments}  # templates write the arguments as JSON themselves
    return {"id": call["id"], "type": "function", "function": function}


def check_text(text: str, name: str) -> None:
    """Refuses text that has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError(400, f"{name} holds half of a surrogate pair, which is no text", name) from None


def number(
    body: Mapping[str, Any], name: str, default: Any, most: float, *, least: float = 0, whole: bool = False
) -> Any:
    """The field `name`, from `least` to `most`; `default` where it is null or missing."""
    value = body.get(name)
    if value is None:
        return default
    if not (type(value) is int or (type(value) is float and not whole)) or not least <= value <= most:  # NaN is not
        raise RefusedError(400, f"{name} must be a {'whole ' if whole else ''}number from {least} to {most}", name)
    return value


def _one_of(body: Mapping[str, Any], first: str, second: str) -> str:
    """Which of two names of a field a request gives; the first one where it gives neither."""
    if body.get(second) is None:
        return first
    if body.get(first) is not None:
        raise RefusedError(400, f"give one of {first} and {second}: they are two names of one field", second)
    return second


def check_room(num_prompt: int, context: int) -> int:
    """The tokens that an answer may have after a prompt."""
    if not num_prompt:
        raise RefusedError(400, "the prompt is empty: give some text")
    if num_prompt >= context:
        raise RefusedError(
            400, f"the prompt of {num_prompt:,} tokens leaves no room in the context of {context:,}: shorten it"
        )
    return context - num_prompt


def _biases(body: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    given = {} if body.get("logit_bias") is None else body["logit_bias"]
    what = f"logit_bias must be an object of at most {_MAX_BIASES:,} tokens with numbers from -100 to 100"
    if not isinstance(given, dict) or len(given) > _MAX_BIASES:
        raise RefusedError(400, what, "logit_bias")
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
            raise RefusedError(400, f"{what}: {token!r:.200} is no token from 0 to {vocabulary - 1}", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise RefusedError(400, what, "logit_bias")
        biases[int(token)] = float(bias)
    return biases


def _stops(body: Mapping[str, Any], vocabulary: int) -> tuple[tuple[str, ...], frozenset[int]]:
    stops = body.get("stop")
    if stops is None or isinstance(stops, str):
        stops = [] if stops is None else [stops]
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RefusedError(400, "stop must be a text, or a list of texts, none of them empty", "stop")
    if len(stops) > _MAX_STOPS or sum(map(len, stops)) > 1024:
        raise RefusedError(400, f"stop must be at most {_MAX_STOPS} texts, of 1,024 characters together", "stop")
    tokens = [] if body.get("stop_token_ids") is None else body["stop_token_ids"]
    if (
        not isinstance(tokens, list)
        or len(tokens) > _MAX_STOP_TOKENS
        or not all(type(token) is int and 0 <= token < vocabulary for token in tokens)
    ):
        what = f"stop_token_ids must be at most {_MAX_STOP_TOKENS} token ids from 0 to {vocabulary - 1}"
        raise RefusedError(400, what, "stop_token_ids")
    return tuple(stops), frozenset(tokens)


def read_answer(body: Mapping[str, Any], wanted: Wanted, ids: list[int], choice: int, engine: Engine) -> Answer:
    """The request for the engine of one text, with every number in its range.

    Args:
        choice: the place among the texts of the prompt: each has a seed of its own.
    """
    context, of, vocabulary = engine.context, engine.defaults, engine.model.vocabulary
    room = check_room(len(ids), context)
    is_scored = wanted.echoes and wanted.num_logprobs is not None
    name, most = _one_of(body, "max_tokens", "max_completion_tokens"), min(_MAX_TOKENS, room)
    most = number(body, name, most, 1 << 53, whole=True)
    least = 0 if is_scored else 1
    if not least <= most <= room:
        raise RefusedError(
            400,
            f"{name} {most} must be from {least} to {room}: the prompt has {len(ids):,} of the {context:,} tokens of "
            "the context",
            name,
        )
    top_k = number(body, "top_k", None, 1 << 31, least=-1, whole=True)  # -1 is vLLM's word for all tokens
    seed = number(body, "seed", None, (1 << 63) - 1, whole=True)
    stops, stop_tokens = _stops(body, vocabulary)
    num_logprobs = wanted.num_logprobs
    sampling = Sampling(
        temperature=float(number(body, "temperature", 1.0, 2)),
        top_k=of.top_k if top_k is None else max(top_k, 0),
        top_p=float(number(body, "top_p", of.top_p, 1)),
        min_p=float(number(body, "min_p", 0.0, 1)),
        repetition_penalty=float(number(body, _one_of(body, *_PENALTIES), of.repetition_penalty, 10, least=0.1)),
        presence_penalty=float(number(body, "presence_penalty", 0.0, 2, least=-2)),
        frequency_penalty=float(number(body, "frequency_penalty", 0.0, 2, least=-2)),
        logit_bias=_biases(body, vocabulary),
        seed=None if seed is None else seed + choice,
        num_logprobs=None if num_logprobs is None else min(num_logprobs, vocabulary),
    )
    return Answer(
        ids,
        most,
        sampling,
        (*stops, *of.stop),
        stop_tokens=stop_tokens,
        ignores_end=_flag(body, "ignore_eos"),
        is_scored=is_scored,
    )
