"""The patterns that commands and configs take, by their texts.

Importing this module does not import torch, so that commands which only parse a pattern start at once.
"""

from __future__ import annotations

from typing import Literal

from castlm.core import nm
from castlm.core.errors import InputError
from castlm.core.nm import Pattern

DENSE: Literal["dense"] = "dense"
"""The text of a model without a pattern."""


def parse_pattern(text: Pattern | str) -> Pattern:
    """`castlm.core.nm.parse_pattern`, which also names the commands that remove channels and heads.

    Examples:
        >>> parse_pattern("2:4")
        NM(n=2, m=4)
    """
    if isinstance(text, str) and text.startswith(("channels:", "heads:")):
        raise InputError(
            f"pattern {text} removes whole units, not single weights: castlm cut --model MODEL --units "
            f"{text.partition('+')[0]} --calibration TEXT --output-dir CUT makes a smaller dense model, and castlm "
            "train --method dense --model CUT --teacher MODEL --dataset TEXT --output-dir RUN trains it"
        )
    return nm.parse_pattern(text)


def parse_pattern_or_dense(text: Pattern | str) -> Pattern | Literal["dense"]:
    """`parse_pattern`, or the text "dense" as it is."""
    return DENSE if text == DENSE else parse_pattern(text)
