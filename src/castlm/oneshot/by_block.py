"""One-shot pruning with one transformer block in memory, which goes on after a kill.

For each block in turn: its weights are read, its basis is changed, it is pruned, its weights are written, and the
hidden states go through it from one file to another. A record of what is done is written last, so that a process killed
at any moment loses at most one block's work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import SparseLayer
from castlm.core.pattern import NM
from castlm.core.sparsify import sparse_linears
from castlm.distributed.loading import Checkpoint
from castlm.export.hf import dtype_name, equal_in_bits
from castlm.files.atomic_file import (
    atomic_file,
    atomic_write_json,
    flush_file,
    is_whole,
    read_json_mapping,
    size_and_crc,
)
from castlm.files.disk import disk_full_is_said
from castlm.models.architecture import eval_mode
from castlm.models.layout import stored_transposed
from castlm.oneshot.basis import BasisReport, BlockTurns, block_statistics, wiring_or_note
from castlm.oneshot.block_basis import Change
from castlm.oneshot.dense_twin import DenseTwin, dense_twin, follow_dense
from castlm.oneshot.families import describe
from castlm.oneshot.hidden_states import HiddenStates
from castlm.oneshot.prune import check_prune, prune_block, prune_layers
from castlm.oneshot.reconstruct import Reconstruction
from castlm.oneshot.report import LayerResult, OneshotReport
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.start import OneshotStart
from castlm.oneshot.stored_model import StoredModel
from castlm.oneshot.walk import BlockInputs, batch_size, block_stack

PROGRESS = "progress.json"
_REMEDY = "free some space and run the same command again to go on"


@dataclass(frozen=True)
class BlockPrune:
    """What is pruned, how, and into which folder the blocks are written."""

    model: PreTrainedModel
    """On the meta device, from `castlm.distributed.loading.open_sharded`."""
    checkpoint: Checkpoint
    calibration: Tensor | None
    """int64, (num_sequences, seq_len); None for magnitude."""
    folder: Path
    """For the pruned blocks, the hidden states and the record of what is done."""
    inputs: Mapping[str, Any]
    """What the result depends on beside `start` and `dtype`: compared before an earlier process's work is continued."""
    start: OneshotStart
    dtype: torch.dtype
    """What the blocks are written in."""
    device: torch.device
    overwrite: bool = False
    """Start again where `folder` holds the work of a prune with other options, or a damaged record."""


def block_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


@torch.no_grad()
def prune_by_block(
    run: BlockPrune,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[OneshotReport, BasisReport]:
    """Prunes a model whose weights stay on disk, and writes each block to `block_file` of `run.folder`.

    The masks and weights are those of `change_basis_` and `prune_oneshot_`, except that the basis of a block is chosen
    on the inputs that the pruned blocks before it give, on all of the calibration text (`sequences_needed` may take a
    part of it), and that the residual stream keeps its basis.

    Memory: one block in fp32, the statistics of its inputs, and the work of the solver on the widest of them; a second
    copy of the block where the dense model is followed, and four more where blocks are reconstructed. Disk: twice the
    hidden states of the calibration text in fp32 (four times where the dense model is followed), and the result.

    Raises:
        InputError: as `prune_oneshot_`; options that need the whole model; or work in `run.folder` that was done with
            other options.
    """
    _refuse(run)
    start = run.start
    layers, left_dense = sparse_linears(run.model, start.pattern, start.filter_fn)
    check_prune(run.model, start.method, layers, run.calibration, start.settings, start.refinements)
    stack, _ = block_stack(run.model, layers)
    stored = StoredModel(run.model, run.checkpoint, stack, run.device)
    state = _State.read(run)
    if state.done:
        say(f"going on after {state.done} of {len(stored.blocks)} blocks, which are in {run.folder}")
    with eval_mode(run.model):
        _Walk(run, stored, layers, state, say, progress).run()
    num_sequences, seq_len = (0, 0) if run.calibration is None else run.calibration.shape
    report = OneshotReport(
        start.method,
        str(start.pattern),
        num_sequences,
        seq_len,
        start.damping if start.method == "sparsegpt" else None,
        layers=state.layers,
        left_dense=left_dense,
        reconstructions=state.reconstructions,
        seconds=state.seconds,
    )
    return report, BasisReport(changes=state.changes, notes=state.notes)


def _refuse(run: BlockPrune) -> None:
    if run.start.basis.rotate == "residual":
        raise InputError("rotate residual needs the whole model in memory: use rotate values, or memory model")


@dataclass
class _State:
    """What is done, as it stands in the record."""

    run: BlockPrune
    done: int = 0
    layers: list[LayerResult] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    seconds: float = 0.0
    files: dict[str, Any] = field(default_factory=dict)
    """Size and CRC-32 of the blocks that are done and of what enters the next, by file name."""

    @classmethod
    def read(cls, run: BlockPrune) -> _State:
        file = run.folder / PROGRESS
        try:
            return cls._read(run, file) if file.exists() else cls(run)
        except InputError:
            if run.overwrite:
                return cls(run)
            raise

    @classmethod
    def _read(cls, run: BlockPrune, file: Path) -> _State:
        remedy = "overwrite it, or delete its folder to start again"
        record = read_json_mapping(file, remedy)
        ours = _options(run)
        changed = [name for name, value in ours.items() if record.get("options", {}).get(name) != value]
        if changed:
            name = changed[0]
            then, now = (str(of.get(name))[:100] for of in (record.get("options", {}), ours))
            raise InputError(
                f"{run.folder} holds an unfinished prune with {name} = {then}, and it is {now} now: use the same "
                "options to go on, overwrite it to start again, or delete that folder"
            )
        try:
            layers = [LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in record["layers"]]
            changes = [Change(**change) for change in record["changes"]]
            notes, files = list(record["notes"]), dict(record["files"])
            done, seconds = int(record["done"]), float(record["seconds"])
            reconstructions = [Reconstruction(**block) for block in record["reconstructions"]]
            state = cls(run, done, layers, changes, notes, reconstructions, seconds, files)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file} is damaged: {remedy}") from None
        for name, expected in files.items():
            if not is_whole(run.folder / name, expected):
                raise InputError(f"{run.folder / name} is missing or damaged: {remedy}")
        return state

    def write(self) -> None:
        atomic_write_json(
            self.run.folder / PROGRESS,
            {
                "options": _options(self.run),
                "done": self.done,
                "seconds": self.seconds,
                "layers": [asdict(layer) for layer in self.layers],
                "changes": [asdict(change) for change in self.changes],
                "notes": self.notes,
                "reconstructions": [asdict(block) for block in self.reconstructions],
                "files": self.files,
            },
        )


def _options(run: BlockPrune) -> dict[str, Any]:
    return {
        **run.inputs,
        "method": run.start.method,
        "pattern": str(run.start.pattern),
        "damping": run.start.damping,
        "precision": run.start.precision,
        **asdict(run.start.basis),
        **asdict(run.start.refinements),
        "dtype": dtype_name(run.dtype),
    }


class _Walk:
    """The walk through the blocks."""

    def __init__(
        self,
        run: BlockPrune,
        stored: StoredModel,
        layers: Mapping[str, SparseLayer],
        state: _State,
        say: Callable[[str], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self.run_, self.stored, self.layers, self.state = run, stored, layers, state
        self.say, self.progress = say, progress
        self.solver, self.to = SOLVERS[run.start.method], run.start.settings
        self.turns = self._turns()

    def run(self) -> None:
        num_blocks = len(self.stored.blocks)
        if self.state.done == num_blocks:
            return
        inputs = twin = None
        streams: list[HiddenStates] = []
        if self.run_.calibration is not None:
            inputs, twin, streams = self._enter(self.run_.calibration)
        for index in range(self.state.done, num_blocks):
            started = time.perf_counter()
            with self.stored.block(index) as block:
                self.state.layers += self._prune(index, inputs, twin)
                written = [_write_block(self.run_, block, index, f"{self.stored.stack}.{index}.")]
                if inputs is not None and index + 1 < num_blocks:
                    inputs.advance()
                    for states in streams:
                        states.flush()
                        written.append(states.file(index + 1))
            blocks = {name: known for name, known in self.state.files.items() if name.startswith("block-")}
            self.state.files = blocks | {file.name: size_and_crc(file) for file in written}
            self.state.done = index + 1
            self.state.seconds += time.perf_counter() - started
            self.state.write()
            for states in streams:
                states.go_on()
            self.progress(index + 1, num_blocks)
        for change in self.state.changes:
            self.say(str(change))

    def _turns(self) -> BlockTurns | None:
        """How blocks are turned; None where they are not."""
        run = self.run_
        if run.calibration is None:
            return None
        basis, pattern = run.start.basis, run.start.pattern
        wiring, note = wiring_or_note(run.model, pattern, basis)
        if note and not self.state.notes:
            self.state.notes.append(note)
            self.say(note)
        if wiring is None:
            return None
        assert isinstance(pattern, NM)
        turns = BlockTurns(basis, pattern)
        for earlier in self.state.changes:
            if earlier.what == turns.values.what:
                turns.values = earlier
            else:
                turns.mlps = earlier
        return turns

    def _enter(self, calibration: Tensor) -> tuple[BlockInputs, DenseTwin | None, list[HiddenStates]]:
        """What enters the next block to prune, with the dense twin if there is one, and where both are on disk."""
        run, device = self.run_, self.run_.device
        size = batch_size(calibration, device)
        shape = (size, calibration.shape[1], run.model.config.get_text_config().hidden_size)
        num_batches = math.ceil(len(calibration) / size) if self.state.done else 0
        ours, theirs = (
            HiddenStates(run.folder, shape, device, self.state.done, num_batches, name) for name in ("hidden", "dense")
        )
        with disk_full_is_said(run.folder, _REMEDY):
            with self.stored.passing():
                blocks, precision = self.stored.blocks, run.start.precision
                inputs = BlockInputs(run.model, blocks, calibration, ours, self.state.done, precision=precision)
            refinements, stack = run.start.refinements, self.stored.stack
            twin = dense_twin(run.model, inputs, stack, len(calibration), refinements, theirs)
            if twin is None:
                return inputs, None, [ours]
            if not self.state.done:
                theirs.extend(ours)
        return inputs, twin, [ours, theirs]

    def _prune(self, index: int, inputs: BlockInputs | None, twin: DenseTwin | None) -> list[LayerResult]:
        prefix = f"{self.stored.stack}.{index}."
        inside = {name: layer for name, layer in self.layers.items() if name.startswith(prefix)}
        if inputs is None:
            return [
                result
                for name, layer in inside.items()
                for result in prune_layers({name: layer.weight}, None, self.solver, self.to)
            ]
        num_sequences = len(self.run_.calibration)  # type: ignore[arg-type]
        with disk_full_is_said(self.run_.folder, _REMEDY):
            if self.turns is not None and inside:
                statistics = block_statistics(inside, inputs, num_sequences)
                wiring = describe(self.run_.model)  # of the weights that are in memory now
                note = self.turns.turn_(wiring.blocks[index], statistics, inputs)[1]
                self.state.changes = self.turns.changes()
                if note:
                    self.state.notes.append(f"block {index}: {note}")
                del statistics
            refinements = self.run_.start.refinements
            results = prune_block(inside, inputs, num_sequences, self.solver, self.to, refinements, twin)
            if twin is not None:
                is_last = index + 1 == len(self.stored.blocks)
                self.state.reconstructions += follow_dense(inside, twin, refinements, is_last)
            return results


def _write_block(run: BlockPrune, block: nn.Module, index: int, prefix: str) -> Path:
    """Writes a block, reads it back and compares it bit for bit; returns its file."""
    tensors = {}
    for name, parameter in block.named_parameters():
        value = parameter.detach().to(run.dtype)
        transposed = stored_transposed(run.model.config.model_type, prefix + name)
        tensors[prefix + name] = (value.T if transposed else value).contiguous().cpu()
    file = block_file(run.folder, index)
    with disk_full_is_said(run.folder, _REMEDY), atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        flush_file(temporary)
    with safe_open(file, "pt") as opened:
        for name, tensor in tensors.items():
            if not equal_in_bits(opened.get_tensor(name), tensor):
                raise InputError(f"{name} has other values in {file} than in memory: the disk or memory is faulty")
    return file
