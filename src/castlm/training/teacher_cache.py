"""The teacher's most probable tokens of every block of text it has read, on disk: what was read once is not read again.

A block is found by its token ids, whatever run, rank or order asks for it. The loss is the same whether a block was
found or taught anew. Where the cache holds all blocks of a run, the teacher is not loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.shards import local
from castlm.core.sparsify import dense_name
from castlm.core.taught import TopTokens
from castlm.distributed.world import World
from castlm.files import atomic_file, atomic_write_json, is_disk_full, widen_access
from castlm.progress import note

_FORMAT = 1


def fingerprint(model: nn.Module) -> str:
    """Of the dense weights of `model`, the same on any number of ranks: the first 64 numbers of every parameter's first
    row, by name. To be called on the main rank, which holds the first rows."""
    digest = hashlib.sha256()
    for name, parameter in sorted((dense_name(n), p) for n, p in model.named_parameters()):
        if ".parametrizations." not in name:  # else a weight scale
            digest.update(name.encode())
            digest.update(local(parameter.detach())[:1].flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class TeacherCache:
    """Blocks in `folder`/blocks, each its own safetensors file; what taught them in `folder`/teacher.json.

    Args:
        stream: what orders the blocks of a run: hash of the text, seed, seq_len.

    Raises:
        InputError: `folder` cannot be made, or is something else.
    """

    def __init__(self, folder: str, stream: list[Any], world: World) -> None:
        self.folder, self.world = Path(folder).expanduser(), world
        self._coverage = self.folder / f"coverage-{hashlib.sha256(json.dumps(stream).encode()).hexdigest()[:16]}.json"
        self._failure: str | None = None
        self.complete = False
        """Whether all blocks of the run are here, so that it has no teacher."""
        world.on_main(self._make_folder)

    def _make_folder(self) -> None:
        known = self.folder / "teacher.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = not known.is_file() and any(not entry.name.startswith(".") for entry in self.folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}; choose another teacher_cache") from error
        if foreign:
            raise InputError(f"{self.folder} holds something else than a teacher cache: choose another teacher_cache")

    def claim(self, teacher: nn.Module, **settings: Any) -> None:
        """Notes on the main rank whose teaching this is, or proves that it is that of `teacher` and `settings`.

        Raises:
            InputError: it is of another.
        """

        def check() -> None:
            known, mine = self.folder / "teacher.json", {"format": _FORMAT, "weights": fingerprint(teacher), **settings}
            if not known.is_file():
                atomic_write_json(known, mine)
                return
            theirs = json.loads(known.read_text(encoding="utf-8"))
            changed = [f"{key} {theirs.get(key)} -> {value}" for key, value in mine.items() if theirs.get(key) != value]
            if changed:
                raise InputError(f"{self.folder} is of another teacher ({', '.join(changed)}): choose another folder")

        self.world.on_main(check)

    def covered(self) -> int:
        """How many blocks of the stream are here, from its start on."""
        return self.world.on_main(self._covered)

    def _covered(self) -> int:
        known = self._coverage.is_file()
        return int(json.loads(self._coverage.read_text(encoding="utf-8"))["blocks"]) if known else 0

    def cover(self, first: int, last: int) -> None:
        """Notes on the main rank that blocks `first` to `last` of the stream are here, if all before them are.

        Raises:
            InputError: a rank could not write one.
        """
        self.world.check_all(self._failure)
        if self.world.is_main and not self.complete and first <= self._covered() < last:
            atomic_write_json(self._coverage, {"blocks": last})

    def get(self, input_ids: Tensor) -> TopTokens | None:
        """What was taught of `input_ids` (batch, seq), on their device; None where a rank lacks a block, for then the
        teacher runs on all.

        Raises:
            InputError: a block is missing, and there is no teacher; or a rank could not write one.
        """
        found = [self._read(row) for row in input_ids.cpu()]
        missing = any(taught is None for taught in found)
        if missing and self.complete:
            self._failure = f"{self.folder} lacks a block of this run: remove {self._coverage}, to load the teacher"
        states = self.world.sum(torch.tensor([missing, self._failure is not None], device=self.world.device).float())
        if states[1]:
            self.world.check_all(self._failure)
        if states[0]:
            return None
        columns = (torch.stack(column).to(input_ids.device) for column in zip(*(taught for taught in found if taught)))
        return TopTokens(*columns)

    def put(self, input_ids: Tensor, taught: TopTokens) -> None:
        """Keeps what the teacher says of `input_ids` (batch, seq). A failure is told by the next `get` or `cover`."""
        for row, tokens, log_probs in zip(input_ids.cpu(), taught.tokens.cpu(), taught.log_probs.cpu()):
            path = self._path(row)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as temporary:
                    save_file({"tokens": tokens.contiguous(), "log_probs": log_probs.contiguous()}, temporary)
                    widen_access(temporary, path.parent)
            except (OSError, SafetensorError) as error:
                reason = "the disk is full" if is_disk_full(error) else str(error)
                self._failure = f"{path} cannot be written: {reason}; free some space, or run without teacher_cache"
                return

    def _path(self, row: Tensor) -> Path:
        name = hashlib.sha256(row.to(torch.int64).numpy().tobytes()).hexdigest()[:32]
        return self.folder / "blocks" / name[:2] / f"{name}.safetensors"

    def _read(self, row: Tensor) -> TopTokens | None:
        path = self._path(row)
        if not path.is_file():
            return None
        try:
            return TopTokens(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            note(f"{path} cannot be read ({error}) and is taught anew")
            return None
