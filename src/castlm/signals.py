"""SIGTERM ends a command with a message, as Ctrl-C does, instead of without a word."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""The exit code."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit(TERMINATED)` in the block, so that temporary files go and child processes are told.

    Does nothing outside the main thread, which alone receives signals.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
