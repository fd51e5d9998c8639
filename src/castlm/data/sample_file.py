"""Writes samples to a file: without duplicates, whole after a kill, and without overwriting files of others.

Rows go into `NAME.part` first. `NAME.castlm.json`, written after each batch, records the number of complete batches and
bytes; after a kill, bytes beyond that are cut off. The finished file gets its name in one rename, and its record stays
beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.data.sampling import Sample, Sampler
from castlm.files.atomic_file import atomic_write_json, flush_folder, read_json_mapping
from castlm.files.disk import is_disk_full
from castlm.files.lock import HeldError, locked
from castlm.files.reading import read_record, sha256_file, user_path

FEW_SAMPLES = 32
"""Number of texts after which a line may report that most of them are left out."""

PATIENCE = 20
"""Consecutive batches without a new text after which sampling stops."""


class SampleFile:
    """Rows of samples, appended batch by batch. Made by `open_samples`."""

    def __init__(self, path: Path, settings: Mapping[str, Any], dedup_prefix: int, replaces: str | None) -> None:
        self.path, self.settings, self.dedup_prefix, self.replaces = path, dict(settings), dedup_prefix, replaces
        self.part, self.record_file = _part(path), _record(path)
        self.batches = self.samples = self.tokens = self.bytes = self.duplicates = self.cut = self.dropped = 0
        self._seen: set[bytes] = set()
        self._digest = hashlib.sha256()

    def is_new(self, prompt: str, generated: str) -> bool:
        """Whether no earlier text is the same or has the same first `dedup_prefix` characters after its prompt."""
        keys = [_hash("whole", prompt, generated)]
        if self.dedup_prefix:
            keys.append(_hash("prefix", prompt, generated[: self.dedup_prefix]))
        if any(key in self._seen for key in keys):
            return False
        self._seen.update(keys)
        return True

    def begin(self) -> None:
        """Records that sampling has begun, so that a kill leaves no rows without a record."""
        if not self.batches:
            self._write_record(finished=False)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends the rows of a batch and records that it is done.

        Raises:
            InputError: the disk is full.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            with self.part.open("r+b" if self.bytes else "wb") as file:
                file.truncate(self.bytes)
                file.seek(self.bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = "the disk is full" if is_disk_full(error) else error.strerror
            raise InputError(f"{self.part} cannot be written: {reason}; free some space and resume") from error
        self._digest.update(content)
        self.bytes += len(content)
        self.samples += len(rows)
        self.batches += 1
        self._write_record(finished=False)

    def finish(self) -> dict[str, Any]:
        """Gives the file its name, and returns its record.

        Raises:
            InputError: another file of that name has appeared.
        """
        if self.path.exists() and sha256_file(self.path) != self.replaces:
            raise InputError(
                f"{self.path} was not written by castlm: move it away and resume; the text is in {self.part}"
            )
        os.replace(self.part, self.path)
        flush_folder(self.path.parent)
        return self._write_record(finished=True)

    def _write_record(self, finished: bool) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        record = {**counts, "finished": finished, "sha256": self._digest.hexdigest(), "settings": self.settings}
        record |= {"replaces": self.replaces} if self.replaces and not finished else {}
        atomic_write_json(self.record_file, record)
        return record

    def restore(self, prompt_of: Callable[[int], str]) -> None:
        """Continues an earlier, interrupted start, if there was one.

        Raises:
            InputError: it had other settings, or its rows have changed.
        """
        if not self.record_file.is_file():
            return
        record = read_json_mapping(self.record_file, f"remove it and {self.part}, and start again")
        _check_settings(self.part, self.settings, record)
        corrupt = InputError(f"{self.record_file} is corrupt: remove it and {self.part}, and start again")
        counts = {name: record.get(name) for name in _COUNTS}
        if any(type(count) is not int or count < 0 for count in counts.values()):
            raise corrupt
        for name, count in counts.items():
            setattr(self, name, count)
        if not self.bytes:
            return
        left = self.bytes
        with self.part.open("rb") as file:
            while left > 0 and (line := file.readline(left)):
                self._digest.update(line)
                left -= len(line)
        if left or self._digest.hexdigest() != record.get("sha256"):
            raise InputError(f"{self.part} has changed since castlm wrote it: remove it, and start again")
        with self.part.open("rb") as file:
            rows = [json.loads(line) for line in islice(file, self.samples)]
        if len(rows) != self.samples:
            raise corrupt
        for row in rows:
            prompt = prompt_of(row["sample"])
            self.is_new(prompt, generated_of(row, prompt))


_COUNTS = ("batches", "samples", "tokens", "bytes", "duplicates", "cut", "dropped")


def _check_settings(file: Path, settings: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raises `InputError` if the record of `file` has other settings."""
    mine, theirs = json.loads(json.dumps(settings)), record.get("settings")
    if not isinstance(theirs, dict):
        raise InputError(f"the record of {file} is corrupt, it has no settings: remove both, and start again")
    names = [name for name in sorted(mine | theirs) if theirs.get(name) != mine.get(name)]
    changed = [f"{name} {theirs.get(name)} -> {mine.get(name)}" for name in names]
    if changed:
        raise InputError(f"{file} was sampled differently ({', '.join(changed)}): undo that, or start again")


def finished_samples(path: str | Path, settings: Mapping[str, Any], num_tokens: int) -> dict[str, Any] | None:
    """The record of a finished file; None if the file at `path` is unfinished or missing.

    Raises:
        InputError: it has other settings or fewer tokens, or has changed since it was written.
    """
    path = user_path(path)
    record = read_record(_record(path))
    is_recorded = record.get("finished") is True
    if not path.is_file() or (not is_recorded and _part(path).exists()):
        return None
    is_whole = sha256_file(path) == record.get("sha256")
    if not is_recorded:
        if not is_whole:
            return None
        record = {name: value for name, value in record.items() if name != "replaces"} | {"finished": True}
        atomic_write_json(_record(path), record)  # a kill came between the name of the file and its record
    _check_settings(path, settings, record)
    if not is_whole:
        raise InputError(f"{path} is not as castlm wrote it: move it away, or name another file")
    if type(record.get("tokens")) is not int:
        raise InputError(f"{_record(path)} is corrupt: remove it and {path}, and start again")
    if record["tokens"] < num_tokens:
        raise InputError(f"{path} is finished with {record['tokens']:,} tokens: lower num_tokens, or overwrite it")
    return record


def generated_of(row: Mapping[str, Any], prompt: str) -> str:
    """The part of a row's text that the model wrote, without the prompt."""
    if "text" in row:
        return str(row["text"]).removeprefix(prompt)
    user, assistant = (str(message["content"]) for message in row["messages"])
    return assistant if prompt else f"{user}\0{assistant}"


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()[:16]


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".castlm.json")


@contextmanager
def open_samples(
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    dedup_prefix: int,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[SampleFile]:
    """Opens the file at `path` for new samples and holds its lock during the block.

    Args:
        settings: everything that the samples depend on; `resume` compares them.
        resume: continue an unfinished file, if there is one.
        dedup_prefix: characters after which two texts with the same beginning count as one; 0 compares whole texts.

    Raises:
        InputError: the file exists (without `overwrite`), is not castlm's, or another process writes it.
    """
    path = user_path(path)
    if path.suffix != ".jsonl":
        raise InputError(f"output_file {path} does not end in .jsonl, which tells its readers what it is: rename it")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output_file {path} cannot be made: name a file in an existing folder")
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, "sample"))
        except HeldError:
            raise InputError(f"{path} is being written by another process: wait for it, or name another file") from None
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; name another file") from error
        try:
            yield SampleFile(path, settings, dedup_prefix, _replaced(path, overwrite, resume))
        finally:
            lock.unlink(missing_ok=True)


def _replaced(path: Path, overwrite: bool, resume: bool) -> str | None:
    """Checks that nothing is in the way, and returns the SHA-256 of the finished file that will be replaced."""
    record = read_record(_record(path))
    if resume and record.get("finished") is False:
        if record.get("bytes") and not _part(path).is_file():
            raise InputError(f"{_part(path)} is gone: remove {_record(path)} to start again")
    elif _part(path).exists():
        if not record:
            raise InputError(f"{_part(path)} has no record of castlm beside it: move it away")
        if not overwrite:
            raise InputError(f"{_part(path)} is there, from a start that was stopped: pass resume, or overwrite")
    if not path.exists():
        return None
    if not (overwrite or (resume and record.get("finished") is False)):
        raise InputError(f"{path} already exists: name another file or pass overwrite")
    digest = sha256_file(path)
    if digest not in (record.get("sha256"), record.get("replaces")):
        raise InputError(f"{path} is not as castlm wrote it: move it away, or name another file")
    return digest


def sample(
    sampler: Sampler,
    file: SampleFile,
    *,
    num_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Samples batches into `file` until it holds `num_tokens` tokens, and returns its record.

    Args:
        progress: called with (tokens so far, `num_tokens`) after each batch.
        say: called with a line, once, if most texts are empty or unfinished.

    Raises:
        InputError: as `SampleFile.add`, or `PATIENCE` batches in a row have brought nothing new.
    """
    without, said = 0, False
    file.begin()
    while file.tokens < num_tokens:
        rows = []
        for place, found in enumerate(sampler.batch(file.batches), file.batches * sampler.options.batch_size):
            if row := _counted(file, found, place, sampler.prompt_of(place)):
                rows.append(row)
        file.add(rows)
        without = 0 if rows else without + 1
        num_sampled = file.batches * sampler.options.batch_size
        if not said and num_sampled >= FEW_SAMPLES and 2 * file.dropped > num_sampled:
            say(
                f"{file.dropped:,} of {num_sampled:,} texts are left out, empty or unfinished: raise max_new_tokens, "
                "lower temperature and top_p, or pass prompts"
            )
            said = True
        if without == PATIENCE:
            raise InputError(
                f"{PATIENCE} batches in a row have brought no new text; {file.part} holds {file.samples:,}: raise "
                "temperature, max_new_tokens or the number of prompts, or lower num_tokens"
            )
        progress(min(file.tokens, num_tokens), num_tokens)
    return file.finish()


def _counted(file: SampleFile, found: Sample | None, place: int, prompt: str) -> dict[str, Any] | None:
    """Counts a sample and returns its row with its number; None if it is dropped."""
    if found is None or not generated_of(found.row, prompt).strip():
        file.dropped += 1
        return None
    if not file.is_new(prompt, generated_of(found.row, prompt)):
        file.duplicates += 1
        return None
    file.tokens += found.num_tokens
    file.cut += not found.is_whole
    return {**found.row, "sample": place}
