"""Notes and progress on stderr, outside the training loop: a bar on a terminal, otherwise an occasional line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from castlm.names import clock, duration, for_stream, printable
from castlm.say import Progress, silent

SECONDS_BETWEEN_LINES = 30
SECONDS_BEFORE_FIRST = 3


class Screen(Console):
    """rich.Console that leaves broken pipes to `castlm.cli.main.main`, instead of exiting with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def note(text: str) -> None:
    """Prints one line; a terminal breaks it at words."""
    print(for_stream(f"castlm: {printable(text)}", sys.stderr), file=sys.stderr, flush=True)


@contextmanager
def shown_progress(
    what: str, rate: str | None = None, before: int | None = 0, is_main: bool = True
) -> Iterator[Progress]:
    """Yields a `Progress` that shows a bar or lines.

    Args:
        what: the work and its unit, such as "perplexity, sequences".
        rate: also show the speed, with this unit, such as "tokens/s".
        before: parts that an earlier start has done; None if the first call, before any work, gives their number.
        is_main: whether this rank shows them; two ranks would write over each other's bars.
    """
    if not is_main:
        yield silent
        return
    console = Screen(stderr=True, highlight=False)
    started = time.monotonic()
    next_line = started + SECONDS_BEFORE_FIRST
    is_long = before is None
    first: tuple[int, float] | None = None
    """Parts done and time of the first report of any, before which other work, as of a text, was done too."""

    def per_second(done: int) -> float:
        """The speed since the first report; of long work 0 until then, of other work the speed since the beginning."""
        nonlocal before, first
        now = time.monotonic()
        if before is None:
            before = done
        if first is None and done > before:
            first = (done, now)
        parts, since = first or (before, started)
        if done <= parts and not is_long:
            parts, since = before, started
        return (done - parts) / max(now - since, 1e-9)

    if console.is_terminal:
        columns = [TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20)]
        columns += [TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[eta]}")]
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, completed=before or 0, speed="", eta="")

            def show(done: int, total: int) -> None:
                done_in_second = per_second(done)
                speed = f"{done_in_second:,.0f} {rate}" if rate else ""
                # rich's own time would forget the speed where a part, as a transformer block, takes over 30 seconds.
                eta = f"ETA {clock((total - done) / done_in_second)}" if done_in_second > 0 else ""
                bar.update(task, completed=done, total=total, speed=speed, eta=eta)

            yield show
        return

    def line(done: int, total: int) -> None:
        nonlocal next_line
        if before is None:  # long work, of which the first part may take minutes
            note(f"{what} {done:,}/{total:,}")
        now, done_in_second = time.monotonic(), per_second(done)
        if now >= next_line and done_in_second > 0 and done < total:
            next_line = now + SECONDS_BETWEEN_LINES
            speed = f", {done_in_second:,.0f} {rate}" if rate else ""
            note(f"{what} {done:,}/{total:,}{speed}, {duration((total - done) / done_in_second)} left")

    yield line
