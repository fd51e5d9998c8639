"""Runs many sequences on one model: in each pass a token of each that is being decoded, and parts of prompts.

`Batch.step` is schedule, run, postprocess: which tokens are next, the pass through the model, and which sequences have
logits. So a long prompt delays the others by one part of it, and a sequence that ends makes room at once. `Engine` is
the batch of a server: one thread owns the model and takes requests in as they are due
(`castlm_runtime.admission`). A fifth of the cache is kept for short requests, because a long one keeps its part until
it ends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from castlm_runtime.admission import BusyError, Line
from castlm_runtime.cache import Blocks, CachedSequence
from castlm_runtime.defaults import Defaults
from castlm_runtime.detokenizer import Detokenizer
from castlm_runtime.errors import InputError, is_panic
from castlm_runtime.grammar import Grammar
from castlm_runtime.machine import available_memory
from castlm_runtime.model import BLOCK, Cache, Model, Part, block_bytes, blocks_for
from castlm_runtime.sampler import NOT_FINITE, Chooser, Logprob, Sampling, choose, score
from castlm_runtime.tokenizer import Tokenizer

Say = Callable[[str], None]

MAX_TOGETHER = 64
"""Sequences that have a token in a pass."""
MAX_WAITING = 128
"""Requests that wait for their turn; more are refused."""
MAX_WORK = 32_768.0
"""What the requests that wait cost together, in tokens to decode; more are refused."""
_REQUEST_COST = 32.0  # of any request, in tokens to decode: its HTTP, its text, the first run of the model
_PROMPT_COST = 1 / 8  # of a token that is read
_SHORT = 1 / 8  # of the context, at most, is a short request
_LONG = 2.0  # contexts that the cache has for all requests
_SHORT_PART = 0.5  # and more for short ones
_MIN_CACHE = 32_768  # tokens, where memory allows: many short requests, and prefixes that come again
_MEMORY_SHARE = 0.8  # of the memory that is free once the model is loaded, for the cache
_PROMPT_PART = 512  # tokens of prompts in a pass
_SCORED_PART = 64  # tokens in a pass whose logits are all wanted: up to 152,000 each, in fp32


_log = logging.getLogger(__name__)


def silent(*_: object) -> None:
    """A `Say` that shows nothing."""


# ---- passes


@dataclass(eq=False)
class Running:
    """A sequence in a batch, from `Batch.add` to `Batch.remove`.

    Attributes:
        num_scored: of the first tokens the logits after each one are wanted.
        scored: those of the last step, (tokens, vocabulary) fp32; None where the step read other tokens.
    """

    cached: CachedSequence
    num_scored: int = 0
    scored: np.ndarray | None = None

    @property
    def num_unread(self) -> int:
        """Tokens whose keys and values are not in the cache."""
        return len(self.cached.tokens) - self.cached.num_read

    def append(self, token: int) -> None:
        """Adds a token, which the next step reads."""
        self.cached.tokens.append(token)


class Batch:
    """Sequences of one model and their cache.

    Args:
        kind: what the cache keeps: bf16, int8 or fp32.
        num_tokens: that the cache holds.
        shares_prefixes: whether sequences that begin alike share keys and values.
    """

    def __init__(self, model: Model, kind: str, num_tokens: int, shares_prefixes: bool = True):
        self.model = model
        self.cache = Cache(model, kind, blocks_for(num_tokens))
        self.blocks = Blocks(self.cache.num_blocks, shares_prefixes)
        self.logits = np.empty((MAX_TOGETHER, model.vocabulary), np.float32)

    def close(self) -> None:
        """Frees the cache."""
        self.cache.close()

    def add(self, tokens: Sequence[int], most_tokens: int, is_scored: bool = False) -> Running:
        """A sequence that begins with `tokens` and has at most `most_tokens`, which must fit (`blocks.fits`).

        Args:
            is_scored: the logits after each of `tokens` are wanted, so that each of them is read.
        """
        cached = self.blocks.open(tokens, most_tokens, finds_prefix=not is_scored)
        return Running(cached, len(tokens) if is_scored else 0)

    def remove(self, sequence: Running) -> None:
        """Gives the blocks of a sequence back."""
        sequence.cached.close()

    def step(self, sequences: Sequence[Running]) -> list[Running]:
        """Reads new tokens of `sequences`, the first ones first.

        Returns:
            The sequences whose last token was read. The rows of `logits` are theirs, in this order, until the next
            step.

        Raises:
            MemoryError: there is no memory for activations or cache. No token has been read then.
        """
        parts = self._schedule(sequences)
        self.model.forward(self.cache, [part for _, part in parts])
        complete: list[Running] = []
        for sequence, part in parts:
            end = part.position + len(part.tokens)
            sequence.cached.have_read(end)
            sequence.scored = part.logits if part.position < sequence.num_scored else None
            if end == len(sequence.cached.tokens):
                if sequence.scored is not None:
                    self.logits[len(complete)] = sequence.scored[-1]
                complete.append(sequence)
        return complete

    def _schedule(self, sequences: Sequence[Running]) -> list[tuple[Running, Part]]:
        """A token of each sequence that has one new, and prompts as far as `_PROMPT_PART` and `_SCORED_PART` go."""
        parts: list[tuple[Running, Part]] = []
        room, scored_room = _PROMPT_PART, _SCORED_PART
        free = iter(self.logits)
        for sequence in sequences:
            cached, first = sequence.cached, sequence.cached.num_read
            is_scored = first < sequence.num_scored
            if is_scored:
                count = min(scored_room, sequence.num_unread)
            else:
                count = 1 if sequence.num_unread == 1 else min(room, sequence.num_unread)
            if count < 1 or len(parts) == MAX_TOGETHER:
                continue
            if is_scored:
                scored_room -= count
            elif sequence.num_unread > 1:
                room -= count
            cached.make_room(first + count)
            row = next(free) if count == sequence.num_unread else None
            logits = np.empty((count, self.model.vocabulary), np.float32) if is_scored else row
            tokens = cached.tokens[first : first + count]
            parts.append((sequence, Part(tokens, first, cached.blocks[: blocks_for(first + count)], logits)))
        return parts


# ---- requests


@dataclass(eq=False)
class Answer:
    """A request, and the text that has come of it.

    Attributes:
        ids: the tokens of the prompt.
        max_new_tokens: prompt and answer fit the model's context; 0 only where the prompt is scored.
        sampling: how its tokens are chosen.
        stop: texts that end the answer; they are no part of it.
        stop_tokens: tokens that end it, beside those that end a text of the model; they are no part of the text.
        ignores_end: whether the tokens that end a text of the model do not end the answer.
        is_scored: whether the log probabilities of the prompt are wanted; `sampling.num_logprobs` says how many.
        grammar: what the answer must follow.
        begun: called when the request has been taken from the line, and when it ends.
        heard: called with each new text, and with an empty one at the end.
        address: of the client, for `castlm_runtime.admission`.
        tokens: that were generated.
        prompt_logprobs: of the tokens of the prompt, if it is scored.
        logprobs: of `tokens`, if `sampling` wants them.
        reason: why the answer ended: "stop", "length", "cancelled", "refused" or "error"; None before.
        error: what went wrong.
    """

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignores_end: bool = False
    is_scored: bool = False
    grammar: Grammar | None = None
    begun: Callable[[], None] = silent
    heard: Say = silent
    address: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    reason: str | None = None
    error: BaseException | None = None
    is_cancelled: bool = False
    _held: str = ""
    _text: Detokenizer | None = None

    @property
    def num_prompt(self) -> int:
        """The tokens of the prompt."""
        return len(self.ids)

    @property
    def num_cached(self) -> int:
        """The tokens that the sequence may have in its cache."""
        return self.num_prompt + self.max_new_tokens

    @property
    def cost(self) -> float:
        """The work that it takes, in tokens to decode."""
        prompt = _PROMPT_COST * self.num_prompt * (2 if self.is_scored else 1)
        return _REQUEST_COST + prompt + self.max_new_tokens

    def take(self, token: int, tokenizer: Tokenizer, reason: str | None, is_shown: bool = True) -> None:
        """Adds a token. Text is handed on once no later token can change it or make it part of a stop text.

        Args:
            reason: why this token is the last one; None where it is not.
            is_shown: whether it is part of the text.
        """
        self.tokens.append(token)
        if self._text is None:
            self._text = tokenizer.detokenizer()
        self._held += self._text.put(token if is_shown else None, is_last=reason is not None)
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self._held, reason = self._held[: min(found)], "stop"
        kept = 0  # characters at the end that may be the beginning of a stop text
        for stop in self.stop if reason is None else ():
            most = min(len(self._held), len(stop) - 1)
            overlap = next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
            kept = max(kept, overlap)
        ready, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if ready:
            self.heard(ready)
        if reason is not None:
            self.finish(reason)

    def reason_after(self, token: int, ends: Collection[int]) -> str | None:
        """Why the answer ends with its next token, `token`; None if it continues. `ends` are tokens that end a text."""
        if token in self.stop_tokens or (token in ends and not self.ignores_end):
            return "stop"
        return "length" if len(self.tokens) + 1 == self.max_new_tokens else None

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        if self.reason is None:
            self.reason, self.error = reason, error
            self.begun()
            self.heard("")


class Engine:
    """Answers requests with one model, in a thread of its own.

    Args:
        defaults: what the model's generation_config.json says.
        kind: what the cache keeps of keys and values: bf16, int8 or fp32.
        context: the most tokens of a request; None takes the model's context, or less where memory is short.
        shares_prefixes: whether requests that begin alike share keys and values.
        say: takes a line for the user.

    Raises:
        InputError: there is not enough memory for a request.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        defaults: Defaults,
        *,
        kind: str = "bf16",
        context: int | None = None,
        shares_prefixes: bool = True,
        say: Say = silent,
    ):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.context, num_tokens = cache_size(model, kind, context, say)
        self.batch = Batch(model, kind, num_tokens, shares_prefixes)
        self._line: Line[Answer] = Line(MAX_WAITING, MAX_WORK)
        self._running: dict[Answer, tuple[Running, Chooser]] = {}
        self._is_short: dict[Answer, bool] = {}
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="castlm-engine", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Queues a request; cancels it after `close`. Raises `BusyError` if it is refused; another one may be, too."""
        assert answer.max_new_tokens >= 1 or answer.is_scored
        assert answer.num_cached <= self.context
        with self._changed:
            if self._is_closed:
                answer.finish("cancelled")
                return
            refused = self._line.join(answer, answer.address, answer.cost)
            for other in refused:
                if other is not answer:
                    other.finish("refused")
            if answer in refused:
                raise BusyError(f"{len(self._line.waiting())} requests wait already: try again later, or ask for less")
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        with self._changed:
            return len(self._line.waiting())

    @property
    def num_running(self) -> int:
        """Requests that are being read or decoded."""
        return len(self._running)

    @property
    def num_cache_tokens(self) -> int:
        """The tokens whose keys and values the cache holds."""
        return self.batch.blocks.num_blocks * BLOCK

    @property
    def cache_used(self) -> float:
        """The share of the cache that running requests use."""
        return self.batch.blocks.num_used / self.batch.blocks.num_blocks

    def cancel(self, answer: Answer) -> None:
        """Ends a request at the next token, unless it has ended."""
        answer.is_cancelled = True
        with self._changed:
            if answer in self._line.waiting():
                self._line.leave(answer)

    def close(self) -> None:
        """Ends the thread after the token that it computes, and every request."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether requests are answered: not after `close`."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._round():
                pass
        finally:
            with self._changed:
                self._is_closed = True
                left = [*self._line.waiting(), *self._line.served()]
            for answer in left:
                answer.finish("cancelled")

    def _round(self) -> bool:
        """Waits for something to do, takes in requests while there is room, and runs a pass; False at the end."""
        with self._changed:
            while not (self._line.waiting() or self._line.served() or self._is_closed):
                self._changed.wait()
            if self._is_closed:
                return False
            admitted = []
            while (found := self._next()) is not None:
                self._line.begin(found)
                admitted.append(found)
        work = 0.0
        for answer in admitted:
            answer.begun()
            work += _REQUEST_COST + _PROMPT_COST * answer.num_prompt
        work += self._advance()
        with self._changed:
            self._line.work(work)
            for answer in self._line.served():
                if answer.reason is not None:
                    self._line.leave(answer)
        return True

    def _next(self) -> Answer | None:
        """The request that is taken in next, if there is room for one.

        The cache holds `_LONG` contexts for all, and `_SHORT_PART` of one for short requests. The request that is due
        first waits until it fits, whatever comes after it.
        """
        waiting = self._line.waiting()
        if waiting and self._has_room(waiting[0], is_short=False):
            self._is_short[waiting[0]] = False
            return waiting[0]
        short = (answer for answer in waiting if answer.num_cached <= _SHORT * self.context)
        found = next((answer for answer in short if self._has_room(answer, is_short=True)), None)
        if found is not None:
            self._is_short[found] = True
        return found

    def _has_room(self, answer: Answer, is_short: bool) -> bool:
        held = [blocks_for(other.num_cached) for other, short in self._is_short.items() if short == is_short]
        share = _SHORT_PART / (_LONG + _SHORT_PART)
        most = self.batch.blocks.num_blocks * (share if is_short else 1 - share)
        most_together = MAX_TOGETHER // 4 if is_short else MAX_TOGETHER - MAX_TOGETHER // 4
        return len(held) < most_together and sum(held) + blocks_for(answer.num_cached) <= most

    def _begin(self, answer: Answer) -> None:
        chooser = Chooser(answer.sampling, answer.ids, self.model.vocabulary)
        self._running[answer] = self.batch.add(answer.ids, answer.num_cached, answer.is_scored), chooser

    def _advance(self) -> int:
        """Runs a pass for the requests that are served, and chooses their next tokens.

        Returns:
            How many tokens were decoded.
        """
        with self._changed:
            served = self._line.served()
        for answer in served:
            if answer.is_cancelled:
                answer.finish("cancelled")
            elif answer.reason is None and answer not in self._running:
                with _failing(answer):
                    self._begin(answer)
        self._remove_finished()
        in_order = [answer for answer in served if answer in self._running]
        count = 0
        if not in_order:
            return count
        with _failing(*in_order):
            decoded = self._read(in_order)
            by_running = {self._running[answer][0]: answer for answer in in_order}
            for running, answer in by_running.items():
                with _failing(answer):
                    self._score(running, answer)
            answers = [by_running[running] for running in decoded]
            for answer in answers:
                with _failing(answer):
                    if answer.max_new_tokens == 0:
                        answer.finish("length")
                    elif answer.grammar is not None:
                        self._running[answer][1].allow(answer.grammar.allowed())
            choosers = [self._running[answer][1] for answer in answers]
            chosen = choose(self.batch.logits[: len(decoded)], choosers, self.model.threads)
            for row, answer in enumerate(answers):
                if answer.reason is not None:
                    continue
                with _failing(answer):
                    if row in chosen.errors:
                        raise InputError(chosen.errors[row])
                    if answer.sampling.num_logprobs is not None:
                        answer.logprobs.append(chosen.logprob(row, answer.sampling.num_logprobs))
                    self._take(answer, chosen.tokens[row])
            count = len(decoded)
        self._remove_finished()
        return count

    def _read(self, answers: list[Answer]) -> list[Running]:
        """Runs a pass for `answers`. Where memory is short, the answer that reads most ends and leaves the list, among
        equals the one that is due last; the others continue.
        """
        while answers:
            try:
                return self.batch.step([self._running[answer][0] for answer in answers])
            except MemoryError as error:
                largest = max(reversed(answers), key=lambda answer: self._running[answer][0].num_unread)
                largest.finish("error", error)
                answers.remove(largest)
        return []

    def _score(self, running: Running, answer: Answer) -> None:
        """The log probabilities of the tokens of a prompt that the last step has read."""
        if running.scored is None:
            return
        done = running.cached.num_read
        given = answer.ids[done - len(running.scored) + 1 : done + 1]  # row i is of the token after token i
        num_best = answer.sampling.num_logprobs or 0
        scored = score(running.scored[: len(given)], given, num_best, self.model.threads)
        if scored.errors:
            raise InputError(NOT_FINITE)
        if not answer.prompt_logprobs:
            answer.prompt_logprobs.append(Logprob(answer.ids[0], None, ()))
        answer.prompt_logprobs += [scored.logprob(row, num_best) for row in range(len(given))]
        running.scored = None

    def _take(self, answer: Answer, token: int) -> None:
        running, chooser = self._running[answer]
        running.append(token)
        chooser.add(token)
        reason = answer.reason_after(token, self.defaults.ends)
        is_shown = reason != "stop"  # a token that ends a text is no part of it
        if answer.grammar is not None and is_shown:
            answer.grammar.take(token)
            if answer.grammar.is_done:
                reason = "stop"
        answer.take(token, self.tokenizer, reason, is_shown)

    def _remove_finished(self) -> None:
        for answer in [answer for answer in self._is_short if answer.reason is not None]:
            del self._is_short[answer]
            running, _ = self._running.get(answer, (None, None))
            if running is not None:
                self.batch.remove(running)
                del self._running[answer]


def cache_size(model: Model, kind: str, wanted: int | None, say: Say) -> tuple[int, int]:
    """The tokens that a sequence may have, and those that the cache holds.

    Args:
        wanted: the most tokens of a sequence; None takes the model's context, or less where the memory that is free
            cannot hold `_LONG` and `_SHORT_PART` of them.

    Raises:
        InputError: `wanted` is more than the model's context, or than what fits in memory.
    """
    token_bytes = block_bytes(model, kind) / BLOCK
    room = int(_MEMORY_SHARE * available_memory() / token_bytes)
    contexts = _LONG + _SHORT_PART
    most = min(model.context, int(room / contexts))
    if wanted is not None and wanted > model.context:
        raise InputError(f"context {wanted} exceeds the {model.context} tokens of the model: give less")
    if most < min(wanted or BLOCK, model.context):
        raise InputError(
            f"the memory that is free holds keys and values of {room:,} tokens, and {contexts:g} times "
            f"{wanted or BLOCK:,} are needed: free memory, or take a smaller context or cache"
        )
    context = wanted or most
    if context < model.context and wanted is None:
        say(f"requests have at most {context:,} of the model's {model.context:,} tokens: no more fit in memory")
    return context, max(int(contexts * context), min(room, _MIN_CACHE))


@contextlib.contextmanager
def _failing(*answers: Answer) -> Iterator[None]:
    """An error in the block ends these answers, and not the engine."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):  # a panic of a tokenizer is a BaseException
            raise
        if not isinstance(error, InputError | MemoryError):
            _log.error("a request failed", exc_info=error)
        for answer in answers:
            answer.finish("error", error)
