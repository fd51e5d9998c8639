"""Decodes the requests of a server: several sequences together, a token of each in one call of castlm's decoder.

One thread owns the model. In each round it takes in a request if there is room, reads the next part of one prompt,
and decodes one token of up to eight sequences whose prompts have been read; `castlm.serving.admission` says whose. So
a long prompt delays the others by one part of it, and a sequence that ends makes room at once. A fifth of the memory
for keys and values is kept for short requests, because a long one keeps its part until it ends.

Models that castlm's decoder does not take run in transformers' forward, in the same rounds: each of the sequences in a
call of its own, and a prompt in one call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from castlm.core.errors import InputError, is_out_of_memory, is_panic
from castlm.hardware import available_memory
from castlm.models.architecture import context_length
from castlm.runtime.decode import ONE_SEQUENCE, DecoderState, FiniteLogits, PromptReader, decoding_method, step_together
from castlm.say import Say, silent
from castlm.serving.admission import BusyError, Line

MOST_TOGETHER = 8
"""Sequences that are decoded together."""
MOST_WAITING = 128
"""Requests that wait for their turn; more are refused."""
MOST_WORK = 32_768.0
"""What the requests that wait cost together, in tokens to decode; more are refused."""
_REQUEST_COST = 32.0  # of any request, in tokens to decode: its HTTP, its text, the first run of the model
_PROMPT_COST = 1 / 8  # of a token that is read
_SHORT = 1 / 8  # of the context, at most, is a short request
_LONG = 2.0  # contexts in the caches of all requests
_SHORT_PART = 0.5  # and more for short ones
_MEMORY_SHARE = 0.8  # of the memory that is free once the model is loaded, for all caches
_PROMPT_PART = 512  # tokens of a prompt between two tokens of the other sequences
_UNLIMITED = 32_768  # tokens of a sequence where the model sets no limit


_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Answer:
    """A request, and the text that has come of it.

    Attributes:
        ids: the prompt, (1, num_tokens).
        max_new_tokens: at least 1; prompt and answer fit the model's context.
        temperature: 0 takes the most probable token each time.
        top_p: the share of probability that is sampled from.
        top_k: the number of tokens that are sampled from, 0 for all; None leaves it to the model's generation config.
        repetition_penalty: the logit of a token of prompt or answer is divided by it, or multiplied where it is
            negative; None leaves it to the model's generation config.
        seed: of the samples; None draws one.
        stop: texts that end the answer; they are no part of it.
        begun: called when the request has been taken from the line, and when it ends.
        heard: called with each new text, and with an empty one at the end.
        address: of the client, for `castlm.serving.admission`.
        tokens: that were generated.
        reason: why the answer ended: "stop", "length", "cancelled", "refused" or "error"; None before.
        error: what went wrong.
    """

    ids: Tensor
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    repetition_penalty: float | None = None
    begun: Callable[[], None] = silent
    heard: Say = silent
    address: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    error: BaseException | None = None
    is_cancelled: bool = False
    _held: str = ""
    _first: int = 0
    _read: int = 0

    @property
    def num_prompt(self) -> int:
        """The tokens of the prompt."""
        return self.ids.shape[1]

    @property
    def num_cached(self) -> int:
        """The tokens that the sequence may have in its cache."""
        return self.num_prompt + self.max_new_tokens

    @property
    def cost(self) -> float:
        """The work that it takes, in tokens to decode."""
        return _REQUEST_COST + _PROMPT_COST * self.num_prompt + self.max_new_tokens

    def take(self, token: int, tokenizer: PreTrainedTokenizerBase, reason: str | None) -> None:
        """Adds a token. Text is handed on once no later token can change it or make it part of a stop text.

        Args:
            reason: why this token is the last one; None where it is not.
        """
        self.tokens.append(token)
        # Decoded from a few tokens before, because a tokenizer drops the space that a text begins with.
        before = tokenizer.decode(self.tokens[self._first : self._read], skip_special_tokens=True)
        text = tokenizer.decode(self.tokens[self._first :], skip_special_tokens=True)
        if reason is not None or not text.endswith("\ufffd"):  # else half a character
            self._held += text[len(before) :]
            self._first, self._read = self._read, len(self.tokens)
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

    def reason_after(self, token: int | None, ends: Collection[int]) -> str:
        """Why the answer ends with `token`, its next one; `ends` are the tokens that end a text."""
        is_full = len(self.tokens) + 1 == self.max_new_tokens
        return "length" if is_full and token not in ends else "stop"

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        if self.reason is None:
            self.reason, self.error = reason, error
            self.begun()
            self.heard("")


class _Sequence:
    """An answer whose prompt is read or that is being decoded."""

    def __init__(self, model: PreTrainedModel, answer: Answer, options: dict[str, Any], is_short: bool):
        self.answer, self.is_short = answer, is_short
        self.ids, self.unread = answer.ids, answer.ids
        self.logits: Tensor | None = None
        self.random = torch.Generator(answer.ids.device)
        if answer.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(answer.seed)
        self.processor: LogitsProcessorList
        self.criteria: StoppingCriteriaList
        self.config: GenerationConfig
        self.inputs: dict[str, Any]
        self.processor, self.criteria, self.config, self.inputs = model.generate(custom_generate=_settings, **options)

    def read_part(self) -> None:
        """Runs the next part of the prompt, and with the last one prepares decoding."""
        raise NotImplementedError

    @staticmethod
    def step(sequences: Sequence[Any], tokens: Tensor) -> None:
        """Runs the model on the last of the `tokens` (count,) of sequences of this class."""
        raise NotImplementedError

    def choose(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> Tensor:
        """The next token (1,), which joins the answer; `ends` are the tokens that end a text."""
        scores = self.processor(self.ids, self.logits)
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.random)[0]
        else:
            token = scores.argmax(-1)
        self.ids = torch.cat([self.ids, token[None]], dim=1)
        reason = None
        if bool(self.criteria(self.ids, scores).all()):
            reason = self.answer.reason_after(int(token), ends)
        self.answer.take(int(token), tokenizer, reason)
        return token


class _Packed(_Sequence):
    """A sequence of castlm's decoder."""

    def __init__(self, model: PreTrainedModel, answer: Answer, options: dict[str, Any], is_short: bool):
        super().__init__(model, answer, options, is_short)
        self.prompt: PromptReader | None = PromptReader(model, answer.num_cached)
        self.state: DecoderState | None = None

    def read_part(self) -> None:
        part, self.unread = self.unread[:, :_PROMPT_PART], self.unread[:, _PROMPT_PART:]
        assert self.prompt is not None
        logits = self.prompt.read(part)
        if self.unread.numel() == 0:
            self.state, self.logits, self.prompt = self.prompt.finish(), logits, None

    @staticmethod
    def step(sequences: Sequence[_Packed], tokens: Tensor) -> None:
        with _failing(*(sequence.answer for sequence in sequences)):
            states = [sequence.state for sequence in sequences if sequence.state is not None]
            logits = step_together(states, tokens)
            for row, sequence in enumerate(sequences):
                sequence.logits = logits[row : row + 1]


class _Plain(_Sequence):
    """A sequence of transformers' forward, whose inputs are prepared as `generate` prepares them."""

    def __init__(self, model: PreTrainedModel, answer: Answer, options: dict[str, Any], is_short: bool):
        super().__init__(model, answer, options, is_short)
        self.model = model

    def read_part(self) -> None:
        self.logits = self._forward(None, is_first_iteration=True)
        self.unread = self.unread[:, :0]

    @staticmethod
    def step(sequences: Sequence[_Plain], tokens: Tensor) -> None:
        for sequence in sequences:
            with _failing(sequence.answer):
                sequence.logits = sequence._forward(1 if sequence.inputs.get("use_cache") else None)

    def _forward(self, num_new: int | None, **more: bool) -> Tensor:
        """Logits (1, vocabulary) in fp32 after `ids`, of which the last `num_new` are in no cache yet; None: all."""
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=num_new, **more, **self.inputs)
        output = self.model(**inputs, return_dict=True)
        self.inputs = self.model._update_model_kwargs_for_generation(output, self.inputs)
        logits: Tensor = output.logits[:, -1].to(torch.float32, copy=True)  # a view would keep those of the prompt
        return logits


def _settings(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig, dict[str, Any]]:
    """The stopping rules, the generation config and the inputs of the model that `generate` would use for a request."""
    return logits_processor, stopping_criteria, generation_config, inputs


class Engine:
    """Answers requests with one model, in a thread of its own.

    Args:
        model: as `castlm.runtime.generate.load_to_generate` gives it.
        say: takes a line that says why castlm's decoder is not used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        say: Say = silent,
    ):
        self.model, self.tokenizer = model, tokenizer
        is_packed = decoding_method(model, say=say, **ONE_SEQUENCE) is not None
        self.context = _fitting_context(model, is_packed, say)
        eos = model.generation_config.eos_token_id
        self._ends = frozenset([eos] if isinstance(eos, int) else eos or ())
        self._kind: type[_Packed | _Plain] = _Packed if is_packed else _Plain
        if not is_packed:
            say("requests take turns, a token each: castlm pack makes a model that decodes eight of them together")
        self._line: Line[Answer] = Line(MOST_WAITING, MOST_WORK)
        self._sequences: list[_Packed | _Plain] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._num_threads = torch.get_num_threads()  # each thread of Python's has a number of its own
        self._thread = threading.Thread(target=self._run, name="castlm-engine", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Queues a request; cancels it after `close`. Raises `BusyError` if it is refused; another one may be, too."""
        assert answer.max_new_tokens >= 1
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

    def cancel(self, answer: Answer) -> None:
        """Ends a request at the next token; nothing of one that has ended."""
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
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while self._round():
                    pass
        finally:
            with self._changed:
                self._is_closed = True
                left = [*self._line.waiting(), *self._line.served()]
            for answer in left:
                answer.finish("cancelled")

    def _round(self) -> bool:
        """Waits for something to do, takes in a request if there is room, and advances the others; False at the end."""
        with self._changed:
            while not (self._line.waiting() or self._sequences or self._is_closed):
                self._changed.wait()
            if self._is_closed:
                return False
            admitted, is_short = self._next()
            if admitted is not None:
                self._line.begin(admitted)
        work = 0.0
        if admitted is not None:
            admitted.begun()
            with _failing(admitted):
                self._admit(admitted, is_short)
            work = _REQUEST_COST + _PROMPT_COST * admitted.num_prompt
        work += self._advance()
        with self._changed:
            self._line.work(work)
            for answer in self._line.served():
                if answer.reason is not None:
                    self._line.leave(answer)
        return True

    def _next(self) -> tuple[Answer | None, bool]:
        """The request that is taken in next, and whether into the part that is kept for short ones.

        The caches together hold `_LONG` contexts, and `_SHORT_PART` of one for short requests. The request that is due
        first waits until it fits, whatever comes after it.
        """
        waiting = self._line.waiting()
        if waiting and self._has_room(waiting[0], is_short=False):
            return waiting[0], False
        short = (answer for answer in waiting if answer.num_cached <= _SHORT * self.context)
        return next((answer for answer in short if self._has_room(answer, is_short=True)), None), True

    def _has_room(self, answer: Answer, is_short: bool) -> bool:
        held = [sequence.answer.num_cached for sequence in self._sequences if sequence.is_short == is_short]
        most = (_SHORT_PART if is_short else _LONG) * self.context
        return len(held) < MOST_TOGETHER and sum(held) + answer.num_cached <= most

    def _admit(self, answer: Answer, is_short: bool) -> None:
        answer.ids = answer.ids.to(self.model.device)
        tokenizer = self.tokenizer
        sampling: dict[str, Any] = {"do_sample": False}
        if answer.temperature > 0:
            sampling = {"do_sample": True, "temperature": answer.temperature, "top_p": answer.top_p}
            if answer.top_k is not None:
                sampling["top_k"] = answer.top_k
        if answer.repetition_penalty is not None:
            sampling["repetition_penalty"] = answer.repetition_penalty
        options = {
            "input_ids": answer.ids,
            "attention_mask": torch.ones_like(answer.ids),
            "max_new_tokens": answer.max_new_tokens,
            "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            "logits_processor": LogitsProcessorList([FiniteLogits()]),
            "tokenizer": tokenizer,  # for stop_strings of the generation config
            **ONE_SEQUENCE,
            **sampling,
        }
        self._sequences.append(self._kind(self.model, answer, options, is_short))

    def _advance(self) -> int:
        """Reads a part of the prompt that is due first, and decodes a token of each sequence that is due first.

        Returns:
            How many tokens were decoded.
        """
        for sequence in self._sequences:
            if sequence.answer.is_cancelled:
                sequence.answer.finish("cancelled")
        self._keep_unfinished()
        with self._changed:
            order = {answer: place for place, answer in enumerate(self._line.served())}
        in_order = sorted(self._sequences, key=lambda sequence: order[sequence.answer])
        first_unread = next((sequence for sequence in in_order if sequence.unread.numel()), None)
        if first_unread is not None:
            with _failing(first_unread.answer):
                first_unread.read_part()
        tokens: dict[_Packed | _Plain, Tensor] = {}
        for sequence in [sequence for sequence in in_order if sequence.logits is not None][:MOST_TOGETHER]:
            with _failing(sequence.answer):
                tokens[sequence] = sequence.choose(self.tokenizer, self._ends)
        live = [sequence for sequence in tokens if sequence.answer.reason is None]
        if live:
            self._kind.step(live, torch.cat([tokens[sequence] for sequence in live]))
        self._keep_unfinished()
        return len(tokens)

    def _keep_unfinished(self) -> None:
        self._sequences = [sequence for sequence in self._sequences if sequence.answer.reason is None]


def _fitting_context(model: PreTrainedModel, is_packed: bool, say: Say) -> int:
    """The tokens that a sequence may have: the model's context, or less where memory cannot hold two and a half."""
    config = model.config.get_text_config()
    context = context_length(config) or _UNLIMITED
    num_heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    token_bytes = 2 * config.num_hidden_layers * num_kv_heads * head_dim * (4 if is_packed else model.dtype.itemsize)
    room = _MEMORY_SHARE * available_memory(model.device.type) / ((_LONG + _SHORT_PART) * token_bytes)
    if room >= context:
        return context
    say(f"requests have at most {int(room):,} of the model's {context:,} tokens: no more keys and values fit in memory")
    return int(room)


@contextlib.contextmanager
def _failing(*answers: Answer) -> Iterator[None]:
    """An error in the block ends these answers, and not the engine."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):  # a panic of a tokenizer is a BaseException
            raise
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            _log.error("a request failed", exc_info=error)
        for answer in answers:
            answer.finish("error", error)
