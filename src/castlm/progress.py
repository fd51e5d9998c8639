"""Notes and progress on stderr, outside the training loop: a bar on a terminal, otherwise an occasional line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from castlm.names import printable

SECONDS_BETWEEN_LINES = 30


class Screen(Console):
    """rich.Console that leaves broken pipes to `castlm.cli.main.main`, instead of exiting with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def note(text: str) -> None:
    """Prints one line."""
    print(f"castlm: {printable(text)}", file=sys.stderr, flush=True)


class _Rate(TextColumn):
    """Shows the speed of a task, once rich knows it (after the second update)."""

    def __init__(self, unit: str) -> None:
        super().__init__(unit)
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self._unit}" if task.speed else "")


@contextmanager
def shown_progress(what: str, rate: str | None = None, before: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Yields `told(done, total)`, which the caller calls after each part of the work.

    Args:
        what: the work and its unit, such as "perplexity, sequences".
        rate: also show the speed, with this unit, such as "tokens/s".
        before: parts that an earlier start has done.
    """
    console = Screen(stderr=True, highlight=False)
    if console.is_terminal:
        columns = [TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20)]
        columns += [_Rate(rate)] if rate else []
        with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, completed=before)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and before < done < total:
            last = now
            per_second = (done - before) / (now - started)
            speed = f", {per_second:,.0f} {rate}" if rate else ""
            note(f"{what} {done:,}/{total:,}{speed}, {(total - done) / per_second:.0f} s left")

    yield line
