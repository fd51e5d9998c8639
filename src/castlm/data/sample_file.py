"""Writes samples to a file: without duplicates, whole after a kill, and without overwriting files of others.

Rows go into `NAME.part` first. `NAME.castlm.json`, written after each batch, records the settings and the counts, bytes
and hash of complete batches; after a kill, bytes beyond them are cut off. A finished file gets its name in one rename.
It is known to be finished by its hash, which is the recorded one, and because no `NAME.part` is left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.data.sampling import Sample, Sampler, prompt_of
from castlm.files.atomic_file import atomic_write_json, flush_folder
from castlm.files.disk import reporting_full_disk
from castlm.files.lock import HeldError, locked
from castlm.files.reading import read_record, sha256_file, user_path

FEW_SAMPLES = 32
"""Number of texts after which a line may report that most of them are left out."""

PATIENCE = 20
"""Consecutive batches without a new text after which sampling stops."""

_COUNTS = ("batches", "samples", "tokens", "bytes", "duplicates", "cut", "dropped")


class SampleFile:
    """Rows of samples, appended batch by batch. Made by `open_samples`.

    Attributes:
        batches, samples, tokens, bytes, duplicates, cut, dropped: counts of the complete batches.
        is_finished: whether the file was finished by an earlier start.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], prompts: Sequence[str] | None, dedup_prefix: int
    ) -> None:
        self.path, self.part, self.record_file = path, _beside(path, ".part"), _beside(path, ".castlm.json")
        self.settings = json.loads(json.dumps(settings))  # as a record gives them back
        self.is_finished = False
        self.batches = self.samples = self.tokens = self.bytes = self.duplicates = self.cut = self.dropped = 0
        self._prompts, self._dedup_prefix = prompts, dedup_prefix
        self._replaces: str | None = None  # SHA-256 of the file that the new one replaces
        self._seen: set[bytes] = set()
        self._digest = hashlib.sha256()

    def begin(self, overwrite: bool, resume: bool) -> None:
        """Continues an earlier start, or begins a new one where nothing is in the way.

        Raises:
            InputError: as `open_samples`.
        """
        record = read_record(self.record_file)
        digest = sha256_file(self.path) if self.path.exists() else None
        is_whole = digest is not None and digest == record.get("sha256")
        self.is_finished = resume and is_whole and not self.part.exists()
        if not self.is_finished:
            if digest is not None and not (overwrite or (resume and record)):
                raise InputError(f"{self.path} already exists: name another file or pass overwrite")
            if digest not in (None, record.get("sha256"), record.get("replaces")):
                raise InputError(f"{self.path} is not as castlm wrote it: move it away, or name another file")
            if self.part.exists() and not (record and (resume or overwrite)):
                remedy = "pass resume, or overwrite" if record else "it has no record of castlm beside it: move it away"
                raise InputError(f"{self.part} is there, from a start that was stopped: {remedy}")
        if resume and record:
            self._restore(record)
        if self.is_finished:
            return
        self._replaces = digest
        if not self.batches:  # a kill from now on leaves no rows without a record
            self._write_record()

    def _restore(self, record: Mapping[str, Any]) -> None:
        before, now = record.get("settings"), self.settings
        changed = InputError(
            f"{self.part} or its record {self.record_file.name} has changed since castlm wrote it: remove both, and "
            "start again"
        )
        counts = {name: record.get(name) for name in _COUNTS}
        if not isinstance(before, dict) or any(type(count) is not int or count < 0 for count in counts.values()):
            raise changed
        names = [name for name in sorted(now | before) if before.get(name) != now.get(name)]
        if found := [f"{name} {before.get(name)} -> {now.get(name)}" for name in names]:
            raise InputError(f"{self.path} was sampled differently ({', '.join(found)}): undo that, or start again")
        vars(self).update(counts)
        if self.is_finished or not self.bytes:
            return
        number = 0
        try:
            with self.part.open("rb") as file:
                for number, line in enumerate(islice(file, self.samples), 1):  # noqa: B007  # compared below
                    self._digest.update(line)
                    row = json.loads(line)
                    self._is_new(prompt_of(self._prompts, row["sample"]), row)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise changed from error
        if number != self.samples or self._digest.hexdigest() != record.get("sha256"):
            raise changed

    def add(self, found: Sequence[Sample | None], size: int) -> int:
        """Appends the new texts of a batch of `size` and records that it is done; returns their number.

        Raises:
            InputError: the disk is full.
        """
        rows = []
        for place, sample in enumerate(found, self.batches * size):
            prompt = prompt_of(self._prompts, place)
            if sample is None or not generated_of(sample.row, prompt).strip():
                self.dropped += 1
            elif not self._is_new(prompt, sample.row):
                self.duplicates += 1
            else:
                self.tokens += sample.num_tokens
                self.cut += not sample.is_whole
                rows.append({**sample.row, "sample": place})
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with (
            reporting_full_disk(self.part, "free some space and resume"),
            self.part.open("r+b" if self.bytes else "wb") as file,
        ):
            file.truncate(self.bytes)
            file.seek(self.bytes)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(content)
        self.bytes += len(content)
        self.samples += len(rows)
        self.batches += 1
        self._write_record()
        return len(rows)

    def finish(self) -> None:
        """Gives the file its name.

        Raises:
            InputError: another file of that name has appeared.
        """
        if self.path.exists() and sha256_file(self.path) != self._replaces:
            raise InputError(
                f"{self.path} was not written by castlm: move it away and resume; the text is in {self.part}"
            )
        os.replace(self.part, self.path)
        flush_folder(self.path.parent)
        self._replaces = None
        self._write_record()

    def _write_record(self) -> None:
        record = {name: getattr(self, name) for name in _COUNTS}
        record |= {"sha256": self._digest.hexdigest(), "settings": self.settings}
        atomic_write_json(self.record_file, record | ({"replaces": self._replaces} if self._replaces else {}))

    def _is_new(self, prompt: str, row: Mapping[str, Any]) -> bool:
        """Whether no earlier text is the same or has the same first `dedup_prefix` characters after its prompt."""
        generated = generated_of(row, prompt)
        keys = [_hash("whole", prompt, generated)]
        if self._dedup_prefix:
            keys.append(_hash("prefix", prompt, generated[: self._dedup_prefix]))
        is_new = self._seen.isdisjoint(keys)
        if is_new:
            self._seen.update(keys)
        return is_new


def generated_of(row: Mapping[str, Any], prompt: str) -> str:
    """The part of a row's text that the model wrote, without the prompt."""
    if "text" in row:
        return str(row["text"]).removeprefix(prompt)
    question, answer = (str(message["content"]) for message in row["messages"])
    return answer if prompt else f"{question}\0{answer}"


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()[:16]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


@contextmanager
def open_samples(
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    prompts: Sequence[str] | None = None,
    dedup_prefix: int,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[SampleFile]:
    """Opens the file at `path` for new samples and holds its lock during the block.

    Args:
        settings: everything that the samples depend on; `resume` compares them.
        prompts: as for `Sampler`.
        dedup_prefix: characters after which two texts with the same beginning count as one; 0 compares whole texts.
        resume: continue an unfinished file, or open a finished one, if there is one.

    Raises:
        InputError: the file exists (without `overwrite`), is not castlm's, or another process writes it; or an earlier
            start had other settings, or its files have changed.
    """
    path = user_path(path)
    if path.suffix != ".jsonl" or path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output_file {path} cannot be made: name a file that ends in .jsonl in an existing folder")
    lock = path.with_name(f".{path.name}.lock")
    try:
        with locked(lock, "sample"):
            try:
                file = SampleFile(path, settings, prompts, dedup_prefix)
                file.begin(overwrite, resume)
                yield file
            finally:
                lock.unlink(missing_ok=True)
    except HeldError:
        raise InputError(f"{path} is being written by another process: wait for it, or name another file") from None


def sample(
    sampler: Sampler,
    file: SampleFile,
    *,
    num_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Samples batches into `file` until it holds `num_tokens` tokens, and finishes it.

    Args:
        progress: called with (tokens so far, `num_tokens`) after each batch.
        say: called with a line, once, if most texts are empty or unfinished.

    Raises:
        InputError: as `SampleFile.add`, or `PATIENCE` batches in a row have brought nothing new.
    """
    size, without, said = sampler.options.batch_size, 0, False
    while file.tokens < num_tokens:
        without = 0 if file.add(sampler.batch(file.batches), size) else without + 1
        num_sampled = file.batches * size
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
    file.finish()
