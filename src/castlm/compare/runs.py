"""The runs of a comparison: each in a folder named by a hash of all that matters, in a process of its own.

The process gives each run its own peak of memory, and makes of a crash one line in the table instead of the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import castlm
from castlm.compare.presets import ONESHOT
from castlm.core.errors import InputError
from castlm.files import sha256_file
from castlm.locate import locate
from castlm.progress import note
from castlm.training.config import WITHOUT_EFFECT

# Fields that name a model or a text, always; the key has the hash of what they name.
NAMED = ("model", "revision", "dataset", "eval_dataset", "calibration")


@dataclass(frozen=True)
class Run:
    """One row of work. `config` is a whole TrainConfig, or OneshotConfig, as a dict without its output_dir."""

    variant: str
    tokens: int
    """The budget: 0 for one-shot methods."""
    config: dict[str, Any] = field(compare=False)
    key: str = ""

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def is_oneshot(self) -> bool:
        return self.config["method"] in ONESHOT

    def folder(self, root: Path) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in self.variant)
        return root / "runs" / f"{name}-{self.key}"

    def __str__(self) -> str:
        rate = "" if self.is_oneshot else f", rate {self.config['learning_rate']:g}, {self.tokens:,} tokens"
        return f"{self.variant}, seed {self.seed}{rate}"


def content_hash(model: str, revision: str | None) -> str:
    """Of the weights, config and tokenizer that `model` names; of a hub model, of its name and revision.

    Raises:
        InputError: there is no such model.
    """
    where = locate(model)
    if where.is_hub:
        return hashlib.sha256(f"{where.target}@{revision}".encode()).hexdigest()
    folder = Path(where.target)
    files = [folder / name for name in where.gguf.values()]
    files = files or sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json", ".model"))
    return hashlib.sha256(" ".join(f"{f.name} {sha256_file(f)}" for f in files).encode()).hexdigest()


def run_key(config: dict[str, Any], hashes: dict[str, str]) -> str:
    """12 hexadecimal digits for all that the result depends on: fields, the model, the texts, castlm's version.

    Args:
        config: fields of a run; those in `WITHOUT_EFFECT` do not count, those in `NAMED` and `hashes` by their hash.
        hashes: of what fields name, as models and texts.
    """
    fields = {k: v for k, v in config.items() if k not in WITHOUT_EFFECT and k not in NAMED and k not in hashes}
    named = {k: hashes[k] for k in hashes if k in config}
    content = json.dumps([fields, named, castlm.__version__], sort_keys=True, default=list)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@contextmanager
def lock(root: Path) -> Iterator[int]:
    """Makes sure that one comparison at a time works in `root`. Its runs inherit the lock: it lasts while one lives.

    Raises:
        InputError: another one does, or the folder cannot be written.
    """
    if sys.platform == "win32":
        raise InputError("castlm compare locks its folder with flock, which Windows lacks: run it under WSL")
    import fcntl

    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"cannot write {root}: {error.strerror}; choose another output folder") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another castlm compare or plan sweep, or a run that it left, is at work in {root}: wait for it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run; None where there is none."""
    file = folder / "model" / "castlm.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def execute(run: Run, root: Path, lock_descriptor: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The record of a run: as it lies there, resumed where it was stopped, or run from the start.

    Returns:
        The content of its castlm.json, or `{"error": one line}` when its process failed.
    """
    folder = run.folder(root)
    record = read_record(folder)
    if record is not None:
        return record
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder.with_suffix(".yaml")
    fields = {**run.config, "output_dir": str(folder)}
    if run.is_oneshot:
        shutil.rmtree(folder)
        command = ["castlm.cli.oneshot", str(config_file)]
    else:
        resume = any(folder.glob("checkpoints/step-*/manifest.json"))
        fields |= {"resume": resume, "overwrite": not resume}
        command = ["castlm", "train", "--config", str(config_file)]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    config_file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    log = folder.with_suffix(".log")
    code = run_process(command, log, lock_descriptor)
    record = read_record(folder)
    if code or record is None:
        return {"error": f"exit code {code}: {last_line(log)} (all of it: {log})"}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"  done in {time.monotonic() - started:.0f} s")
    return record


def run_process(arguments: Sequence[str], log: Path, lock_descriptor: int) -> int:
    """`python -m ...` with its output in `log`. On Ctrl-C, and when this process is told to end, it is given the time
    to save itself."""
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock_descriptor,),
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("castlm: error: ") if lines else "it said nothing"


def zero_shot_rows(
    model: str, file: Path, tasks: str, folder: str | None, limit: int | None, lock_descriptor: int
) -> list[dict[str, Any]]:
    """The rows of `castlm eval --tasks` on a model, from `file` when it is there. Empty when the evaluation failed."""
    if not file.is_file():
        arguments = ["castlm", "eval", model, "--tasks", tasks, "--json", str(file)]
        arguments += ["--tasks-from", folder] if folder else []
        arguments += ["--limit", str(limit)] if limit else []
        if run_process(arguments, file.with_suffix(".log"), lock_descriptor):
            note(f"zero-shot of {model} failed: {last_line(file.with_suffix('.log'))}")
            return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["zero_shot"]["results"]
    return rows


def with_key(run: Run, hashes: dict[str, str]) -> Run:
    return dataclasses.replace(run, key=run_key(run.config, hashes))
