"""The teacher's most probable tokens for every sequence, stored on disk, so that the teacher reads each sequence once.

The key of a sequence is its token ids and the beginnings of its documents, for any run, rank or order. Every position
is stored, whether or not it counts in the loss. The loss is the same with a cached sequence as with the teacher. If the
cache holds all sequences of a run, the teacher is not loaded.

Each file has a checksum over its teacher, its token ids and its content. The teacher reads a sequence again if its file
is damaged or belongs to another teacher.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from castlm.core.distill import TopTokens
from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_file, atomic_write_json, is_disk_full, widen_access
from castlm.progress import note
from castlm.world import World
from castlm_runtime.reading import read_json_object, user_path

_FORMAT = 4


class TeacherCache:
    """Sequences in `folder`/blocks, one safetensors file each; their teacher and settings in `folder`/teacher.json.

    Args:
        stream: all values that determine the order of the sequences of a run: hash of the text, seed, seq_len.
        teacher: the hash of its weights and its settings. A cache belongs to one teacher.

    Raises:
        InputError: `folder` cannot be made, holds other files, or belongs to another teacher or other settings.
    """

    def __init__(self, folder: str, stream: list[Any], teacher: Mapping[str, Any], world: World) -> None:
        self.folder, self.world = user_path(folder), world
        teacher = {"format": _FORMAT, **teacher}
        self._teacher = json.dumps(teacher, sort_keys=True)
        self._coverage = self.folder / f"coverage-{hashlib.sha256(json.dumps(stream).encode()).hexdigest()[:16]}.json"
        self._failure: str | None = None
        self.complete = False
        """Whether the cache holds all sequences of the run, which then has no teacher."""
        world.on_main(lambda: self._claim(teacher))

    def _claim(self, teacher: dict[str, Any]) -> None:
        """Records the teacher in a new cache, or checks that the cache belongs to it."""
        make_cache_folder(self.folder)
        known = self.folder / "teacher.json"
        if not known.is_file():
            atomic_write_json(known, teacher)
            return
        theirs = read_json_object(known, f"remove {self.folder}")
        changed = [f"{key} {theirs.get(key)} -> {value}" for key, value in teacher.items() if theirs.get(key) != value]
        if changed:
            raise InputError(f"{self.folder} has another teacher ({', '.join(changed)}): choose another folder")

    def covers(self, num_sequences: int) -> bool:
        """Whether the cache holds the first `num_sequences` sequences of the stream."""

        def covers() -> bool:
            blocks, every_epoch = self._covered()
            return every_epoch or num_sequences <= blocks

        return self.world.on_main(covers)

    def _covered(self) -> tuple[int, bool]:
        """The number of cached sequences from the beginning of the stream, and whether they serve every epoch."""
        if not self._coverage.is_file():
            return 0, False
        record = read_json_object(self._coverage, "remove it, to load the teacher")
        blocks, every_epoch = record.get("blocks"), record.get("every_epoch", False)
        if type(blocks) is not int or blocks < 0 or type(every_epoch) is not bool:
            raise InputError(f"{self._coverage} is corrupt: {record}; remove it, to load the teacher")
        return blocks, every_epoch

    def cover(self, first: int, last: int, every_epoch: bool = False) -> None:
        """Records that the cache holds sequences `first` to `last` of the stream, if it holds all before them.

        With `every_epoch` they include a whole epoch, and all other epochs have the same sequences. Raises `InputError`
        if a rank could not write a sequence.
        """
        self.world.check_all(self._failure)
        if not self.world.is_main or self.complete:
            return
        blocks, known = self._covered()
        if first <= blocks and (blocks < last or (every_epoch and not known)):
            record = {"blocks": max(blocks, last)}
            if every_epoch or known:
                record["every_epoch"] = True
            atomic_write_json(self._coverage, record)

    def get(self, input_ids: Tensor, position_ids: Tensor | None = None) -> TopTokens | None:
        """The teacher's tokens for `input_ids` (batch, seq), on their device, whose documents begin by `position_ids`.

        None if any rank lacks a sequence, because the teacher then runs on all ranks. Raises `InputError` if there is
        no teacher to do so, or a rank could not write a sequence.
        """
        # A batch is served whole or not at all: on all ranks, since a teacher that runs gathers its weights from all.
        cached = [self._read(row) for row in _rows(input_ids, position_ids)]
        missing = any(top is None for top in cached)
        if missing and self.complete:
            self._failure = f"{self.folder} lacks a sequence of this run: remove {self._coverage}, to load the teacher"
        states = self.world.sum(torch.tensor([missing, self._failure is not None], device=self.world.device).float())
        if states[1]:
            self.world.check_all(self._failure)
        if states[0]:
            return None
        columns = (torch.stack(column).to(input_ids.device) for column in zip(*(top for top in cached if top)))
        return TopTokens(*columns)

    def put(self, input_ids: Tensor, top: TopTokens, position_ids: Tensor | None = None) -> None:
        """Stores the teacher's tokens for `input_ids` (batch, seq). The next `get` or `cover` raises its failure."""
        rows = _rows(input_ids, position_ids)
        for row, tokens, log_probs in zip(rows, top.tokens.cpu(), top.log_probs.cpu()):
            path = self._path(row)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as temporary:
                    content = {"tokens": tokens.contiguous(), "log_probs": log_probs.contiguous()}
                    save_file(content, temporary, metadata={"checksum": self._checksum(row, **content)})
                    widen_access(temporary, path.parent)
            except (OSError, SafetensorError) as error:
                reason = "the disk is full" if is_disk_full(error) else str(error)
                self._failure = f"{path} cannot be written: {reason}; free some space, or run without teacher_cache"
                return

    def _path(self, row: Tensor) -> Path:
        # The key is the content, so that another order, batch size or number of ranks finds the same file.
        name = hashlib.sha256(row.to(torch.int64).numpy().tobytes()).hexdigest()[:32]
        return self.folder / "blocks" / name[:2] / f"{name}.safetensors"

    def _checksum(self, row: Tensor, tokens: Tensor, log_probs: Tensor) -> str:
        digest = hashlib.sha256(self._teacher.encode())
        for tensor in (row.to(torch.int64), tokens, log_probs):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _read(self, row: Tensor) -> TopTokens | None:
        path = self._path(row)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                checksum = (file.metadata() or {}).get("checksum")
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            top = TopTokens(**content)
            if checksum != self._checksum(row, **content):
                raise ValueError("its checksum does not match")
            return top
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            note(f"{path} is damaged ({error}): the teacher reads the sequence again")
            return None


def make_cache_folder(folder: Path) -> None:
    """Makes the folder of a teacher cache. Raises `InputError` if it holds other files."""
    folder.mkdir(parents=True, exist_ok=True)
    is_known = (folder / "teacher.json").is_file()
    if not is_known and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"{folder} holds other files than a teacher cache: choose another teacher_cache")


def _rows(input_ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
    """The keys of sequences: token ids (seq,), or (2, seq) with position ids if documents are kept apart."""
    if position_ids is None:
        return list(input_ids.cpu())
    return list(torch.stack([input_ids, position_ids], dim=1).cpu())


def teacher_dtype(precision: str) -> torch.dtype:
    """The dtype of the teacher's weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
