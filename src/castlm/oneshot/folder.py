"""The work of a start on disk: a process killed at any moment loses the work of at most one transformer block.

A folder holds a file of weights for each finished block, the hidden states that enter the next one, and a record, which
is written last. Of several ranks, each reads and writes the hidden states of its own parts of the text, in a file for
each part, so that any number of ranks continues; rank 0 writes all else. A memory-mapped file would count as the
process's own memory, so hidden states are read and written.

Every rank has the whole block, to pass its text on, but one rank writes it. A block has one file, which `castlm prune`
links into the result as a file of the model: ranks that wrote parts of it would share a file over the network, or leave
as many files as there are ranks. A block of a 70B model is 3.4 GB in fp32, which takes a disk of 1.5 GB/s some 2 s to
write and 2 s to read back: about 6 minutes for 80 blocks, however many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from castlm.core.errors import InputError
from castlm.dtypes import equal_in_bits
from castlm.files.atomic_file import (
    atomic_file,
    atomic_write_json,
    flush_file,
    is_whole,
    plain_json,
    reporting_full_disk,
    size_and_crc,
)
from castlm.files.output import begin_output, output_folder
from castlm.files.record import OUTPUT, command_of
from castlm.world import ALONE, World
from castlm_runtime.reading import read_json_object

FORMAT = 5  # of the record; an unfinished start of another one is refused by name
PROGRESS = "progress.json"
COPY = "copy.safetensors"
"""A given model whose own files cannot be read weight by weight."""


def partial_folder(folder: Path) -> Path:
    """The folder for the work of a start, beside the output `folder`, until the output is complete."""
    return folder.with_name(f"{folder.name}.partial")


def block_file(folder: Path, index: int) -> Path:
    """The file of a finished transformer block in the folder of a start."""
    return folder / f"block-{index:05d}.safetensors"


@contextmanager
def begun_work(output: Path) -> Iterator[Path]:
    """Locks and begins `partial_folder(output)` for the work of a start, and yields it; the work stays at the end."""
    partial = partial_folder(output)
    with output_folder(partial, "prune", resume=True):
        begin_output(partial, "prune", resume=True)
        yield partial


def drop_work(output: Path) -> None:
    """Deletes the work of a start once the result in `output` is complete."""
    partial = partial_folder(output)
    if command_of(partial) == "prune":
        with output_folder(partial, "prune", resume=True):
            remove_work(partial)


_UNSET = "not set"


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The options of a start that differ, with both values; of an option with several entries, the entry.

    A step or a text that is switched off takes its options with it, so that either side may lack some.
    """
    for name in dict.fromkeys((*now, *then)):
        before, value = then.get(name, _UNSET), now.get(name, _UNSET)
        if isinstance(before, dict) and isinstance(value, dict):
            yield from _differences(before, value, f"{within}{name}.")
        elif before != value:
            yield f"{within}{name}", before, value


def remove_work(folder: Path) -> None:
    """Deletes the files of a `StartFolder` once the result is complete; other files in `folder` stay."""
    # The record goes first: without it the rest is no start, whenever this is killed.
    for pattern in (PROGRESS, COPY, "block-?????.safetensors", "*-?????-?.bin", OUTPUT):
        for file in folder.glob(pattern):
            file.unlink()


class StartFolder:
    """The folder of one start.

    Args:
        path: an existing folder that only these ranks write to.
        options: all options that the result depends on, for JSON.
        restart: begin again if the earlier start has other options or is damaged; otherwise raises `InputError`.
        world: the ranks that make the start, which all see the folder; rank 0 checks what it holds.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], restart: bool = False, world: World = ALONE) -> None:
        self.path, self.world = path, world
        # Through JSON, as the saved ones went: tuples become lists.
        self.options = plain_json({"format": FORMAT, **options})
        self.done = 0
        """The number of finished blocks."""
        self.results: dict[str, Any] = {}
        """Their results, as `record` was given them."""
        self._files: dict[str, Any] = {}  # size and CRC-32 by name: finished blocks, and the next block's inputs

        def found() -> tuple[int, dict[str, Any], dict[str, Any]]:
            try:
                return self._read()
            except InputError:
                if not restart:
                    raise
                return 0, {}, {}

        self.done, self.results, self._files = world.on_main(found, patient=True)

    def _read(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        file, remedy = self.path / PROGRESS, "overwrite it, or delete its folder to start again"
        if not file.exists():
            return 0, {}, {}
        record = read_json_object(file, remedy)
        then = record.get("options", {})
        if differs := next(_differences(then, self.options), None):
            name, before, now = differs
            raise InputError(
                f"{self.path} holds an unfinished start with {name} = {str(before)[:100]}, and it is {str(now)[:100]} "
                "now: use the same options to continue, overwrite it to start again, or delete that folder"
            )
        try:
            done, results, files = int(record["done"]), dict(record["results"]), dict(record["files"])
            damaged = next((name for name, known in files.items() if not is_whole(self.path / name, known)), None)
        except (KeyError, TypeError, ValueError):
            damaged = PROGRESS
        if damaged is not None:
            raise InputError(f"{self.path / damaged} is missing or damaged: {remedy}")
        return done, results, files

    def block_file(self, index: int) -> Path:
        return block_file(self.path, index)

    def read_block(self, index: int) -> dict[str, Tensor]:
        with safe_open(self.block_file(index), "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the weights of a finished block, reads them back and compares them bit for bit."""
        file = self.block_file(index)
        with self.writing(), atomic_file(file) as temporary:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            flush_file(temporary)
        for name, found in self.read_block(index).items():
            if not equal_in_bits(found, tensors[name]):
                raise InputError(f"{name} has other values in {file} than in memory: the disk or memory is faulty")

    def record(self, done: int, results: dict[str, Any], streams: Sequence[HiddenStates], has_next: bool) -> None:
        """Records that `done` blocks are finished, and moves to the next; all ranks call it.

        Args:
            streams: the hidden states; if `has_next`, the inputs of the next block are written already.
        """
        written = [self.block_file(done - 1)] if self.world.rank == 0 else []
        if has_next:
            for states in streams:
                written += states.flush()
        # The hidden states of the block before are deleted below, so that their sizes leave the record; blocks stay.
        self._files = {name: known for name, known in self._files.items() if name.startswith("block-")}
        for of_rank in self.world.gather({file.name: size_and_crc(file) for file in written}, patient=True):
            self._files |= of_rank
        self.done, self.results = done, results
        record = {"options": self.options, "done": done, "results": results, "files": self._files}
        with self.writing():
            self.world.on_main(lambda: atomic_write_json(self.path / PROGRESS, record), patient=True)
        for states in streams:
            states.move_on(has_next)

    def writing(self) -> AbstractContextManager[None]:
        """Turns a full disk into one line with the remedy."""
        return reporting_full_disk(self.path, "free some space and run the same command again to continue")


class HiddenStates(MutableSequence[Tensor]):
    """Batches of one shape and dtype, in a file for each block and part of the text: `folder/NAME-00000-0.bin` first.

    The last batch can have fewer sequences. Reading returns the inputs of block `index`; writing goes to the files of
    the next block, and `move_on` makes these the current ones. A kill at any moment leaves the files of `index` whole.
    Writing the first batch of a part empties its file, which may be from an earlier start.

    For a GPU, batches can also stay in pinned memory of the host, from which it copies them while it works: then the
    files serve a start that continues, and a batch is read from its file at most once.

    Args:
        lengths: the number of batches in each part of this rank, by the number of the part.
        shape: shape of a batch, (batch, seq, hidden).
        index: the block whose inputs the files hold already if `is_full`.
        pinned: the batches in pinned memory, by number: the block that each enters, and its values; None to keep none.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        lengths: Mapping[int, int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        index: int = 0,
        is_full: bool = False,
        pinned: dict[int, tuple[int, Tensor]] | None = None,
    ) -> None:
        self.pinned = pinned
        self.folder, self.name, self.shape, self.dtype, self.device = folder, name, shape, dtype, device
        self.lengths, self.block_index = lengths, index
        # The part of each batch, and its position there.
        self._places = [(part, position) for part, length in lengths.items() for position in range(length)]
        self.num_batches = len(self._places) if is_full else 0
        self.batch_bytes = dtype.itemsize * math.prod(shape)

    def files(self, index: int) -> list[Path]:
        """The files of the inputs of a block."""
        return [self._file(index, part) for part in self.lengths]

    def _file(self, index: int, part: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}-{part}.bin"

    def of_next_block(self) -> HiddenStates:
        """The inputs of the next block, once they are written."""
        like = self.lengths, self.shape, self.dtype, self.device
        return HiddenStates(self.folder, self.name, *like, self.block_index + 1, is_full=True, pinned=self.pinned)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.num_batches:
            raise IndexError(number)
        pinned = (self.pinned or {}).get(number)
        if pinned is not None and pinned[0] == self.block_index:
            return pinned[1].to(self.device, non_blocking=True)
        part, position = self._places[number]
        file = self._file(self.block_index, part)
        # As bytes, because numpy has no bf16. One batch, (2, 512, 576) bf16, is 1.1 MiB.
        stored = np.fromfile(file, np.uint8, self.batch_bytes, offset=position * self.batch_bytes)
        batch = torch.from_numpy(stored).view(self.dtype).view(-1, *self.shape[1:])
        if pinned is None:
            batch = self._on_host(self.block_index, number, batch)
        return batch.to(self.device)

    def __setitem__(self, number: Any, value: Any) -> None:
        self._write(self.block_index + 1, number, value)

    def insert(self, index: int, value: Tensor) -> None:
        """Adds a batch at the end, to the files of `index`."""
        assert index == self.num_batches, "batches are added at the end"
        self._write(self.block_index, index, value)
        self.num_batches += 1

    def __delitem__(self, number: Any) -> None:
        raise NotImplementedError("batches are not removed")

    def flush(self) -> list[Path]:
        """Waits until the inputs of the next block are on disk, and returns their files."""
        written = self.files(self.block_index + 1)
        for file in written:
            flush_file(file)
        return written

    def move_on(self, has_next: bool) -> None:
        """Deletes the files of this block and moves to the next; deletes these too if there is no next block."""
        done = self.files(self.block_index) + ([] if has_next else self.files(self.block_index + 1))
        for file in done:
            file.unlink(missing_ok=True)
        self.block_index += 1

    def _write(self, index: int, number: int, value: Tensor) -> None:
        part, position = self._places[number]
        # wb empties what an earlier start left there
        with self._file(index, part).open("r+b" if position else "wb") as opened:
            opened.seek(position * self.batch_bytes)
            stored = self._on_host(index, number, value).view(torch.uint8)
            opened.write(stored.numpy().data.cast("B"))

    def _on_host(self, index: int, number: int, value: Tensor) -> Tensor:
        """A batch that enters block `index`, in memory of the host; kept there if `pinned`."""
        if self.pinned is None:
            return value.to("cpu", self.dtype).contiguous()
        if number in self.pinned:
            _, batch = self.pinned[number]
        else:
            batch = torch.empty(value.shape, dtype=self.dtype, pin_memory=True)
        batch.copy_(value)  # behind the copies of its old values that the GPU has been asked for; waits for the GPU
        self.pinned[number] = index, batch
        return batch
