"""Makes SIGTERM end a command with a message, as Ctrl-C does."""

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
"""Seconds until a signal is sent again; by then the code that ignored the exception has usually ended."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit(TERMINATED)` in the block, so that temporary files are removed and child
    processes told.

    If a library replaces that exception, or the `KeyboardInterrupt` of Ctrl-C, by its own error, the block still ends
    with the exception of the signal. Does nothing outside the main thread, since only that receives signals.
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
    """Sends a signal again if Python ignored the exception that its handler raised in the block.

    Python prints and ignores exceptions in destructors and weak reference callbacks, which its import machinery uses
    too. A signal that arrives there would be lost, with a traceback.

    Args:
        signal_of: returns the signal whose handler raised an ignored exception; None for any other exception.
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
