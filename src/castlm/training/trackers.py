"""Experiment trackers besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

To add a tracker, add a row to `TRACKERS`. A client is imported only when a run reports to it. Only the main rank does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from castlm.core.errors import InputError

PROJECT = "castlm"


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
        project = os.environ.get(f"{package.upper()}_PROJECT", PROJECT)
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

    Raises:
        InputError: a named package is not installed.
    """
    if "none" in report_to:
        if others := [name for name in report_to if name != "none"]:
            raise InputError(f"report_to none and {others[0]}: name one of them")
        return []
    named = [name for name in dict.fromkeys(report_to) if name != "auto"]
    if missing := [name for name in named if not _is_installed(name)]:
        raise InputError(f"report_to {missing[0]}: it is not installed: pip install {' '.join(missing)}")
    return [name for name in TRACKERS if _is_installed(name)] if "auto" in report_to else named


def _is_installed(name: str) -> bool:
    """Whether the package `name` is installed; a folder of that name on Python's path is not enough."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.loader is not None and spec.origin is not None


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """Opens trackers in the order of `names`.

    Raises:
        InputError: a client fails, with its reason.
    """
    with contextlib.ExitStack() as opened:
        trackers = []
        for name in names:
            try:
                trackers.append(TRACKERS[name](run))
            except Exception as error:  # each client has its own types
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"report_to {name}: {reason}; report_to none runs without trackers") from error
            opened.callback(trackers[-1].close)
        opened.pop_all()  # all are open: the run closes them
        return trackers
