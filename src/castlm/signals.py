"""Ctrl-C and SIGTERM end a command with a message. A run that is training also saves a checkpoint.

A run ends after the current step. Before the first step it ends at once, like any other command: the only work to save
is the finished blocks of its start, and those are saved already. A second Ctrl-C always ends the command at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

TERMINATED = 128 + signal.SIGTERM  # the exit code
_AGAIN_S = 0.01  # seconds until a signal is sent again; by then the code that ignored it has usually ended


def num_ranks() -> int:
    """The number of ranks that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stopped_by_sigterm() -> str:
    """The message of a command that SIGTERM has ended; under torchrun, with the most frequent reason."""
    if num_ranks() == 1:
        return "stopped by SIGTERM"
    return (
        "stopped by SIGTERM, which torchrun sends to all ranks when one of them has ended: its error stands above, if "
        "it had time to print one; the same command continues"
    )


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit(TERMINATED)` in the block, so that temporary files are removed and child
    processes told.

    If a library replaces that exception, or the `KeyboardInterrupt` of Ctrl-C, by its own error, the block still ends
    with the exception of the signal. Does nothing outside the main thread, since only that receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []
    others = sys.unraisablehook

    def end(number: int, frame: FrameType | None) -> None:
        raised.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(TERMINATED))
        raise raised[-1]

    def send_again(ignored: sys.UnraisableHookArgs) -> None:
        # Python prints and ignores exceptions in destructors and weak reference callbacks, which its import machinery
        # uses too. A signal that arrives there would be lost, with a traceback.
        error = ignored.exc_value
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(error, SystemExit) and error.code == TERMINATED:
            number = signal.SIGTERM
        else:
            others(ignored)
            return
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as under nohup
        numbers.append(signal.SIGINT)
    old = {number: signal.signal(number, end) for number in numbers}
    sys.unraisablehook = send_again
    try:
        yield
    except Exception as error:
        if raised:
            raise raised[-1] from error
        raise
    finally:
        sys.unraisablehook = others
        for number, handler in old.items():
            signal.signal(number, handler)


def resume_command(output_dir: Path) -> str:
    """The command that resumes a run, on as many ranks as torchrun has started now: its global batch stays the same."""
    options = f"train --config {shlex.quote(str(output_dir / 'config.yaml'))} --resume"
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return f"castlm {options}"
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = num_ranks() // ranks
    on_nodes = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT " if nodes > 1 else ""
    return f"torchrun {on_nodes}--nproc-per-node {ranks} -m castlm {options}"


class Interrupted(BaseException):
    """A signal stopped a run that has saved its state. It is no `Exception`, so that code which reports bad input does
    not catch it.

    Attributes:
        reason: the step after which the run stopped, without the advice what to do next.
        exit_code: 130 for Ctrl-C, and 0 for SIGTERM, by which a scheduler pre-empts, and for a signal to another rank.
    """

    def __init__(self, reason: str, then: str, exit_code: int) -> None:
        super().__init__(f"{reason}; {then}")
        self.reason, self.exit_code = reason, exit_code


class Interrupt:
    """A context manager for a run: signals end it as `ending_on_sigterm` does until `start_training`, and set
    `requested` from then on. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        saving = "with everything saved" if num_ranks() == 1 else "saved if every rank still answers"
        self._ends_with = f"stopping after this step, {saving}"
        self._undo = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def start_training(self) -> None:
        """From now on, a signal ends the run after the current step."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._undo.callback(signal.signal, number, signal.signal(number, self._handle))

    def start_export(self) -> None:
        """From now on, a signal ends the run after the result is written."""
        self._ends_with = "the model is being written, and the run ends with that"

    def __enter__(self) -> Interrupt:
        self._undo.enter_context(ending_on_sigterm())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo.__exit__(kind, error, tb)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        from castlm.progress import note  # imports rich, which the list of commands need not load

        note(f"{self._ends_with}; Ctrl-C again stops at once without saving")

    def stopped(self, step: int, output_dir: Path) -> Interrupted:
        how = f"continue with: {resume_command(output_dir)}"
        return Interrupted(f"stopped after step {step}, saved", how, 130 if self.signal == signal.SIGINT else 0)
