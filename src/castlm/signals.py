"""Ctrl-C and SIGTERM end a command with a message, and a run with a checkpoint.

While a run loads, they end it at once, because there is nothing to save. Later, they end it after the current step,
with a checkpoint. A second Ctrl-C always ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

TERMINATED = 128 + signal.SIGTERM  # the exit code
_AGAIN_S = 0.01  # seconds until a signal is sent again; by then the code that ignored it has usually ended


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


class Interrupted(BaseException):
    """A signal stopped the run. It is no `Exception`, so that code which reports bad input does not catch it.

    Attributes:
        reason: the signal and the step, without the advice what to do next.
        exit_code: after a save, 130 for Ctrl-C, and 0 for SIGTERM, by which a scheduler pre-empts, and for a signal to
            another rank. While loading, 130 and 143.
    """

    def __init__(self, reason: str, then: str, exit_code: int) -> None:
        super().__init__(f"{reason}; {then}")
        self.reason, self.exit_code = reason, exit_code


class Interrupt:
    """A context manager that handles the two signals. Outside the main thread it does nothing.

    A signal raises `Interrupted` until `start_training` is called, and sets `requested` from then on.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._is_training = False
        self._ends_with = "stopping after this step, with everything saved"
        self._undo = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def start_training(self) -> None:
        """From now on, a signal ends the run after the current step."""
        self._is_training = True

    def start_export(self) -> None:
        """From now on, a signal ends the run after the result is written."""
        self._ends_with = "the model is being written, and the run ends with that"

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._undo.enter_context(sent_again(lambda error: self.signal if isinstance(error, Interrupted) else None))
            for number in (signal.SIGINT, signal.SIGTERM):
                self._undo.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo.close()
        if self.signal is not None and not self._is_training and isinstance(error, Exception):
            raise self._while_loading(self.signal) from error  # a library raised its own error instead

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_training:
            self.signal = number  # if a library swallows the exception, the run ends after its first step
            raise self._while_loading(number)
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        from castlm.progress import note  # imports rich, which the list of commands need not load

        note(f"{self._ends_with}; Ctrl-C again stops at once without saving")

    def _while_loading(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(f"stopped by {name} before the first step", "nothing was changed", 128 + number)

    def stopped(self, step: int, output_dir: Path) -> Interrupted:
        how = f"continue with: castlm train --config {shlex.quote(str(output_dir / 'config.yaml'))} --resume"
        return Interrupted(f"stopped after step {step}, saved", how, 130 if self.signal == signal.SIGINT else 0)
