"""Checks, before the work of a command, that its `--json` report can be written and replaces nothing but a report."""

from __future__ import annotations

import os
from pathlib import Path

from castlm.core.errors import InputError
from castlm.files.reading import check_regular, read_json_object, user_path

_FOLDER_OF_A_MODEL = ("config.json", "castlm.json", "config.yaml", "metrics.jsonl")
_RECORDS = ("castlm-output.json", "progress.json", "*.castlm.json", "*.jsonl")
"""Files that may hold a JSON object but are not reports: castlm's records, and texts."""


def check_json_path(path: str | None, *inputs: str) -> None:
    """Checks the value of `--json`; None and "-" need no check.

    Args:
        inputs: paths that the command reads.

    Raises:
        InputError: the folder does not exist or cannot be written; or a file exists that the command reads, that lies
            in the folder of a model or a run, or that is not a JSON report.
    """
    if path is None or path == "-":
        return
    if os.path.lexists(path) and not os.path.isdir(path):
        check_regular(path)
    target = Path(os.path.realpath(user_path(path)))
    if target.parts[:2] in (("/", "dev"), ("/", "proc")):
        raise InputError(f"--json {path} is not an ordinary file: use --json - for the standard output")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"--json {path} is not a file in an existing folder: create the folder, or name a file")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"--json {path} cannot be written: choose another folder")
    if not target.exists():
        return
    read = [Path(os.path.realpath(user_path(name))) for name in inputs if os.path.exists(user_path(name))]
    if any(target == source or source in target.parents for source in read):
        raise InputError(f"--json {path} is a file that the command reads: choose another name")
    if any((target.parent / name).exists() for name in _FOLDER_OF_A_MODEL):
        raise InputError(f"--json {path} exists in the folder of a model or a run: choose another folder")
    if any(target.match(name) for name in _RECORDS):
        raise InputError(f"--json {path} exists and is not a report of castlm: choose another name")
    try:
        read_json_object(target)
    except InputError as error:
        raise InputError(f"--json {path} exists and is not a JSON report: choose another name") from error
