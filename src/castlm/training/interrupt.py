"""Ctrl-C and SIGTERM end a run at the next step, saved, with the command that continues it; a second Ctrl-C at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from castlm.progress import note


class Interrupted(Exception):  # noqa: N818
    """A run stopped on request and saved. `exit_code`: 130 after Ctrl-C; 0 after SIGTERM, which is pre-emption,
    and where another rank was told."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupt:
    """A context manager that turns the two signals into a request. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        note("stopping after this step, with everything saved; Ctrl-C again stops at once without saving")

    def stopped(self, step: int, output_dir: Path) -> Interrupted:
        how = f"castlm train --config {output_dir / 'config.yaml'} --resume"
        return Interrupted(
            f"stopped after step {step}, saved; continue with: {how}", 130 if self.signal == signal.SIGINT else 0
        )
