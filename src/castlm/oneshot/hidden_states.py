"""The hidden states of a calibration text, on disk: what enters one transformer block, and what enters the next.

They are read and written with plain calls. A memory-mapped file would count as the process's own memory.
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from castlm.files.atomic_file import flush_file


class HiddenStates(MutableSequence[Tensor]):
    """Batches of one shape, fp32, in `folder/NAME-00000.bin` for the first block, and so on.

    The last batch can have fewer sequences. Reading gives what enters the block `index`; writing goes to the file of
    the next, and `go_on` moves on to it. A kill at any moment leaves the file of `index` whole. The first batch that is
    written empties its file, which may be of an earlier start.

    Args:
        shape: of a batch, (batch, seq, hidden).
        index: of the block whose inputs are in the file already, `num_batches` of them.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        device: torch.device,
        index: int = 0,
        num_batches: int = 0,
        name: str = "hidden",
    ) -> None:
        self.folder, self.shape, self.device, self.index, self.num_batches = folder, shape, device, index, num_batches
        self.name = name
        self.batch_bytes = 4 * math.prod(shape)

    def file(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.bin"

    def entering_next(self) -> HiddenStates:
        """What enters the next block, once it is written."""
        return HiddenStates(self.folder, self.shape, self.device, self.index + 1, self.num_batches, self.name)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.num_batches:
            raise IndexError(number)
        offset = number * self.batch_bytes
        count = self.batch_bytes // 4
        values = np.fromfile(self.file(self.index), dtype=np.float32, count=count, offset=offset)
        return torch.from_numpy(values).view(-1, *self.shape[1:]).to(self.device)

    def __setitem__(self, number: Any, value: Any) -> None:
        self._write(self.file(self.index + 1), number, value)

    def insert(self, index: int, value: Tensor) -> None:
        """Adds a batch at the end, to the file of `index`."""
        assert index == self.num_batches, "batches are added at the end"
        self._write(self.file(self.index), index, value)
        self.num_batches += 1

    def __delitem__(self, number: Any) -> None:
        raise NotImplementedError("batches are not removed")

    def flush(self) -> None:
        """Waits until what enters the next block is on the disk."""
        flush_file(self.file(self.index + 1))

    def go_on(self) -> None:
        """Moves on to the next block, and deletes the file of this one."""
        self.index += 1
        self.file(self.index - 1).unlink(missing_ok=True)

    def _write(self, file: Path, number: int, value: Tensor) -> None:
        with file.open("r+b" if number else "wb") as opened:
            opened.seek(number * self.batch_bytes)
            opened.write(memoryview(value.float().cpu().contiguous().numpy()).cast("B"))
