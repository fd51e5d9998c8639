"""The reports of a run in progress: a live line on the screen, metrics.jsonl, and the trackers of `report_to`.

Only the main rank writes. In metrics.jsonl, a figure that is not finite is null. A resumed run first cuts the file back
to its checkpoint, so that the file looks as if the run had never stopped. `read_metrics` reads it, without torch. To
add a tracker, add a row to `TRACKERS`; its client is imported only when a run reports to it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_text, plain_json, reporting_full_disk
from castlm.names import clock, filled, printable
from castlm.packages import missing
from castlm.progress import Screen
from castlm_runtime.reading import read_text, user_path

SHOWN = {
    "loss": "loss {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "lr": "lr {:.2e}",
    "ce": "ce {:.4f}",
    "kl": "kl {:.4f}",
    "hidden": "hidden {:.4f}",
    "alpha": "alpha {:.2f}",
    "mfu": "mfu {:.1%}",
}
"""The figures of a step, most important first: a narrow terminal shows those that fit."""
WIDE = 110
"""Columns of a terminal from which on a bar is shown."""
EVALUATION = {
    "perplexity": "perplexity {:.3f}",
    "prune_now_ppl": "pruned now {:.3f}",
    "general_ppl": "general text {:.3f}",
    "sparse_weight_ratio": "sparse-weight ratio {:.4f}",
    "flip_rate": "flips {:.2e}",
    "initial_flip_rate": "flips since step 0 {:.2e}",
    "largest_masked": "largest masked {:.2e}",
}


class Telemetry:
    """A context manager around the training loop, which calls `log` at every step and `evaluated` at evaluations.

    Args:
        output_dir: folder of metrics.jsonl.
        is_main: whether this rank writes; on the others all methods do nothing.
        start_step: step of the checkpoint that a resumed run continues from; 0 for a new run.
        trackers: clients that get the same figures as metrics.jsonl. They are closed with the run; a failing tracker
            does not stop the run.
        hidden: figures that cannot change during this run. They are written to the file and not shown on the screen.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        *,
        is_main: bool,
        start_step: int,
        trackers: Sequence[Tracker] = (),
        hidden: frozenset[str] = frozenset(),
    ):
        self.is_main, self.hidden = is_main, hidden
        self.console = Screen(stderr=True, highlight=False, soft_wrap=True)
        self.total_steps = total_steps
        self._file: TextIO | None = None
        self._task: TaskID | None = None
        """None, as the file, on all ranks but the main one."""
        self._trackers = list(trackers)
        bar = [BarColumn(bar_width=20)] if self.console.width >= WIDE else []
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("ETA {task.fields[eta]}", table_column=Column(no_wrap=True, min_width=len("ETA 0:00:00"))),
            *bar,
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not (is_main and self.console.is_terminal),
        )
        if not is_main:
            return
        path = output_dir / "metrics.jsonl"
        cut_back(path, start_step or -1)  # without a checkpoint, the row of step 0 is removed, too
        self._file = path.open("a", encoding="utf-8")
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, shown="", eta="")
        self._last_print = -math.inf  # so that the first step is reported at once

    def __enter__(self) -> Telemetry:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which writing the last row has reported
                self._file.close()
        self._report(lambda tracker: tracker.close())

    def say(self, text: str) -> None:
        if self.is_main:
            text = printable(text, keep="\n")
            self.console.print(filled(text, self.console.width) if self.console.is_terminal else text, markup=False)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows and writes the figures of the optimizer step that just ended, counted from 1."""
        if self._task is None:
            return
        figures = [form.format(values[key]) for key, form in SHOWN.items() if key in values]
        shown = "  ".join(figures)
        eta = clock(values["eta_s"])
        room = self.console.width - len(f"step {self.total_steps}/{self.total_steps} ETA {eta} ") - 1
        room -= 21 if self.console.width >= WIDE else 0  # the bar and a space
        fitting = fitted(figures, room)
        self._progress.update(self._task, completed=step, shown=fitting, eta=eta)
        # A log file gets a line every 15 s in place of a line that moves.
        if not self.console.is_terminal and (time.monotonic() - self._last_print > 15 or step == self.total_steps):
            self._last_print = time.monotonic()
            self.say(f"step {step}/{self.total_steps}  {shown}  ETA {eta}")
        self._write(step, values)

    def evaluated(self, step: int, values: dict[str, float], details: dict[str, Any]) -> None:
        """Writes the figures of an evaluation, and prints a line of the figures that can change during the run.

        Args:
            details: lists and dictionaries that are only written to metrics.jsonl.
        """
        if self.is_main:
            self._write(step, values, details)
            keys = [key for key in EVALUATION if key in values and key not in self.hidden]
            shown = [EVALUATION[key].format(values[key]) for key in keys]
            shown += [f"{key} {value:.3f}" for key, value in values.items() if key.startswith("perplexity/")]
            head = f"step {step}: "
            room = self.console.width - len(head) - 1 if self.console.is_terminal else sys.maxsize
            self.say(head + f"\n{' ' * len(head)}".join(folded(shown, room)))

    def _write(self, step: int, values: dict[str, float], details: dict[str, Any] | None = None) -> None:
        assert self._file is not None
        row = plain_json({"step": step, **values, **(details or {})})
        with reporting_full_disk(self._file.name, "free some space and resume"):
            print(json.dumps(row, allow_nan=False), file=self._file, flush=True)
        self._report(lambda tracker: tracker.log(values, step))

    def _report(self, action: Callable[[Tracker], None]) -> None:
        """Calls `action` for each tracker. One that fails, as by a lost connection, is dropped with a line."""
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # each client has its own types
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                self.say(f"{tracker.name} gets no more figures ({reason}); metrics.jsonl has them all")


def fitted(figures: Sequence[str], room: int) -> str:
    """The first of `figures` that fit into `room` columns, two spaces apart.

    >>> fitted(["loss 2.0", "9 tok/s", "lr 1e-3"], 18)
    'loss 2.0  9 tok/s'
    """
    shown = ""
    for figure in figures:
        longer = f"{shown}  {figure}" if shown else figure
        if len(longer) > room:
            break
        shown = longer
    return shown


def folded(figures: Sequence[str], room: int) -> list[str]:
    """All of `figures`, two spaces apart, in lines of at most `room` columns; a longer figure has a line of its own.

    >>> folded(["perplexity 2.000", "flips 1e-3", "largest masked 0"], 30)
    ['perplexity 2.000  flips 1e-3', 'largest masked 0']
    """
    lines: list[str] = []
    for figure in figures:
        longer = f"{lines[-1]}  {figure}" if lines else figure
        if lines and len(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(figure)
    return lines


def cut_back(path: Path, step: int) -> None:
    """Removes the rows of metrics.jsonl after `step`, and everything from the first damaged row on."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row: Any = json.loads(line)
            if row["step"] > step:  # of the steps that the resumed run takes again
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))


_FIGURES = ("tokens", "loss", "perplexity", "prune_now_ppl", "dense_ppl", "alpha")
"""The figures that readers compute with."""


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`, in file order. Null, which stands for a figure that was not finite, is inf.

    Args:
        run: the folder of the run, or the file. A last line cut short by a kill is dropped.

    Raises:
        InputError: the file cannot be read, or another line is malformed (with its number).
    """
    path = user_path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = read_text(path).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            row = None
        figures: list[Any] = [None]
        if isinstance(row, dict):
            figures = [row.get("step"), *(row[name] for name in _FIGURES if row.get(name) is not None)]
        if not all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in figures):
            raise InputError(f"{path}, line {number} is not a row that castlm writes: {line[:60]!r}")
        rows.append({name: math.inf if value is None else value for name, value in row.items()})
    return rows


class Tracker(Protocol):
    """The interface of a tracker."""

    name: str
    """As in `report_to`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Reports the figures of a step."""

    def close(self) -> None:
        """Sends all pending figures and closes the client."""


class TrackedRun(NamedTuple):
    """The run that a tracker is opened for."""

    output_dir: Path
    id: str | None
    """The id of the run, which its resumption keeps; no two runs share one."""
    config: dict[str, Any]
    first_step: int
    """0, or the step that a resumed run continues from."""


class TensorBoard:
    """Event files in `output_dir/tensorboard`."""

    name = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run.first_step + 1 if run.first_step else 0  # TensorBoard hides this step and those after it
        self._writer = SummaryWriter(run.output_dir / "tensorboard", purge_step=purge_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Client:
    """A client with the interface of wandb: a run in the project "castlm" of Weights & Biases, or of Trackio.

    Without an API key, Weights & Biases writes to `output_dir/wandb` and sends nothing.
    """

    def __init__(self, package: str, run: TrackedRun) -> None:
        self.name, client = package, importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", "castlm")
        options: dict[str, Any] = {"project": project, "config": run.config, "resume": "allow"}
        if package == "wandb":
            mode = os.environ.get("WANDB_MODE") or ("online" if client.api.api_key else "offline")
            options |= {"name": run.output_dir.name, "id": run.id, "dir": str(run.output_dir), "mode": mode}
        else:  # Trackio knows a run by its name
            options["name"] = f"{run.output_dir.name}-{run.id}"
        self._run = client.init(**options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": functools.partial(Client, "wandb"),
    "trackio": functools.partial(Client, "trackio"),
}
"""By the name of the package."""


def chosen_trackers(report_to: Sequence[str]) -> list[str]:
    """The trackers that `report_to` means: those that are named, or with "auto" all that are installed.

    Raises `InputError` if a named package is not installed.
    """
    if "none" in report_to:
        return []
    named = [name for name in dict.fromkeys(report_to) if name != "auto"]
    if lacking := missing(*named):
        raise InputError(f"report_to {lacking[0]}: it is not installed: pip install {' '.join(lacking)}")
    return [name for name in TRACKERS if not missing(name)] if "auto" in report_to else named


def open_trackers(names: Sequence[str], run: TrackedRun, dropped: Callable[[str], None] | None = None) -> list[Tracker]:
    """Opens trackers in the order of `names`. Raises `InputError` with the reason of a client that fails.

    Args:
        dropped: if given, such a tracker is left out, and this is called with a line about it.
    """
    with contextlib.ExitStack() as opened:
        trackers = []
        for name in names:
            try:
                trackers.append(TRACKERS[name](run))
            except Exception as error:  # each client has its own types
                reason = " ".join(str(error).split()) or type(error).__name__
                if dropped is None:
                    raise InputError(f"report_to {name}: {reason}; report_to none runs without trackers") from error
                dropped(f"{name} gets no figures: {reason}; report_to none leaves all trackers out")
                continue
            opened.callback(trackers[-1].close)
        opened.pop_all()  # all are open: the run closes them
        return trackers
