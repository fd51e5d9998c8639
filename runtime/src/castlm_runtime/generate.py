"""Continues one prompt, printing the text as it comes: for `generate` on the command line and for a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from castlm_runtime.chat import ChatTemplate
from castlm_runtime.defaults import Defaults
from castlm_runtime.engine import Answer, Batch, cache_size, silent
from castlm_runtime.errors import InputError
from castlm_runtime.model import Model
from castlm_runtime.sampler import Chooser, Sampling, choose
from castlm_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generated:
    """A generated text, the numbers of its tokens, and its times."""

    text: str
    """The continuation, without special tokens."""
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    """Seconds until the first new token."""
    tokens_per_second: float
    """Speed of the tokens after the first one, which comes with the prompt; 0 for a single token."""
    tokens: tuple[int, ...] = ()
    """The new tokens."""

    def __str__(self) -> str:
        """The numbers and times in one line."""
        return (
            f"{self.prompt_tokens} tokens of prompt in {self.prompt_seconds:.2f} s, "
            f"{self.new_tokens} new tokens, {self.tokens_per_second:.1f} a second"
        )


def check_tokens(ids: Sequence[int], model: Model) -> None:
    """Raises `InputError` if the model lacks a token, as where its tokenizer has more."""
    if max(ids) >= model.vocabulary:
        raise InputError(
            f"token id {max(ids)} is not in the vocabulary of the model, which has {model.vocabulary} tokens: use the "
            "tokenizer of this model"
        )


class Session:
    """A model with a cache: prompts that begin alike share what has been read, as the turns of a conversation do.

    Args:
        kind: what the cache keeps: bf16, int8 or fp32.
        context: the most tokens of a prompt and its answer; None takes the model's context, or less where memory is
            short.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        defaults: Defaults,
        *,
        kind: str = "bf16",
        context: int | None = None,
        say: Callable[[str], None] = silent,
    ):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        self.context, num_tokens = cache_size(model, kind, context, say)
        self._batch = Batch(model, kind, num_tokens)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int = 0,
        kind: str = "bf16",
        context: int | None = None,
        say: Callable[[str], None] = silent,
    ) -> Session:
        """The model of a folder. Raises `InputError` as `Model.open` and `Tokenizer.open` do."""
        tokenizer = Tokenizer.open(folder)  # before the model: reading it takes 40 MiB for a moment
        model = Model.open(folder, threads)
        return cls(model, tokenizer, Defaults.open(folder), kind=kind, context=context, say=say)

    def encode(self, prompt: str, raw: bool = False) -> list[int]:
        """The tokens of a prompt: as a user's turn where the tokenizer has a chat template, unless `raw`.

        Raises:
            InputError: an empty prompt, or a template that refuses it.
        """
        chat = ChatTemplate(self.tokenizer)
        if chat.has_template and not raw:
            text = chat.render([{"role": "user", "content": prompt}], reply=True)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self.tokenizer.encode(prompt)
        if not ids:
            raise InputError("the prompt is empty: give some text")
        return ids

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        ignores_end: bool = False,
        write: Callable[[str], None] = silent,
    ) -> Generated:
        """Continues a prompt, calling `write` with text as it comes.

        Args:
            ids: the tokens of the prompt.
            temperature: 0, or less than 1e-6, takes the most probable token; above, tokens are sampled.
            ignores_end: whether no token ends the text, for timing.

        Raises:
            InputError: more tokens than the context holds, or logits that are not finite.
        """
        check_tokens(ids, self.model)
        if len(ids) + max_new_tokens > self.context:
            remedy = "lower max_new_tokens" if len(ids) < self.context else "shorten the prompt"
            raise InputError(
                f"{len(ids)} tokens of prompt and {max_new_tokens} new ones exceed the context of {self.context}: "
                f"{remedy}"
            )
        of = self.defaults
        sampling = Sampling(
            temperature, of.top_k, of.top_p, repetition_penalty=of.repetition_penalty, seed=seed % (1 << 64)
        )
        chooser = Chooser(sampling, ids, self.model.vocabulary)
        pieces: list[str] = []

        def hear(text: str) -> None:
            if text:
                pieces.append(text)
                write(text)

        answer = Answer(list(ids), max_new_tokens, stop=of.stop, heard=hear)
        times = [time.perf_counter()]
        running = self._batch.add(ids, len(ids) + max_new_tokens)
        try:
            while answer.reason is None:
                if not self._batch.step([running]):
                    continue
                chosen = choose(self._batch.logits[:1], [chooser], self.model.threads)
                if chosen.errors:
                    raise InputError(chosen.errors[0])
                token = chosen.tokens[0]
                running.append(token)
                chooser.add(token)
                times.append(time.perf_counter())
                reason = answer.reason_after(token, () if ignores_end else of.ends)
                answer.take(token, self.tokenizer, reason, is_shown=reason != "stop")
        finally:
            self._batch.remove(running)
        seconds = times[-1] - times[1]
        return Generated(
            "".join(pieces),
            prompt_tokens=len(ids),
            new_tokens=len(answer.tokens),
            prompt_seconds=times[1] - times[0],
            tokens_per_second=(len(times) - 2) / seconds if seconds > 0 else 0.0,
            tokens=tuple(answer.tokens),
        )
