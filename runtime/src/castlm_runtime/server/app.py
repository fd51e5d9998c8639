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
import datetime
import functools
import ipaddress
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from castlm_runtime import library
from castlm_runtime.admission import Bodies, BusyError, Refusals, Worker, address_of
from castlm_runtime.chat import ChatTemplate
from castlm_runtime.engine import Answer, Engine
from castlm_runtime.errors import InputError, is_panic, one_line
from castlm_runtime.grammar import Grammars
from castlm_runtime.reading import parse_json
from castlm_runtime.server import fields
from castlm_runtime.server.fields import RefusedError, Wanted
from castlm_runtime.server.metrics import Metrics
from castlm_runtime.server.reply import Piece, Reply, fingerprint
from castlm_runtime.server.tools import has_form

_BYTES_PER_TOKEN = 32  # of the body, for each token of the context: JSON may write a character as \u1234
_MIN_BODY = 1 << 16
_BODY_SECONDS = 30.0  # for a client to send its body
_MAX_READ = 32  # prompts that wait to be tokenized, and conversations that wait to be rendered: one at a time of each
_SHORT_TEXT = 4096  # bytes of a body that is tokenized at once, in a millisecond or two
_READ_COST = 4096  # of any of them, in bytes
_MIN_BODIES = 64 << 20  # bytes of all bodies that have not come whole; more for a long context

Result = TypeVar("Result")


def make_app(
    engine: Engine,
    name: str,
    hosts: Collection[str] = (),
    *,
    api_key: str | None = None,
    log: Callable[[str], None] | None = None,
) -> Starlette:
    """The ASGI application; requests give `name` as their model.

    Args:
        hosts: names of this server that a request may have as its `Host`, beside localhost and addresses; "*" for any.
        api_key: that requests to /v1 must have as their bearer token; None takes all.
        log: takes a line for each request.
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
            Route("/metrics", api.read_metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        ],
        exception_handlers={HTTPException: answer_refused},
        middleware=[Middleware(_Guard, api.metrics, {host.lower().rstrip(".") for host in hosts}, api_key, log)],
    )


class _Guard:
    """Answers requests without the key, and those that a web page may have sent, before `app` does; holds refusals back
    if there are many; counts and logs."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        hosts: Collection[str],
        api_key: str | None,
        log: Callable[[str], None] | None,
    ):
        self.app, self.metrics, self.hosts, self.refusals = app, metrics, hosts, Refusals()
        self.api_key, self.log = api_key, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, started, status = Request(scope), time.monotonic(), 0

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.responded(status)
                if status >= 400:
                    await self.refusals.wait()
            await send(message)

        refused = self._refused(request)
        answer: ASGIApp = self.app if refused is None else refused.response()
        try:
            await answer(scope, receive, send_in_time)
        finally:
            if self.log is not None:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                host = request.client.host if request.client is not None else "-"
                path = ascii(scope["path"])[1:-1]
                self.log(f"{now} {host} {request.method} {path:.500} {status} {time.monotonic() - started:.3f} s")

    def _refused(self, request: Request) -> RefusedError | None:
        """Why a request does not reach the application."""
        if not self._is_known(request.headers.get("host", "")):
            host = request.headers["host"]
            return RefusedError(403, f"the host {host!r:.200} is not known: start castlm serve with --allowed-hosts")
        if self.api_key is not None and request.url.path.startswith("/v1"):
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
                return RefusedError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            error = f"the Content-Type is {kind!r:.200}: send JSON with Content-Type: application/json"
            return RefusedError(415, error)
        return None

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
        self.most_bytes = max(_MIN_BODY, _BYTES_PER_TOKEN * engine.context)
        self.prompts = Worker(_MAX_READ, most_work=4 * self.most_bytes)
        self.chats = Worker(_MAX_READ, most_work=4 * self.most_bytes)  # apart: a chat template may take its time
        self.bodies = Bodies(max(_MIN_BODIES, 4 * self.most_bytes))
        self.metrics = Metrics(engine)
        self.grammars = Grammars(self.tokenizer, engine.model.vocabulary, engine.defaults.ends)
        self.fingerprint = fingerprint(name, engine.batch.cache.kind, library.level())

    async def health(self, request: Request) -> Response:
        if not self.engine.is_running:
            raise RefusedError(503, "the server ends")
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        wanted, answers, echoes = await self._read_completion(request)
        return await self._answer(request, wanted, answers, echoes, is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        wanted, answers = await self._read_chat(request)
        return await self._answer(request, wanted, answers, is_chat=True)

    # Two functions read a request, so that nothing of it is left while the answer waits, for minutes perhaps: parsed
    # JSON may take 30 times the memory of its text.

    async def _read_completion(self, request: Request) -> tuple[Wanted, list[Answer], list[str]]:
        body, prompt, length = await self._body(request, "prompt", fields.COMPLETION)
        prompts = fields.checked_prompts(prompt, self.engine.model.vocabulary, self.engine.context)
        wanted = fields.read_wanted(body, len(prompts), is_chat=False)
        if length <= _SHORT_TEXT or all(isinstance(one, list) for one in prompts):
            ids = self._prompt_ids(prompts)
        else:
            ids = await self._read(request, self.prompts, lambda: self._prompt_ids(prompts), length)
        echoes: list[str] = []
        if wanted.echoes:
            texts = [one if isinstance(one, str) else self.tokenizer.decode(one) for one in prompts]
            echoes = [text for text in texts for _ in range(wanted.n)]
        return wanted, await self._answers(request, body, wanted, ids, length), echoes

    async def _read_chat(self, request: Request) -> tuple[Wanted, list[Answer]]:
        body, given, length = await self._body(request, "messages", fields.CHAT)
        if not self.chat.has_template:
            raise RefusedError(400, "the model has no chat template: use /v1/completions")
        messages = fields.checked_messages(given)
        tools, variables = fields.read_tools(body), fields.read_variables(body)
        wanted = fields.read_wanted(body, 1, is_chat=True)
        ids = await self._read(request, self.chats, lambda: self._chat_ids(messages, tools, variables), length)
        return wanted, await self._answers(request, body, wanted, [ids], length)

    async def _answers(
        self, request: Request, body: Mapping[str, Any], wanted: Wanted, prompts: Sequence[list[int]], length: int
    ) -> list[Answer]:
        """The requests for the engine, prompt by prompt."""
        answers = [
            fields.read_answer(body, wanted, ids, choice, self.engine) for ids in prompts for choice in range(wanted.n)
        ]
        schema = fields.read_schema(body)
        if schema is not None:
            try:
                grammar = await self._read(request, self.prompts, lambda: self.grammars.grammar(schema), length)
            except InputError as error:
                raise RefusedError(400, str(error), "response_format") from None
            for answer in answers:
                answer.grammar = grammar.copy()
        return answers

    async def _read(self, request: Request, worker: Worker, read: Callable[[], Result], length: int) -> Result:
        """What `read` makes of a body of `length` bytes, in a thread of its own."""
        try:
            run = worker.run(read, address=_address(request), cost=_READ_COST + length)
            return await _unless_gone(request, run)
        except BusyError as error:
            raise RefusedError(429, str(error)) from None

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "castlm"}

    def _check_model(self, name: Any) -> None:
        if name != self.name:
            raise RefusedError(404, f"there is no model {name!r:.200}: this server has {self.name!r}", "model")

    async def _body(self, request: Request, text: str, known: frozenset[str]) -> tuple[dict[str, Any], Any, int]:
        """The body of a request, a JSON object of no more than `most_bytes`.

        Args:
            text: the field that holds the prompt.
            known: the other fields that this kind of request has.

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
        fields.check_names(body, known | {text})
        return {name: body[name] for name in body if name in known}, body.get(text), len(content)

    def _prompt_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [
            self._tokenize(one, "prompt", add_special_tokens=True) if isinstance(one, str) else one for one in prompts
        ]

    def _chat_ids(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: dict[str, Any]
    ) -> list[int]:
        """The tokens of messages, none of whose fields the chat template leaves out."""
        template = self.chat.template(tools or None)
        has_calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
        if (tools or has_calls) and not has_form(template):
            what = "the chat template of the model has no form of tool calls that this server reads: leave tools out"
            raise RefusedError(400, what, "tools" if tools else "messages")
        for name in variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise RefusedError(
                    400,
                    f"the chat template of the model does not read {name!r:.200}: leave it out",
                    "chat_template_kwargs",
                )

        def render(messages: list[dict[str, Any]]) -> str:
            return self.chat.render(messages, tools or None, reply=True, variables=variables)

        try:
            text = render(messages)
            for name in ("name", "tool_calls", "reasoning_content"):
                without = [{key: value for key, value in message.items() if key != name} for message in messages]
                # Templates leave out the reasoning of earlier turns.
                is_known = name == "reasoning_content" and re.search(r"\b(reasoning_content|thinking)\b", template)
                if without != messages and not is_known and render(without) == text:
                    what = f"the chat template of the model does not read the {name} of a message: leave it out"
                    raise RefusedError(400, what, "messages")
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
        self, request: Request, wanted: Wanted, answers: Sequence[Answer], echoes: Sequence[str] = (), *, is_chat: bool
    ) -> Response:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        has_begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def later(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(function, *arguments)

        started, has_text = time.monotonic(), [False] * len(answers)

        def hear(index: int, text: str) -> None:  # in the thread of the engine
            if text and not has_text[index]:
                has_text[index] = True
                self.metrics.heard_first(time.monotonic() - started)
            if not text:
                self.metrics.ended(answers[index], time.monotonic() - started)
            later(pieces.put_nowait, Piece(index, text, len(answers[index].tokens)))

        for index, answer in enumerate(answers):
            answer.address = _address(request)
            answer.begun = lambda: later(has_begun.set)
            answer.heard = functools.partial(hear, index)
        reply = Reply(
            answers,
            pieces,
            wanted,
            self.tokenizer,
            is_chat=is_chat,
            model=self.name,
            fingerprint=self.fingerprint,
            echoes=echoes,
        )
        try:
            for answer in answers:
                self.engine.submit(answer)
            if not wanted.is_streamed:
                return JSONResponse(await _unless_gone(request, reply.whole()))
            await _unless_gone(request, has_begun.wait())
            reply.check()  # while the answer can still have another status
        except BaseException as error:
            for answer in answers:
                self.engine.cancel(answer)
            if isinstance(error, BusyError):
                raise RefusedError(429, str(error)) from None
            raise
        return _Events(self.engine, answers, reply.events())


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


class _Events(StreamingResponse):
    """A stream whose end, also by a client that goes away, ends the request."""

    def __init__(self, engine: Engine, answers: Sequence[Answer], events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.engine, self.answers = engine, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                self.engine.cancel(answer)
