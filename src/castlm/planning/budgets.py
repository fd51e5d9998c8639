"""Which token budgets a sweep runs: a geometric series or a list, and whether a law can be seen in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from castlm.core.errors import InputError

SMALLEST_SHARE = 1 / 64


def geometric_budgets(largest: float, smallest: float | None, num: int) -> list[int]:
    """`num` budgets, each by the same factor above the one before; `smallest` None is a 64th of `largest`.

    Raises:
        InputError: fewer than 2, or bounds that are not positive numbers in order.
    """
    smallest = largest * SMALLEST_SHARE if smallest is None else smallest
    if not 0 < smallest < largest < math.inf:
        raise InputError(f"budgets from {smallest:g} to {largest:g} tokens: the largest must be above the smallest")
    if num < 2:
        raise InputError(f"budgets is {num}: it must be at least 2")
    factor = (largest / smallest) ** (1 / (num - 1))
    return [round(smallest * factor**i) for i in range(num)]


def listed_budgets(text: str) -> list[int]:
    """Numbers with commas, in ascending order. Raises InputError when one is none."""
    try:
        return sorted(int(float(number)) for number in text.split(","))
    except (ValueError, OverflowError):
        raise InputError(f"tokens {text!r} are not numbers: write --tokens 1e5,3e5,1e6") from None


def check_budgets(budgets: Sequence[int], form: str) -> None:
    """Refuses ascending budgets whose smaller ones could never predict the largest.

    Raises:
        InputError: too few, too near each other, or over too short a range.
    """
    from castlm.planning.fit import MIN_BUDGETS, MIN_SPREAD, SAME_BUDGET

    least = MIN_BUDGETS[form] + 1
    if len(budgets) < least:
        other = "loglinear"
        remedy = f", or use --form {other}" if len(budgets) > MIN_BUDGETS[other] else ""
        raise InputError(
            f"{len(budgets)} budgets: the {form} form needs {least} to predict the largest from the others; give more "
            f"budgets{remedy}"
        )
    for one, following in itertools.pairwise(budgets):
        if math.log(following / one) <= SAME_BUDGET:
            raise InputError(f"budgets of {one:,} and {following:,} tokens, in whole steps, are one: set them apart")
    if budgets[-2] < MIN_SPREAD * budgets[0]:
        raise InputError(
            f"budgets below the largest go from {budgets[0]:,} to {budgets[-2]:,} tokens: a law needs a factor of "
            f"{MIN_SPREAD:g} between them; start from a smaller one"
        )
