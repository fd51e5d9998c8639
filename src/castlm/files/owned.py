"""Which files of an output folder castlm wrote. `--overwrite` deletes those and nothing else.

A finished result (a model folder) lists each of its files with its SHA-256 in castlm.json. The folder of a run, which
grows while the run goes on, has a castlm-output.json that names the command, and `LAYOUT` says what that command
writes. Everything else in an output folder is foreign: other files, listed files that have changed, and all links but
those in `LINKS`. No link is followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from castlm.files.reading import open_regular
from castlm.files.temporary import is_temporary

RESULT = "castlm.json"
"""Record of a finished result; `files` in it maps each other file to its SHA-256."""

OUTPUT = "castlm-output.json"
"""Record of a run's folder: `command`, `run_id`, the `job` of torchrun, and `files` as in `RESULT`."""

LOCK, HOLDER = ".castlm.lock", ".castlm.holder.json"
"""The lock of an output folder, and who holds it."""

PROBE = ".castlm-probe-"
"""Prefix of the empty folders that find out whether a folder can be written in."""

_RUN = "runs/*-????????????"  # name and key of a run of a comparison

LAYOUT: dict[str, tuple[str, ...]] = {
    "train": (
        "metrics.jsonl",
        "report.html",
        "sample.json",
        "tensorboard/events.out.tfevents.*",
        *("wandb/run-*/**", "wandb/offline-run-*/**", "wandb/latest-run", "wandb/debug*.log"),
        "checkpoints/step-????????/manifest.json",
        "checkpoints/step-????????/metadata.json",
        "checkpoints/step-????????/__*_*.distcp",
        "checkpoints/.step-????????.tmp/manifest.json",
        "checkpoints/.step-????????.tmp/metadata.json",
        "checkpoints/.step-????????.tmp/__*_*.distcp",
        "model/",
        "model.rejected*/",
        ".model.tmp-*/**",
        ".model.old-*/",
        "adapter/",
        ".adapter.tmp-*/**",
        ".adapter.old-*/",
        "replaced/*/",
    ),
    "compare": (
        *("table.md", "table.json", "table.html", "*.svg", "*.png"),
        *(f"{_RUN}.yaml", f"{_RUN}.log", f"{_RUN}.zeroshot-*.json", f"{_RUN}.zeroshot-*.log", f"{_RUN}/"),
        *("runs/untouched.zeroshot-*.json", "runs/untouched.zeroshot-*.log"),
    ),
    "sweep": ("sweep.json", "law.json", f"{_RUN}.yaml", f"{_RUN}.log", f"{_RUN}/"),
    "demo": (
        *("text/train.jsonl", "text/held_out.jsonl", "castlm/", "dense/", "packed/"),
        *(".packed.tmp-*/**", ".packed.old-*/"),
    ),
    "prune": ("progress.json", "hidden-*.bin", "dense-*.bin", "block-*.safetensors"),
    "oneshot": ("model/", "model.rejected*/", ".model.tmp-*/**", ".model.old-*/"),
}
"""What each command writes, relative to its output folder. `*` and `?` match within one name; a pattern that ends in
`/` is an output folder with a record of its own, one that ends in `/**` a folder with everything in it."""

LINKS = ("wandb/latest-run", "wandb/debug.log", "wandb/debug-internal.log")
"""Of what a command writes, the links: wandb makes them, to its newest run and to the logs of that."""


class Content(NamedTuple):
    """The files of a folder, as paths."""

    owned: list[Path]
    foreign: list[Path]


def is_of_run(record: Mapping[str, Any], folder: Path) -> bool:
    """Whether the record of a result is that of the run in `folder`, and not of one that this run replaces."""
    run_id = read_record(folder / OUTPUT).get("run_id")
    return run_id is None or record.get("run_id") in (None, run_id)


def read_record(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; empty where there is none or it cannot be read."""
    try:
        if file.is_symlink() or not file.is_file():
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def command_of(folder: Path) -> str | None:
    """The command whose output `folder` holds; "result" for a finished result; None where there is no record."""
    command = read_record(folder / OUTPUT).get("command")
    if isinstance(command, str) and command in LAYOUT:
        return command
    return "result" if isinstance(read_record(folder / RESULT).get("files"), dict) else None


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in `folder` has saved a whole checkpoint."""
    return any(folder.glob("checkpoints/step-*/manifest.json"))


def is_empty(folder: Path) -> bool:
    """Whether `folder` holds nothing but a lock, and what a killed start has left before it wrote anything."""
    return all(is_of_a_start(entry.name) for entry in os.scandir(folder))


def is_of_a_start(name: str) -> bool:
    """Whether a start makes an entry of this name before the record by which an output folder is castlm's."""
    begun = tuple(f".{file}.tmp-" for file in (OUTPUT, HOLDER, "config.yaml"))
    return name in (LOCK, HOLDER) or name.startswith((PROBE, *begun))


def content(folder: Path) -> Content:
    """Sorts the files in `folder` into those that castlm wrote and those that it did not."""
    found = Content([], [])
    _sort(folder, found)
    return found


def _sort(folder: Path, found: Content) -> None:
    """As `content`; without a record, everything in `folder` is foreign."""
    record = read_record(folder / OUTPUT) or read_record(folder / RESULT)
    patterns = LAYOUT.get(str(record.get("command")), ()) if (folder / OUTPUT).is_file() else ()
    listed = record.get("files") if isinstance(record.get("files"), dict) else {}
    has_record = bool(patterns) or isinstance(record.get("files"), dict)
    for path in _walk(folder, patterns, found):
        name = path.relative_to(folder).as_posix()
        matches = any(_matches(name, pattern) for pattern in patterns)
        if path.is_symlink():
            owned = matches and name in LINKS
        elif not path.is_file():
            owned = False
        elif path.name in (LOCK, HOLDER) or is_temporary(path.name):
            owned = True
        elif name in (OUTPUT, RESULT):
            owned = has_record
        elif name in listed:
            owned = listed[name] == sha256_file(path)
        else:
            owned = matches
        (found.owned if owned else found.foreign).append(path)


def _walk(folder: Path, patterns: tuple[str, ...], found: Content) -> Iterator[Path]:
    """The files below `folder`, except those in output folders and temporary folders, which it sorts into `found`."""
    pending = [folder]
    while pending:
        for entry in sorted(os.scandir(pending.pop()), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if not entry.is_dir(follow_symlinks=False):
                yield path
            elif any(_matches(f"{name}/", pattern) for pattern in patterns if pattern.endswith("/")):
                _sort(path, found)
            elif any(_matches(f"{name}/**", pattern) for pattern in patterns):
                found.owned.extend(inner for inner in path.rglob("*") if inner.is_symlink() or not inner.is_dir())
            else:
                pending.append(path)


def _matches(name: str, pattern: str) -> bool:
    names, parts = name.split("/"), pattern.split("/")
    return len(names) == len(parts) and all(map(fnmatchcase, names, parts))


def foreign_names(folder: Path) -> list[str]:
    """Names of the files in `folder`, relative to it, that castlm did not write."""
    return sorted(path.relative_to(folder).as_posix() for path in content(folder).foreign)


def discard(folder: Path, below: str = "", keeps_records: bool = False) -> list[str]:
    """Deletes what castlm wrote in `folder`, and the folder itself when nothing else is in it.

    Args:
        below: delete only in this folder inside of `folder`.
        keeps_records: leave the records where foreign files stay, so that they are still known as such.

    Returns:
        The names of the foreign files that are left there.
    """
    inside = folder / below
    if not inside.is_dir() or folder.is_symlink():
        return []
    found = Content(*([path for path in paths if inside in path.parents] for paths in content(folder)))
    records = [path for path in found.owned if path.name in (OUTPUT, RESULT)]
    others = [path for path in found.owned if path not in set(records)]
    for path in [*others, *([] if keeps_records and found.foreign else records)]:  # a kill leaves the records
        path.unlink(missing_ok=True)
    for root, _, _ in os.walk(inside, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(root)
    return sorted(path.relative_to(folder).as_posix() for path in found.foreign)


def list_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to it, except castlm.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files if path != folder / RESULT}


def changed_file(folder: Path, files: dict[str, Any]) -> str | None:
    """The first of the listed `files` that is missing in `folder` or differs from its SHA-256; None when all match."""
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file() or sha256_file(path) != expected:
            return str(name)
    return None


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read a chunk at a time."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
