"""The OpenAI API over an `Engine`: chat completions and completions, whole or streamed, checked before the model runs.

Whatever a request holds, it is answered: 413 where its body is too long for any prompt of the model, 400 where a field
makes no sense, 404 for another model, 429 where too much waits (`castlm_runtime.admission`). A field that is not
supported is refused and not ignored. A client that goes away ends its request.

A web page in a browser on this machine reaches the server too. It cannot send JSON to another site than its own, so
only JSON is taken (415). A site whose name is given this machine's address (DNS rebinding) is recognized by the `Host`
of the request (403).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from castlm_runtime.admission import RETRY_SECONDS, Bodies, BusyError, Refusals, Worker, address_of
from castlm_runtime.chat import ChatTemplate
from castlm_runtime.engine import Answer, Engine
from castlm_runtime.errors import InputError, is_panic, one_line
from castlm_runtime.reading import parse_json
from castlm_runtime.sampler import Sampling

_BYTES_PER_TOKEN = 32  # of the body, for each token of the context: JSON may write a character as \u1234
_LEAST_BODY = 1 << 16
_BODY_SECONDS = 30.0  # for a client to send its body
_MAX_TOKENS = 512  # where a request does not say
_MOST_STOPS = 4
_MOST_MESSAGES = 1000
_MOST_READ = 32  # prompts that wait to be tokenized, and conversations that wait to be rendered: one at a time of each
_SHORT_TEXT = 4096  # bytes of a body that is tokenized at once, in a millisecond or two
_READ_COST = 4096  # of any of them, in bytes
_LEAST_BODIES = 64 << 20  # bytes of all bodies that have not come whole; more for a long context

_IGNORED = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}
"""Fields that say nothing about the text."""
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields of the API that are not supported, and the values that ask for nothing."""
_STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # the second adds text that hides lengths: nothing here
_PENALTIES = ("repetition_penalty", "repeat_penalty")  # vLLM's name and llama.cpp's
_READ = {
    "model",
    "temperature",
    "top_p",
    "top_k",
    *_PENALTIES,
    "seed",
    "stop",
    "stream",
    "stream_options",
    "max_tokens",
}

Result = TypeVar("Result")


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


def make_app(engine: Engine, name: str, hosts: Collection[str] = ()) -> Starlette:
    """The ASGI application; requests give `name` as their model.

    Args:
        hosts: names of this server that a request may have as its `Host`, beside localhost and addresses; "*" for any.
    """
    api = _Api(engine, name)

    async def answer_refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, RefusedError):
            return error.response()
        # of Starlette, for a path or a method
        hint = "see /v1/models, /v1/completions, /health"
        response = RefusedError(error.status_code, f"{error.detail}: {hint}").response()
        response.headers.update(error.headers or {})  # the methods that are allowed
        return response

    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        ],
        exception_handlers={HTTPException: answer_refused},
        middleware=[Middleware(_Guard, hosts={host.lower().rstrip(".") for host in hosts})],
    )


class _Guard:
    """Answers requests that a web page may have sent, before `app` does, and holds refusals back if there are many."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts, self.refusals = app, hosts, Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http":
            request = Request(scope)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not self._is_known(request.headers.get("host", "")):
                host = request.headers["host"]
                error = f"the host {host!r:.200} is not known: start castlm serve with --allowed-hosts"
                answer = RefusedError(403, error).response()
            elif request.method == "POST" and kind != "application/json":
                error = f"the Content-Type is {kind!r:.200}: send JSON with Content-Type: application/json"
                answer = RefusedError(415, error).response()

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await self.refusals.wait()
            await send(message)

        await answer(scope, receive, send_in_time)

    def _is_known(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).lower().rstrip(".")
        if "*" in self.hosts or name in {"", "localhost", *self.hosts}:  # a browser never leaves it out
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


class _Api:
    """The handlers, named after the routes."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.started = engine, name, int(time.time())
        self.tokenizer = engine.tokenizer
        self.chat = ChatTemplate(engine.tokenizer)
        self.most_bytes = max(_LEAST_BODY, _BYTES_PER_TOKEN * engine.context)
        self.prompts = Worker(_MOST_READ, most_work=4 * self.most_bytes)
        self.chats = Worker(_MOST_READ, most_work=4 * self.most_bytes)  # apart: a chat template may take its time
        self.bodies = Bodies(max(_LEAST_BODIES, 4 * self.most_bytes))

    async def health(self, request: Request) -> Response:
        if not self.engine.is_running:
            raise RefusedError(503, "the server ends")
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        settings, prompt, length = await self._body(request, "prompt")
        text = self._checked_prompt(prompt)
        del prompt  # parsed JSON may take 30 times the memory of its text, and the answer may wait for minutes
        if isinstance(text, list):
            ids = text
        elif length <= _SHORT_TEXT:
            ids = self._prompt_ids(text)
        else:
            ids = await self._read(request, self.prompts, self._prompt_ids, text, length)
        return await self._answer(request, settings, ids, is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        settings, given, length = await self._body(request, "messages", "max_completion_tokens")
        if not self.chat.has_template:
            raise RefusedError(400, "the model has no chat template: use /v1/completions")
        messages = _checked_messages(given)
        del given
        ids = await self._read(request, self.chats, self._chat_ids, messages, length)
        return await self._answer(request, settings, ids, is_chat=True)

    async def _read(
        self, request: Request, worker: Worker, read: Callable[[Any], list[int]], text: Any, length: int
    ) -> list[int]:
        """The tokens of a prompt or of messages, of a body of `length` bytes."""
        try:
            run = worker.run(read, text, address=_address(request), cost=_READ_COST + length)
            return await _unless_gone(request, run)
        except BusyError as error:
            raise RefusedError(429, str(error)) from None

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "castlm"}

    def _check_model(self, name: Any) -> None:
        if name != self.name:
            raise RefusedError(404, f"there is no model {name!r:.200}: this server has {self.name!r}", "model")

    async def _body(self, request: Request, text: str, *more: str) -> tuple[dict[str, Any], Any, int]:
        """The body of a request, a JSON object of no more than `most_bytes`.

        Args:
            text: the field that holds the prompt.
            more: fields that this kind of request has.

        Returns:
            The fields that say how to answer; the field `text`; the number of bytes.
        """
        what = f"{self.most_bytes:,} bytes, more than the context of {self.engine.context:,} tokens"
        too_long = RefusedError(413, f"the body exceeds {what}")
        if int(request.headers.get("content-length", 0)) > self.most_bytes:
            raise too_long  # so that a client that waits for "100 Continue" does not send it
        content = bytearray()
        try:
            with self.bodies.hold() as add:
                async with asyncio.timeout(_BODY_SECONDS):
                    async for part in request.stream():
                        content = add(part)
                        if len(content) > self.most_bytes:
                            raise too_long
        except BusyError as error:
            raise RefusedError(429, str(error)) from None
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {_BODY_SECONDS:g} seconds") from None
        except ClientDisconnect:
            raise RefusedError(400, "the client went away") from None
        try:
            body = parse_json(bytes(content), "the body")
        except InputError as error:
            raise RefusedError(400, str(error)) from None
        if not isinstance(body, dict):
            raise RefusedError(400, f"the body is a JSON {type(body).__name__}: an object is needed")
        if body.get("model") is not None:
            self._check_model(body["model"])
        _check_fields(body, {text, *more})
        return {name: body[name] for name in body if name in _READ | set(more)}, body.get(text), len(content)

    def _checked_prompt(self, prompt: Any) -> str | list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            _check_text(prompt, "prompt")
            return prompt
        size = self.engine.model.vocabulary
        if not isinstance(prompt, list) or not all(type(token) is int and 0 <= token < size for token in prompt):
            raise RefusedError(400, f"prompt must be one text, or a list of token ids from 0 to {size - 1}", "prompt")
        _check_room(len(prompt), self.engine.context)  # before a long one waits in the memory
        return prompt

    def _prompt_ids(self, prompt: str) -> list[int]:
        return self._tokenize(prompt, "prompt", add_special_tokens=True)

    def _chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self.chat.render(messages, reply=True)
        except InputError as error:
            raise RefusedError(400, str(error), "messages") from None
        return self._tokenize(text, "messages", add_special_tokens=False)

    def _tokenize(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except BaseException as error:
            if not is_panic(error):
                raise
            raise RefusedError(
                400, f"the tokenizer of the model cannot read {field}: {one_line(error)}", field
            ) from None

    async def _answer(
        self, request: Request, settings: Mapping[str, Any], ids: list[int], *, is_chat: bool
    ) -> Response:
        stream = settings.get("stream")
        if not isinstance(stream, bool | None):
            raise RefusedError(400, "stream must be true or false", "stream")
        options = {} if settings.get("stream_options") is None else settings["stream_options"]
        if not isinstance(options, dict) or not all(
            name in _STREAM_OPTIONS and isinstance(value, bool) for name, value in options.items()
        ):
            raise RefusedError(
                400, f"stream_options takes {' and '.join(_STREAM_OPTIONS)}, true or false", "stream_options"
            )
        include_usage = options.get("include_usage", False)
        pieces: asyncio.Queue[str] = asyncio.Queue()
        has_begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def later(function: Callable[..., None], *arguments: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(function, *arguments)

        answer = _request(settings, ids, self.engine)
        answer.address = _address(request)
        answer.begun = lambda: later(has_begun.set)
        answer.heard = lambda text: later(pieces.put_nowait, text)
        try:
            self.engine.submit(answer)
        except BusyError as error:
            raise RefusedError(429, str(error)) from None
        reply = _Reply(answer, pieces, is_chat, self.name)
        try:
            if not stream:
                return JSONResponse(reply.whole(await _unless_gone(request, reply.text())))
            await _unless_gone(request, has_begun.wait())
            reply.check()  # while the answer can still have another status
        except BaseException:
            self.engine.cancel(answer)
            raise
        return _Events(self.engine, answer, reply.events(include_usage))


def _address(request: Request) -> str:
    return address_of(request.client.host if request.client is not None else None)


async def _unless_gone(request: Request, coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of `coroutine`, which ends when the client has gone away; the body of its request has been read."""

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(coroutine), asyncio.ensure_future(listen())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise RefusedError(400, "the client went away")
        return result.result()
    finally:
        result.cancel()
        gone.cancel()


class _Reply:
    """An answer in the words of the API."""

    def __init__(self, answer: Answer, pieces: asyncio.Queue[str], is_chat: bool, model: str):
        self.answer, self.pieces, self.is_chat = answer, pieces, is_chat
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": name, "created": int(time.time()), "model": model}

    async def _texts(self) -> AsyncIterator[str]:
        while text := await self.pieces.get():
            yield text
            # Where pieces wait, as for a client that reads slowly, nothing above suspends. The loop must have a turn to
            # close a connection whose client has gone; otherwise asyncio warns of each further piece.
            await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        """Raises why there is no answer; nothing as long as it is being made."""
        if self.answer.reason == "refused":
            raise RefusedError(429, "others asked for less: try again later, or ask for less")
        if self.answer.reason == "error":
            error = self.answer.error
            if isinstance(error, MemoryError):
                raise RefusedError(503, "there is not enough memory for this request: try a shorter one")
            if isinstance(error, InputError):  # of the model's files: the request has been checked
                raise RefusedError(500, str(error))
            raise RefusedError(500, f"the model failed ({type(error).__name__}): the server's log says more")
        if self.answer.reason == "cancelled":
            raise RefusedError(503, "the server ends")

    async def text(self) -> str:
        return "".join([text async for text in self._texts()])

    def whole(self, text: str) -> dict[str, Any]:
        part = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **part, "finish_reason": self.answer.reason, "logprobs": None}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self._usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one is [DONE]."""
        head = {**self.head, "object": "chat.completion.chunk" if self.is_chat else "text_completion"}

        def event(text: str, reason: str | None = None, **delta: str) -> str:
            if text:
                delta["content"] = text
            part = {"delta": delta} if self.is_chat else {"text": text}
            choice = {"index": 0, **part, "finish_reason": reason, "logprobs": None}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        if self.is_chat:
            yield event("", role="assistant", content="")
        try:
            async for text in self._texts():
                yield event(text)
        except RefusedError as error:  # the status has been sent
            yield f"data: {bytes(error.response().body).decode()}\n\n"
            return
        yield event("", self.answer.reason)
        if include_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': self._usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, new = self.answer.num_prompt, len(self.answer.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class _Events(StreamingResponse):
    """A stream whose end, also by a client that goes away, ends the request."""

    def __init__(self, engine: Engine, answer: Answer, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.engine, self.answer = engine, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.engine.cancel(self.answer)


def _check_fields(body: Mapping[str, Any], more: set[str]) -> None:
    """Refuses fields that would be ignored."""
    for name, value in body.items():
        if name in _READ | more | _IGNORED or value is None:
            continue
        if name not in _DEFAULTS:
            raise RefusedError(400, f"the field {name!r:.200} is not known: leave it out")
        if value not in _DEFAULTS[name]:
            raise RefusedError(400, f"{name} is not supported: leave it out", name)


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MOST_MESSAGES:
        raise RefusedError(400, f"messages must be a list of 1 to {_MOST_MESSAGES} messages", "messages")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Any) -> dict[str, Any]:
    """A message with its text as a string; parts of text are joined."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RefusedError(400, "a message is an object with a role and a content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        found = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [text for text in found if isinstance(text, str)]
        content = "".join(texts) if len(texts) == len(found) else None
    if not isinstance(content, str):
        raise RefusedError(400, "a content is a text, or a list of parts of the type text", "messages")
    _check_text(message["role"] + content, "messages")
    return {"role": message["role"], "content": content}


def _check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError(400, f"{field} holds half of a surrogate pair, which is no text", field) from None


def _number(
    body: Mapping[str, Any], name: str, default: Any, most: float, *, least: float = 0, whole: bool = False
) -> Any:
    """The field `name`, from `least` to `most`; `default` where it is null or missing."""
    value = body.get(name)
    if value is None:
        return default
    if not (type(value) is int or (type(value) is float and not whole)) or not least <= value <= most:  # NaN is not
        raise RefusedError(400, f"{name} must be a {'whole ' if whole else ''}number from {least} to {most}", name)
    return value


def _check_room(num_prompt: int, context: int) -> int:
    """The tokens that an answer may have after a prompt."""
    if not num_prompt:
        raise RefusedError(400, "the prompt is empty: give some text")
    if num_prompt >= context:
        raise RefusedError(
            400, f"the prompt of {num_prompt:,} tokens leaves no room in the context of {context:,}: shorten it"
        )
    return context - num_prompt


def _request(body: Mapping[str, Any], ids: list[int], engine: Engine) -> Answer:
    """The request for the engine, with every number in its range."""
    context, of = engine.context, engine.defaults
    room = _check_room(len(ids), context)
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted = _number(body, name, min(_MAX_TOKENS, room), 1 << 53, whole=True)
    if not 1 <= wanted <= room:
        raise RefusedError(
            400,
            f"{name} {wanted} must be from 1 to {room}: the prompt has {len(ids):,} of the {context:,} tokens of the "
            "context",
            name,
        )
    temperature = float(_number(body, "temperature", 1.0, 2))
    top_k = _number(body, "top_k", None, 1 << 31, least=-1, whole=True)  # -1 is vLLM's word for all tokens
    first, second = (_number(body, name, None, 10, least=0.1) for name in _PENALTIES)
    if first is not None and second is not None:
        raise RefusedError(
            400, f"give one of {' and '.join(_PENALTIES)}: they are two names of one field", _PENALTIES[1]
        )
    penalty = first if first is not None else second
    stops = body.get("stop")
    if stops is None or isinstance(stops, str):
        stops = [] if stops is None else [stops]
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RefusedError(400, "stop must be a text, or a list of texts, none of them empty", "stop")
    if len(stops) > _MOST_STOPS or sum(map(len, stops)) > 1024:
        raise RefusedError(400, f"stop must be at most {_MOST_STOPS} texts, of 1,024 characters together", "stop")
    sampling = Sampling(
        temperature=temperature,
        top_k=of.top_k if top_k is None else max(top_k, 0),
        top_p=float(_number(body, "top_p", of.top_p, 1)),
        repetition_penalty=of.repetition_penalty if penalty is None else float(penalty),
        seed=_number(body, "seed", None, (1 << 63) - 1, whole=True),
    )
    return Answer(ids, wanted, sampling, (*stops, *of.stop))
