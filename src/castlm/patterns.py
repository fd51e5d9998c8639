"""All patterns of castlm by their texts. Importing castlm imports this module, so that every function knows them.

Importing this module does not import torch, so that commands which only parse a pattern start at once.
"""

from __future__ import annotations

from typing import Literal

from castlm.core.nm import PARSERS, Pattern, parse_pattern
from castlm.structured import pattern as structured

__all__ = ["DENSE", "PARSERS", "parse_pattern", "parse_pattern_or_dense"]

DENSE: Literal["dense"] = "dense"
"""The text of a model without a pattern."""

_UNITS = (
    "channels:SHARE (of the MLP channels that are kept) or heads:SHARE (KV heads with their query heads), each also "
    "with n:m, as in channels:0.75+2:4"
)
PARSERS[_UNITS] = structured.parse


def parse_pattern_or_dense(text: Pattern | str) -> Pattern | Literal["dense"]:
    """`parse_pattern`, or the text "dense" as it is."""
    return DENSE if text == DENSE else parse_pattern(text)
