"""Answers in the words of the OpenAI API: whole, or as server-sent events while they come."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from castlm_runtime.engine import Answer
from castlm_runtime.errors import InputError
from castlm_runtime.grammar import GrammarError
from castlm_runtime.sampler import Logprob
from castlm_runtime.server.fields import RefusedError, Wanted
from castlm_runtime.server.tools import CallReader
from castlm_runtime.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Text that has come of a choice; none at its end."""

    choice: int
    text: str
    num_tokens: int
    """Tokens that the choice has so far."""


def fingerprint(*parts: object) -> str:
    """A name for the model, the library and the settings that determine an answer beside its request."""
    return "castlm-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class _Choice:
    """One text of a reply.

    Args:
        echo: the text that it begins with.
    """

    def __init__(self, index: int, answer: Answer, wanted: Wanted, tokenizer: Tokenizer, is_chat: bool, echo: str):
        self.index, self.answer, self._is_chat, self.echo = index, answer, is_chat, echo
        self._wants_logprobs = wanted.num_logprobs is not None
        self._tokenizer = tokenizer
        self._reader = CallReader() if wanted.has_tools else None
        self._num_called = self._num_scored = self._offset = 0

    def take(self, text: str, is_last: bool) -> str:
        """The part of a new text that is content, and no call of a tool."""
        return self._reader.put(text, is_last) if self._reader is not None else text

    def new_calls(self) -> list[tuple[int, dict[str, Any]]]:
        """The calls of tools since this was asked before, with their numbers."""
        if self._reader is None:
            return []
        first, self._num_called = self._num_called, len(self._reader.calls)
        return [(number, self._reader.calls[number].as_json()) for number in range(first, self._num_called)]

    @property
    def reason(self) -> str | None:
        """Why the text ended."""
        has_called = self._reader is not None and self._reader.calls and self.answer.reason == "stop"
        return "tool_calls" if has_called else self.answer.reason

    def new_logprobs(self, num_tokens: int, with_prompt: bool) -> dict[str, Any] | None:
        """The log probabilities of tokens up to number `num_tokens` that have not been given yet."""
        if not self._wants_logprobs:
            return None
        first, self._num_scored = self._num_scored, num_tokens
        new = [*(self.answer.prompt_logprobs if with_prompt else ()), *self.answer.logprobs[first:num_tokens]]
        if not new:
            return None
        return self._of_chat(new) if self._is_chat else self._of_completion(new)

    def _of_chat(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        def entry(token: int, value: float | None) -> dict[str, Any]:
            content = self._tokenizer.token_bytes(token)
            text = self._tokenizer.token_text(token)
            return {"token": text, "logprob": value, "bytes": None if content is None else list(content)}

        return {
            "content": [
                {**entry(one.token, one.value), "top_logprobs": [entry(*best) for best in one.best]} for one in logprobs
            ],
            "refusal": None,
        }

    def _of_completion(self, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        texts, offsets, tops = [], [], []
        for token, value, best in logprobs:
            text = self._tokenizer.token_text(token)
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            top: dict[str, float] | None = None
            if value is not None:
                top = {}
                for other, other_value in (*best, (token, value)):
                    top.setdefault(self._tokenizer.token_text(other), other_value)  # the most probable of one text
            tops.append(top)
        values = [one.value for one in logprobs]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class Reply:
    """The answers to one request.

    Args:
        answers: one for each choice.
        pieces: what comes of them.
        model: its name in requests.
        fingerprint: of the server.
        echoes: the texts that the choices begin with, if they do.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        pieces: asyncio.Queue[Piece],
        wanted: Wanted,
        tokenizer: Tokenizer,
        *,
        is_chat: bool,
        model: str,
        fingerprint: str,
        echoes: Sequence[str] = (),
    ):
        self.answers, self._pieces, self._wanted, self._is_chat = answers, pieces, wanted, is_chat
        self._choices = [
            _Choice(index, answer, wanted, tokenizer, is_chat, echoes[index] if echoes else "")
            for index, answer in enumerate(answers)
        ]
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    async def _next(self) -> Piece:
        piece = await self._pieces.get()
        # Where pieces wait, as for a client that reads slowly, nothing above suspends. The loop must have a turn to
        # close a connection whose client has gone; otherwise asyncio warns of each further piece.
        await asyncio.sleep(0)
        return piece

    def check(self) -> None:
        """Raises why there is no answer; nothing as long as all are being made."""
        for answer in self.answers:
            _check(answer)

    async def whole(self) -> dict[str, Any]:
        """All answers, once they are there."""
        said = [""] * len(self._choices)
        num_open = len(self._choices)
        while num_open:
            index, text, _ = await self._next()
            if not text:
                self.check()
                num_open -= 1
            said[index] += self._choices[index].take(text, is_last=not text)
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._whole_choice(choice, text) for choice, text in zip(self._choices, said)]
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def _whole_choice(self, choice: _Choice, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"text": choice.echo + text}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls := choice.new_calls():
                message = {"role": "assistant", "content": text or None, "tool_calls": [call for _, call in calls]}
            part = {"message": message}
        logprobs = choice.new_logprobs(len(choice.answer.tokens), with_prompt=True)
        return {"index": choice.index, **part, "finish_reason": choice.reason, "logprobs": logprobs}

    async def events(self) -> AsyncIterator[str]:
        """The answers as server-sent events; the last one is [DONE]."""
        for choice in self._choices if self._is_chat else ():
            yield self._event(choice, {"role": "assistant", "content": ""}, 0)
        num_open = len(self._choices)
        has_begun = [self._is_chat] * num_open
        try:
            while num_open:
                index, text, num_tokens = await self._next()
                choice = self._choices[index]
                if not text:
                    _check(choice.answer)
                    num_open -= 1
                said = choice.take(text, is_last=not text)
                if not has_begun[index]:
                    said = choice.echo + said
                if said:
                    yield self._event(choice, {"content": said}, num_tokens, with_prompt=not has_begun[index])
                    has_begun[index] = True
                for number, call in choice.new_calls():
                    yield self._event(choice, {"tool_calls": [{"index": number, **call}]}, num_tokens)
                if not text:
                    yield self._event(choice, {}, num_tokens, reason=choice.reason, with_prompt=not has_begun[index])
        except RefusedError as error:  # the status has been sent
            yield f"data: {bytes(error.response().body).decode()}\n\n"
            return
        if self._wanted.includes_usage:
            yield self._line({"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _event(
        self,
        choice: _Choice,
        delta: dict[str, Any],
        num_tokens: int,
        *,
        reason: str | None = None,
        with_prompt: bool = False,
    ) -> str:
        part: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        logprobs = choice.new_logprobs(num_tokens, with_prompt)
        choices = [{"index": choice.index, **part, "finish_reason": reason, "logprobs": logprobs}]
        return self._line({"choices": choices} | ({"usage": None} if self._wanted.includes_usage else {}))

    def _line(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return f"data: {json.dumps({**self._head, 'object': kind, **content})}\n\n"

    def _usage(self) -> dict[str, int]:
        prompts = {id(answer.ids): answer.num_prompt for answer in self.answers}  # one for all texts of a prompt
        prompt, new = sum(prompts.values()), sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _check(answer: Answer) -> None:
    if answer.reason == "refused":
        raise RefusedError(429, "others asked for less: try again later, or ask for less")
    if answer.reason == "error":
        error = answer.error
        if isinstance(error, MemoryError):
            raise RefusedError(503, "there is not enough memory for this request: try a shorter one")
        if isinstance(error, GrammarError):
            raise RefusedError(400, str(error), "response_format")
        if isinstance(error, InputError):  # of the model's files: the request has been checked
            raise RefusedError(500, str(error))
        raise RefusedError(500, f"the model failed ({type(error).__name__}): the server's log says more")
    if answer.reason == "cancelled":
        raise RefusedError(503, "the server ends")
