"""Strategies for files, and the rule of all fuzz tests: every input ends in an answer or in an error, in time.

The command prints any error as one line, so that a rare input may end in the error of a library.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("CASTLM_FUZZ_EXAMPLES", "15"))
"""Inputs that each test tries; `make fuzz` sets more."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 15,  # the same inputs in every run of `make test`
    suppress_health_check=list(HealthCheck),
)
SECONDS = 60.0
"""Of processor time, far more than any of these inputs takes: what takes longer hangs. A call that waits has ten times
as long, since a machine may be busy with other work."""


class Hangs(BaseException):
    """The stack of a call that hangs. Not an `Exception`, so that no handler takes it for bad input."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs("".join(traceback.format_stack(frame)))

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 10 * SECONDS))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def answers(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call, or the error that it raised; a hang, a crash, or memory that runs out fails the test."""
    try:
        with time_limit():
            return function(*arguments, **options)
    except MemoryError:
        raise
    except Exception as error:
        return error
    except Hangs as hang:
        # The signal may come at an instruction without a line number, whose traceback pytest cannot print. An ordinary
        # failure is also one of which hypothesis prints the input.
        error = f"{function.__qualname__} does not end for {arguments!r:.2000}:\n{hang}"
    raise AssertionError(error)


HOSTILE_JSON = st.sampled_from(
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        '"\\ud800"',
        '"\\u0000"',
        "null",
        "",
        "\ufeff{}",
        '{"a": 1, "a": 2}',
    ]
).map(str.encode)

NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, 5e-324, float("nan"), float("inf")])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def to_json(content: Any) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # a file may hold a number of any length
    try:
        return json.dumps(content).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def objects(fields: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON files near `fields`: some of them replaced or removed, some added; or anything at all."""

    def changed(changes: dict[str, Any], removed: set[str]) -> bytes:
        return to_json({name: value for name, value in (fields | changes).items() if name not in removed})

    names = st.sampled_from(sorted(fields)) | st.text(max_size=5)
    near = st.builds(
        changed, st.dictionaries(names, VALUES, max_size=3), st.sets(st.sampled_from(sorted(fields)), max_size=1)
    )
    return near | near | VALUES.map(to_json) | HOSTILE_JSON | st.binary(max_size=60) | damaged(to_json(fields))


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut short, or with a few bytes replaced, inserted or removed."""

    def apply(edits: list[tuple[int, int, bytes]], length: int) -> bytes:
        result = content
        for at, skip, new in edits:
            result = result[:at] + new + result[at + skip :]
        return result[:length]

    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 8), st.binary(max_size=8))
    return st.builds(apply, st.lists(edit, max_size=3), st.integers(0, len(content)) | st.just(1 << 30))
