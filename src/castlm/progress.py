"""What is said on stderr outside the training loop: notes, and how far long work is, as a bar on a terminal and
elsewhere as a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from castlm.names import printable

SECONDS_BETWEEN_LINES = 30


class Screen(Console):
    """rich's, but that a pipe which nobody reads ends the command as `castlm.cli.main.main` says, and not with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def note(text: str) -> None:
    """One line."""
    print(f"castlm: {printable(text)}", file=sys.stderr, flush=True)


@contextmanager
def shown_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `told(done, total)`, to be called after each part of the work.

    Args:
        what: the work and its parts, as "perplexity, sequences".
    """
    console = Screen(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20))
        with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            left = (now - started) / done * (total - done)
            note(f"{what} {done:,}/{total:,}, {left:.0f} s left")

    yield line
