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

    Where a library replaces that exception, or the `KeyboardInterrupt` of Ctrl-C, by an error of its own, the block
    still ends with the exception of the signal. Does nothing outside the main thread, which alone receives signals.
    """
    raised: list[BaseException] = []

    def end(number: int, frame: FrameType | None) -> None:
        raised.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(TERMINATED))
        raise raised[-1]

    def signal_of(error: BaseException | None) -> int | None:
        if isinstance(error, SystemExit) and error.code == TERMINATED:
            return signal.SIGTERM
        return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as under nohup
        numbers.append(signal.SIGINT)
    old = {number: signal.signal(number, end) for number in numbers}
    try:
        with sent_again(signal_of):
            yield
    except Exception as error:
        if raised:
            raise raised[-1] from error
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
