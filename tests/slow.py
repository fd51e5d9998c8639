"""Marks cases that repeat, over more ranks, families, options or moments of a kill, what a quicker test holds.

`make test` leaves them out, so that it ends within a few minutes; `make test-slow` runs them, and CI runs both.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case of `pytest.mark.parametrize` that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """`cases`, all of them slow but the `quick` ones."""
    return [case if case in quick else slow(case) for case in cases]
