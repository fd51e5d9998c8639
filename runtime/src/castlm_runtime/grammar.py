"""Answers that follow a JSON schema: the tokens that may come next, by the library llguidance (the extra `json`)."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castlm_runtime.errors import InputError, one_line
from castlm_runtime.tokenizer import Tokenizer

_FORM: Any = {
    # Else a model may write spaces without end.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[\x20\x0A\x09]{0,24}",
}
_MAX_STATES = 20_000  # some 40 MB; a client gives the schema
_MAX_SYMBOLS = 100_000


class GrammarError(InputError):
    """A schema is none, or takes more work than an answer may."""


class Grammar:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._allowed = np.zeros(-(-vocabulary // 32), np.uint32)

    def allowed(self) -> NDArray[np.uint32]:
        """A bit for each token that may come next, lowest first; overwritten by the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
        self._check()
        return self._allowed

    def take(self, token: int) -> None:
        """A token joins the answer."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Grammar:
        """The same state for another answer."""
        return Grammar(self._matcher.deep_copy(), 32 * len(self._allowed))

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = one_line(ValueError(self._matcher.get_error()))
            raise GrammarError(f"response_format cannot be followed ({reason}): take a simpler schema")


class Grammars:
    """Makes the grammars of answers. Safe among threads.

    Args:
        vocabulary: the number of logits.
        ends: the tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Collection[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._table: Any = None
        self._lock = threading.Lock()

    def grammar(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """The grammar of a JSON schema.

        Raises:
            InputError: llguidance is not installed, or the schema is none that it takes.
        """
        if not self._ends:
            raise InputError(
                "response_format needs a token that ends a text: generation_config.json of the model has none"
            )
        try:
            import llguidance
        except ImportError as error:
            raise InputError("response_format needs llguidance: pip install llguidance") from error
        with self._lock:  # the table of the tokens takes a second, once
            if self._table is None:
                content = self._tokenizer.to_json()
                self._table = llguidance.LLTokenizer(content, n_vocab=self._vocabulary, eos_token=self._ends)
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_FORM)
            limits = llguidance.LLParserLimits(max_lexer_states=_MAX_STATES, max_grammar_size=_MAX_SYMBOLS)
            matcher = llguidance.LLMatcher(self._table, text, log_level=0, limits=limits)
        except ValueError as error:
            raise GrammarError(f"the schema of response_format is none ({one_line(error)})") from error
        if matcher.is_error():
            reason = one_line(ValueError(matcher.get_error()))
            raise GrammarError(f"the schema of response_format is not supported ({reason})")
        return Grammar(matcher, self._vocabulary)
