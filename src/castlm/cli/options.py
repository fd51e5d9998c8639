"""What the commands share: arguments into a dataclass, a run folder in place of its model, and JSON reports."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError


def parse(kind: type[Any], arguments: list[str], name: str) -> Any:
    """Arguments into a dataclass; tyro's boxed complaints are folded into one line.

    Raises:
        InputError: what tyro complains of.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, prog=f"castlm {name}", config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:
            raise
        # the box's frame and rules go, its sentences stay
        words = re.sub(r"[╭╮╰╯│─━]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()))
        text = " ".join(words.split()).partition("For full helptext")[0].strip()
        text = re.sub(r"^Value error Error parsing \w+: ", "", text)  # what follows is our own
        raise InputError(f"{text} (castlm {name} --help lists the options)") from None


def result_folder(path: str) -> str:
    """A run's `model` folder when `path` is a run of `castlm train`, else `path`."""
    inner = Path(path) / "model"
    return str(inner) if (inner / "config.json").is_file() and not (Path(path) / "config.json").exists() else path


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Writes a report where `--json` says; "-" is the standard output."""
    if path == "-":
        print(json.dumps(content, indent=2))
    elif path is not None:
        from castlm.files import atomic_write_json

        atomic_write_json(path, content)
