"""SIGTERM ends a command with a message, as Ctrl-C does, instead of without a word."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""The exit code."""

_AGAIN_S = 0.01
"""By then the code that has ignored an exception has usually ended."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit(TERMINATED)` in the block, so that temporary files go and child processes are told.

    Does nothing outside the main thread, which alone receives signals.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    def signal_of(error: BaseException | None) -> int | None:
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            return signal.SIGTERM
        return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, end)
    try:
        with sent_again(signal_of):
            yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def sent_again(signal_of: Callable[[BaseException | None], int | None]) -> Iterator[None]:
    """In the block, a signal is sent again where Python has ignored the exception that its handler raised.

    Python prints and ignores what is raised in a destructor or in the callback of a weak reference, which its import
    machinery has, too. A signal that arrives there would be lost, with a traceback.

    Args:
        signal_of: the signal whose handler has raised an ignored exception; None for an exception of something else.
    """
    others = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        number = signal_of(ignored.exc_value)
        if number is None:
            others(ignored)
        else:
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others
