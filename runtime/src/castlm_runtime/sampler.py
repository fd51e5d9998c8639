"""Chooses the next tokens of the rows of a batch, and gives their log probabilities, by `kernels/sampler.cpp`.

The steps from logits to a token, which are those of transformers' processors, are at the head of `kernels/sampler.h`.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from castlm_runtime import library
from castlm_runtime.errors import InputError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

NOT_FINITE = "the logits of the model are not finite: its weights are damaged, or too large"
_NO_TOKENS, _NO_VALUES = np.empty((0, 0), np.int32), np.empty((0, 1), np.float32)
_NOT_FINITE = -1  # in place of a token; -2 where none is allowed


@dataclass(frozen=True)
class Sampling:
    """How a sequence chooses its tokens; the defaults take the most probable one each time.

    Attributes:
        temperature: divides the logits; 0, or less than 1e-6, takes the largest logit, the first one of equals.
        top_k: the number of tokens that are sampled from, more where logits are equal; 0 for all.
        top_p: the share of the probability that is sampled from.
        min_p: the least probability that is sampled from, as a share of the largest one.
        repetition_penalty: the logit of a token of prompt or answer is divided by it, or multiplied where it is
            negative.
        presence_penalty: is subtracted from the logit of a token of the answer.
        frequency_penalty: is subtracted as often as the answer has the token.
        logit_bias: is added to the logits, by token.
        seed: of the samples; None draws one.
        num_logprobs: the number of most probable tokens whose log probabilities are wanted, beside that of the chosen
            one; None wants none of them. They are of the logits as the model gave them.

    Raises:
        InputError: a number that is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0, 1e6),
            ("top_k", 0, math.inf),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, 1e3),
            ("presence_penalty", -1e3, 1e3),
            ("frequency_penalty", -1e3, 1e3),
        ):
            value = getattr(self, name)
            if not least <= value <= most:  # nor is NaN
                raise InputError(f"{name} {value} must be from {least:g} to {most:g}")
        for token, bias in self.logit_bias.items():
            if not -1e3 <= bias <= 1e3:
                raise InputError(f"logit_bias {bias} of token {token} must be from -1000 to 1000")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed {self.seed} must be from 0 to 2^64 - 1")


class Chooser:
    """The choice of tokens of one sequence: its settings, and the tokens that it has so far.

    Args:
        sampling: the settings.
        prompt: token ids.
        vocabulary: the number of logits of a row.

    Raises:
        InputError: a bias of a token beyond the vocabulary, or more log probabilities than there are tokens.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | Ints, vocabulary: int):
        self.sampling = sampling
        outside = [token for token in sampling.logit_bias if not 0 <= token < vocabulary]
        if outside:
            raise InputError(f"logit_bias has the token {outside[0]}: tokens are from 0 to {vocabulary - 1}")
        num_best = -1 if sampling.num_logprobs is None else sampling.num_logprobs
        if num_best > vocabulary:
            raise InputError(f"num_logprobs {num_best} is more than the {vocabulary} tokens of the model")
        self._history = np.array(prompt, dtype=np.int32)
        self._bias_tokens = np.array(list(sampling.logit_bias), dtype=np.int32)
        self._biases = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._allowed: NDArray[np.uint32] | None = None
        self._vocabulary, self._num_tokens = vocabulary, len(self._history)
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._needs_history = penalties != (1, 0, 0)
        self._spec: Any = library.structure("SampleSpec")(
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            bias_tokens=self._bias_tokens.ctypes.data,
            biases=self._biases.ctypes.data,
            num_biases=len(self._biases),
            num_prompt=len(self._history),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
            top_k=min(sampling.top_k, vocabulary),
            num_best=num_best,
            given=-1,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self._num_tokens

    def add(self, token: int) -> None:
        """A token joins the answer."""
        if self._num_tokens >= len(self._history):
            self._history = np.resize(self._history, max(64, 2 * self._num_tokens))
        self._history[self._num_tokens] = token
        self._num_tokens += 1

    def allow(self, allowed: NDArray[np.uint32] | None) -> None:
        """Limits the next token to those with a bit in `allowed` (ceil(vocabulary / 32),), lowest first; None: all."""
        if allowed is not None:
            allowed = np.ascontiguousarray(allowed, dtype=np.uint32)
            assert allowed.shape == (-(-self._vocabulary // 32),), allowed.shape
        self._allowed = allowed
        self._spec.allowed = None if allowed is None else allowed.ctypes.data

    def spec(self, given: int = -1) -> ctypes.Structure:
        """The settings of the next token; `given` is there already, and its log probability is wanted."""
        spec: ctypes.Structure = self._spec
        spec.position, spec.given = self._num_tokens, given
        if self._needs_history:
            spec.history, spec.num_history = self._history.ctypes.data, self._num_tokens
        return spec


class Logprob(NamedTuple):
    """A token and its log probability, by the logits as the model gave them, with the most probable tokens."""

    token: int
    value: float | None
    """None of the first token of a text."""
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chosen:
    """The tokens of the rows of a batch.

    Attributes:
        tokens: one for each row.
        errors: why a row has no token, by row.
        logprobs: (count, 1 + most) fp32: of the token, then of the most probable ones, of rows that want them.
        best: (count, most) int32: the most probable tokens, the first one of equals first.
    """

    tokens: list[int]
    errors: Mapping[int, str]
    logprobs: Floats
    best: Ints

    def logprob(self, row: int, num_best: int) -> Logprob:
        """The log probability of the token of a row, and those of the `num_best` most probable tokens."""
        value, *best = self.logprobs[row, : 1 + num_best].tolist()
        return Logprob(self.tokens[row], value, tuple(zip(self.best[row, :num_best].tolist(), best)))


def choose(logits: Floats, choosers: Sequence[Chooser], threads: int = 1) -> Chosen:
    """Chooses a token for each row of `logits` (count, vocabulary), which stay as they are.

    Raises:
        MemoryError: there is no memory for a copy of a row.
    """
    wanted = [number for chooser in choosers if (number := chooser.sampling.num_logprobs) is not None]
    return _sample(logits, [bytes(chooser.spec()) for chooser in choosers], max(wanted, default=None), threads)


def score(logits: Floats, tokens: Sequence[int] | Ints, num_best: int = 0, threads: int = 1) -> Chosen:
    """The log probabilities of `tokens` (count,), one for each row of `logits` (count, vocabulary).

    Args:
        num_best: the number of most probable tokens whose log probabilities are wanted too.

    Raises:
        MemoryError: there is no memory for the weights of a row.
    """
    chooser = Chooser(Sampling(num_logprobs=num_best), [], logits.shape[1])
    return _sample(logits, [bytes(chooser.spec(int(token))) for token in tokens], num_best, threads)


def _sample(logits: Floats, specs: Sequence[bytes], num_best: int | None, threads: int) -> Chosen:
    count, vocabulary = logits.shape
    assert logits.dtype == np.float32, logits.dtype
    assert logits.flags.c_contiguous
    assert len(specs) == count, (len(specs), count)
    # Between two passes through a model Python's own code is not in the cache: a call of numpy takes 10 us, not 1.
    tokens, best, logprobs, most = (ctypes.c_int32 * count)(), _NO_TOKENS, _NO_VALUES, num_best or 0
    if num_best is not None:
        best, logprobs = np.empty((count, most), np.int32), np.empty((count, 1 + most), np.float32)
    code = library.built().castlm_sample(
        *(logits.ctypes.data, count, vocabulary, b"".join(specs), ctypes.sizeof(library.structure("SampleSpec")), most),
        *(tokens, library.address(logprobs) if num_best is not None else None),
        *(library.address(best) if num_best is not None else None, threads),
    )
    library.check_memory(code)
    assert not code, "a setting of a row does not fit"
    found = list(tokens)
    errors = {
        row: NOT_FINITE if token == _NOT_FINITE else "no token is allowed here"
        for row, token in enumerate(found)
        if token < 0
    }
    return Chosen(found, errors, logprobs, best)
