"""The texts of all sparsity patterns. A new pattern is a subclass of `castlm.core.nm.Pattern` and a row of `PARSERS`.

Importing this module does not import torch, so that commands which only parse a pattern start at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.structured import pattern as structured

DENSE: Literal["dense"] = "dense"
"""The text of a model without a pattern."""

PARSERS: list[Callable[[str], Pattern | None]] = [structured.parse]
"""Functions that return the pattern of a text, or None for a text of another form; n:m is tried last."""


def all_solvers() -> tuple[str, ...]:
    """The one-shot methods of all patterns; `Pattern.solvers` lists them for one."""
    return tuple(dict.fromkeys((*NM.solvers, *structured.SCORED_BY)))


def parse_pattern(text: Pattern | str) -> Pattern:
    """The pattern that a text describes: "2:4", "channels:0.5", "heads:0.5" or "channels:0.75+2:4".

    A `Pattern` is returned as it is.

    Raises:
        InputError: a text of another form, or a number that is out of range.

    Examples:
        >>> parse_pattern("2:4")
        NM(n=2, m=4)
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise InputError(f"pattern {text!r} is not a text: try 2:4")
    found = next((pattern for parse in PARSERS if (pattern := parse(text))), None)
    if found is None and text[:1].isalpha():
        raise InputError(
            f"pattern {text!r} is neither n:m nor channels:SHARE (of the MLP channels that are kept) or heads:SHARE "
            "(KV heads with their query heads), each also with n:m, as in channels:0.75+2:4: try 2:4"
        )
    return found or NM.parse(text)


def parse_pattern_or_dense(text: Pattern | str) -> Pattern | Literal["dense"]:
    """`parse_pattern`, or the text "dense" as it is."""
    return DENSE if text == DENSE else parse_pattern(text)
