"""Starts the runs of a comparison, each in its own process and in a folder named by a hash of all its inputs.

The process gives each run its own peak of memory, and limits a crash to one line of the table.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

import castlm
from castlm.core.errors import DivergedError, InputError
from castlm.core.nm import Pattern
from castlm.data.options import ScoredTextOptions
from castlm.facts import Facts
from castlm.fields import like, without_result
from castlm.files.atomic_file import atomic_write_text
from castlm.files.output import refuse_locked
from castlm.files.record import OUTPUT, RESULT, command_of
from castlm.lab.compare.presets import ONESHOT
from castlm.models.locate import cached_snapshot, locate
from castlm.say import Say
from castlm.training.config import TrainConfig
from castlm.training.options import SEQ_LEN, ModelOptions
from castlm_runtime.reading import sha256_file

CASTLM = (sys.executable, "-m", "castlm")
"""The program that runs castlm's command."""

# Fields that always name a model or a text; the key hashes their content.
NAMED = ("model", "revision", "dataset", "eval_dataset", "calibration")


@dataclass(frozen=True, kw_only=True)
class OneshotConfig(ScoredTextOptions):
    """The options of a one-shot run, named as in TrainConfig."""

    model: str
    method: str
    calibration: str
    eval_dataset: str
    output_dir: str = ""
    pattern: Pattern = like(ModelOptions, "pattern")
    seq_len: int = SEQ_LEN
    """Tokens per sequence of the evaluation. Calibration sequences have the model's context, at most 2,048 tokens."""
    calibration_sequences: int = 128
    eval_tokens: int = 32768
    calibration_split: str = "train"
    eval_split: str = "validation"
    device: str = "auto"
    precision: str = "auto"
    """Compute type of the evaluation and of the passes over the calibration text."""
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Every option as plain JSON."""
        return {**asdict(self), "pattern": str(self.pattern)}


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison. `config` is a whole TrainConfig, or OneshotConfig, as a dict without its output_dir."""

    variant: str
    budget: int
    """The requested training tokens; runs of one budget are compared. 0 for one-shot methods."""
    tokens: int
    """Training tokens of the whole steps that fit in the budget."""
    config: dict[str, Any] = field(compare=False)
    key: str = ""
    """`run_key` of the run."""

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def is_oneshot(self) -> bool:
        return self.config["method"] in ONESHOT

    def folder(self, root: Path) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in self.variant)[:80]  # the key tells longer ones apart
        return root / "runs" / f"{name}-{self.key}"

    def __str__(self) -> str:
        rate = "" if self.is_oneshot else f", rate {self.config['learning_rate']:g}, {self.tokens:,} tokens"
        return f"{self.variant}, seed {self.seed}{rate}"


@dataclass
class Result:
    """A run and its facts, or the error that ended it."""

    run: ComparedRun
    folder: Path
    facts: Facts = field(default_factory=lambda: Facts(pattern=None, left_dense={}))
    """The content of the run's castlm.json; without any entry if the run failed."""
    failure: InputError | None = None
    """A `DivergedError` if the run was stopped because it diverged."""
    trial: bool = False
    """Whether it only tried a learning rate and has no row in the table."""

    @property
    def perplexity(self) -> float:
        """Perplexity of the pruned model, or of the trained dense control; infinite if the run failed."""
        value = self.facts.perplexity.final
        return math.inf if value is None else value

    @property
    def problem(self) -> str | None:
        """The problem of the run: "diverged", "fell short" or None."""
        if isinstance(self.failure, DivergedError):
            return "diverged"
        return None if self.facts.verdict is None else self.facts.verdict.outcome


# Files without effect on a result: documents, castlm's own record, and formats that castlm does not read.
_NOT_CONTENT = frozenset({".md", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".png", ".jpg", ".pdf"})


def content_hash(model: str, revision: str | None, *, trust_remote_code: bool = False) -> str:
    """Hash of everything a result can depend on in `model`: weights, config, tokenizer and code of its own.

    For a hub model it hashes the name and the cached commit. If none is cached, the config is fetched first, so that
    the hash stays the same after a run has fetched the rest. Raises `InputError` if there is no such model.
    """
    where = locate(model)
    if where.is_hub:
        if cached_snapshot(where.target, revision) is None:
            from castlm.models.io import open_config

            open_config(model, trust_remote_code=trust_remote_code, revision=revision)
        snapshot = cached_snapshot(where.target, revision)
        return _digest([where.target, revision if snapshot is None else snapshot.name])
    folder = Path(where.target)
    files = [folder / name for name in where.gguf.values()]
    for root, folders, names in os.walk(folder) if not files else ():
        inside = [Path(root, name) for name in folders if not name.startswith(".")]
        folders[:] = [each.name for each in inside if command_of(each) is None]  # no output of castlm
        found = [Path(root, name) for name in names if not name.startswith(".") and name not in (RESULT, OUTPUT)]
        files += [file for file in found if file.is_file() and file.suffix.lower() not in _NOT_CONTENT]
    files.sort()
    return _digest([[file.relative_to(folder).as_posix(), sha256_file(file)] for file in files])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()


def run_key(config: dict[str, Any], hashes: dict[str, str]) -> str:
    """12 hexadecimal digits for everything the result depends on: fields, the model, the texts, castlm's version.

    Args:
        config: fields of a run. Options that do not change the result do not count; fields in `NAMED` and `hashes`, and
            the chat template, count by their hash.
        hashes: hashes of models and texts, by the field that names them.

    Raises:
        InputError: the file of the chat template does not exist.
    """
    if (template := config.get("chat_template_path")) is not None:
        hashes = {**hashes, "chat_template_path": sha256_file(template)}
    uncounted = {*NAMED, *hashes, *without_result(TrainConfig.sections().values())}
    fields = {k: v for k, v in config.items() if k not in uncounted}
    named = {k: hashes[k] for k in hashes if k in config}
    return _digest([fields, named, castlm.__version__])[:12]


def read_finished(folder: Path) -> Facts | None:
    """The facts of a finished run; None if there is none.

    Raises `InputError` if a file of the result is missing or has changed.
    """
    model = folder / "model"
    return Facts.read_result(model) if (model / RESULT).is_file() else None


def execute(run: ComparedRun, root: Path, say: Say, program: Sequence[str] = CASTLM) -> Facts:
    """Returns the facts of a run: reads a finished one, resumes an interrupted one, or starts it by `program`.

    Raises `InputError` if its process failed, a `DivergedError` if it diverged, and as `read_finished`.
    """
    from castlm.training.checkpoint import remove_checkpoints  # imports torch

    folder = run.folder(root)
    facts = read_finished(folder)
    if facts is not None:
        remove_checkpoints(folder / "checkpoints")  # a kill may have come earlier
        return facts
    folder.parent.mkdir(parents=True, exist_ok=True)
    config_file = folder.with_suffix(".yaml")
    fields = {**run.config, "output_dir": str(folder)}
    if run.is_oneshot:
        command = ["compare", "--row", str(config_file)]
    else:
        fields["resume"] = True
        command = ["train", "--no-report", "--config", str(config_file)]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    atomic_write_text(config_file, yaml.safe_dump(plain, sort_keys=False))
    started = time.monotonic()
    log = folder.with_suffix(".log")
    code = run_process(command, log, program)
    facts = read_finished(folder)
    if facts is None or (code and (facts.verdict is None or facts.verdict.ok)):
        printed = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        reason = printed[-1].removeprefix("castlm: error: ")
        kind = DivergedError if code == 1 else InputError  # no other error ends a run with this exit code
        raise kind(f"exit code {code}: {reason} (all of it: {log})")
    remove_checkpoints(folder / "checkpoints")
    say(f"  done in {time.monotonic() - started:.0f} s")
    return facts


def refuse_running(root: Path) -> None:
    """Raises `InputError` if a run of a killed comparison in `root` is still running."""
    for folder in sorted(root.glob("runs/*/")):
        refuse_locked(folder)


def run_process(arguments: Sequence[str], log: Path, program: Sequence[str]) -> int:
    """Runs `PROGRAM ARGUMENTS` with its output in `log`, and returns its exit code.

    Ctrl-C and SIGTERM are passed to the process, which gets time to save its state.
    """
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*program, *arguments], stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
