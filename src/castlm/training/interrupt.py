"""Ctrl-C and SIGTERM end a run with a message.

While the run loads, they end it at once, because there is nothing to save. Later, they end it after the current step,
with a checkpoint. A second Ctrl-C always ends it at once.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

from castlm.progress import note
from castlm.signals import sent_again


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
            self._undo.enter_context(sent_again(self._signal_of))
            for number in (signal.SIGINT, signal.SIGTERM):
                self._undo.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo.close()
        if self.signal is not None and not self._is_training and isinstance(error, Exception):
            raise self._while_loading(self.signal) from error  # a library raised its own error instead

    def _signal_of(self, error: BaseException | None) -> int | None:
        return self.signal if isinstance(error, Interrupted) else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_training:
            self.signal = number  # if a library swallows the exception, the run ends after its first step
            raise self._while_loading(number)
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        note(f"{self._ends_with}; Ctrl-C again stops at once without saving")

    def _while_loading(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(f"stopped by {name} while loading", "nothing was changed", 128 + number)

    def stopped(self, step: int, output_dir: Path) -> Interrupted:
        how = f"continue with: castlm train --config {shlex.quote(str(output_dir / 'config.yaml'))} --resume"
        return Interrupted(f"stopped after step {step}, saved", how, 130 if self.signal == signal.SIGINT else 0)
