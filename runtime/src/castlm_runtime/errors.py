"""The exception for bad input, of this package and of castlm: a command prints it as one line and exits with code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """The given input cannot be used. The message is one line that names the offending value and the remedy."""

    on_all_ranks = False
    """Whether every rank of a run raises it at the same place, so that they may still act together before they end."""


def check_type(value: object, kind: type | tuple[type, ...], what: str, remedy: str) -> None:
    """Raises `InputError` unless `value` is a `kind`.

    Args:
        what: the argument and what it must be, such as "model must be an nn.Module".
    """
    if not isinstance(value, kind):
        raise InputError(f"{what}, not the {type(value).__name__} {' '.join(repr(value).split()):.100}: {remedy}")


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts `what`, such as the name of a layer, before the message of an `InputError` in the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def one_line(error: BaseException) -> str:
    """The reason of another library's error, in one line of at most 200 characters without the path of an OSError."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:200]


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked, as tokenizers does for some patterns: this is no `Exception`."""
    return type(error).__name__ == "PanicException"
