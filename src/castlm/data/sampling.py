"""Training text that a model writes itself, where there is no other: from nothing, after prompts, or as conversations.

The work is divided into batches, each with its own prompts and seed. An interrupted run therefore continues with the
next batch and writes the same text as an uninterrupted one, on the same device and version of torch.

Conversations are sampled as in Magpie (arXiv 2406.08464): the model continues its chat template at the user's turn,
then answers itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from castlm.core.errors import InputError
from castlm.data.chat.template import Chat
from castlm.data.columns import CUT_COLUMN, Kind
from castlm.data.documents import open_documents
from castlm.data.options import SamplingOptions, TextOptions
from castlm.data.tokens import Encoder
from castlm.files.reading import read_text
from castlm.models.architecture import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTINEL = "castlm-user-turn"


class Sample(NamedTuple):
    """A document that the model wrote."""

    row: dict[str, Any]
    """The row of the file: `messages`, or `text` with `is_cut` (true if the model did not end the text)."""
    num_tokens: int
    """The prompt and the generated text."""
    is_whole: bool
    """Whether the model ended the text before `max_new_tokens` cut it."""


class _Continued(NamedTuple):
    ids: list[int]
    """The generated tokens without the one that ended them."""
    is_whole: bool


class Sampler:
    """Samples batches of documents.

    Args:
        model: in eval mode.
        prompts: texts to continue, or with `chat` the user's turns; used in order, repeatedly. None starts from the
            token that begins a document; with `chat` it samples the user's turn too.
        chat: sample conversations of one turn each, in the tokenizer's chat template.

    Raises:
        InputError: a prompt that leaves no room in the model's context, or a tokenizer whose template does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        *,
        prompts: Sequence[str] | None = None,
        chat: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.options, self.chat = model, tokenizer, options, chat
        self.prompts = list(prompts) if prompts is not None else None
        encoder = Encoder(tokenizer)
        self._template = encoder.chat
        self._first = encoder.bos or [encoder.eos]
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._ends = sorted({encoder.eos, *encoder.bos, *ends})  # a document also ends where the next one begins
        self._user: list[int] = []
        if chat:
            before, end = _user_turn(tokenizer, self._template)
            self._user, self._ends = self._encode(before), sorted({*self._ends, end})
        self._longest = context_length(model.config)
        for prompt in self.prompts or [""]:
            self._check_room(self._begin(prompt))

    def batch(self, number: int) -> Sequence[Sample | None]:
        """Samples a batch, in order; the same number and options give the same samples.

        With `chat`, a conversation with an empty or unfinished turn is None.
        """
        size = self.options.batch_size
        prompts = [prompt_of(self.prompts, number * size + row) for row in range(size)]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        seed = np.random.SeedSequence([self.options.seed, number]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(int(seed[0]))
            return self._talk(prompts) if self.chat else self._write(prompts)

    def _write(self, prompts: list[str]) -> list[Sample]:
        begins = [self._begin(prompt) for prompt in prompts]
        samples = []
        for prompt, begin, (ids, is_whole) in zip(prompts, begins, self._continue(begins)):
            row = {"text": prompt + self._after(begin, ids), CUT_COLUMN: not is_whole}
            samples.append(Sample(row, len(begin) + len(ids), is_whole))
        return samples

    def _talk(self, prompts: list[str]) -> list[Sample | None]:
        users: list[_Continued] | None = None
        if self.prompts is None:
            users = self._continue([self._user] * len(prompts))
            prompts = [self._decode(user.ids).strip() for user in users]
        asked = [bool(prompt.strip()) and (users is None or users[row].is_whole) for row, prompt in enumerate(prompts)]
        begins = {row: self._begin(prompts[row]) for row, ok in enumerate(asked) if ok}
        if self._longest is not None:  # a long question leaves no room for an answer
            most = self._longest - self.options.max_new_tokens
            begins = {row: begin for row, begin in begins.items() if len(begin) <= most}
        samples: list[Sample | None] = [None] * len(prompts)
        for (row, begin), answer in zip(begins.items(), self._continue([*begins.values()])):
            if answer.is_whole and (text := self._decode(answer.ids).strip()):
                messages = [_user(prompts[row]), {"role": "assistant", "content": text}]
                samples[row] = Sample({"messages": messages}, len(begin) + len(answer.ids), True)
        return samples

    def _begin(self, prompt: str) -> list[int]:
        """The token ids that are continued."""
        if not self.chat:
            ids = self._encode(prompt)
            return self._first + ids
        if not prompt:
            return self._user
        return self._encode(self._template.render([_user(prompt)], reply=True))

    def _check_room(self, begin: list[int]) -> None:
        if self._longest is not None and len(begin) + self.options.max_new_tokens > self._longest:
            raise InputError(
                f"{len(begin)} tokens of prompt and {self.options.max_new_tokens} new ones exceed the model's "
                f"{self._longest} positions: lower max_new_tokens"
            )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _after(self, begin: list[int], ids: list[int]) -> str:
        """The text of `ids`, decoded together with `begin`: some tokenizers drop the space before the first word."""
        before, whole = self._decode(begin), self._decode(begin + ids)
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _continue(self, begins: list[list[int]]) -> list[_Continued]:
        """Samples after each of `begins`, in one batch, padded on the left."""
        if not begins:
            return []
        width = max(map(len, begins))
        ids = torch.full((len(begins), width), self._ends[0], device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, begin in enumerate(begins):
            ids[row, width - len(begin) :] = torch.tensor(begin)
            mask[row, width - len(begin) :] = 1
        config = GenerationConfig(
            do_sample=True,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            top_k=0,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
        )
        own = self.model.generation_config
        self.model.generation_config = config  # transformers would fill unset options from it
        try:
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        finally:
            self.model.generation_config = own
        found, ends = [], set(self._ends)
        for row in output[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), None)
            found.append(_Continued(row[:end], end is not None))
        return found


def prompt_of(prompts: Sequence[str] | None, place: int) -> str:
    """The prompt of sample number `place`, counted over the batches; "" without prompts."""
    return prompts[place % len(prompts)] if prompts is not None else ""


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _user_turn(tokenizer: PreTrainedTokenizerBase, template: Chat) -> tuple[str, int]:
    """The text that the chat template puts before a user's first turn, and the token that ends the turn.

    Raises:
        InputError: there is no template, or it has no such token.
    """
    before, found, after = template.render([_user(_SENTINEL)]).partition(_SENTINEL)
    ends = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    if not found or not before or not ends or ends[0] not in tokenizer.all_special_ids:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} does not end a user's turn with a special token "
            f"({after[:20]!r} follows it): sample without chat"
        )
    return before, int(ends[0])


def read_prompts(path: str | Path, options: TextOptions) -> list[str]:
    """The prompts in a file: the lines of a .txt file, else the texts of `open_documents`.

    Raises:
        InputError: as `open_documents`; the documents are conversations, or there is no prompt.
    """
    if str(path).lower().endswith(".txt"):
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        documents = open_documents(path, options)
        if documents.kind is not Kind.TEXT:
            raise InputError(f"{path} holds conversations: name a column of texts")
        prompts = [piece.text for piece in documents.pieces(None)]
    if not prompts:
        raise InputError(f"{path} holds no prompt: give one on each line")
    return prompts
