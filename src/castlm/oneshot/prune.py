"""`castlm prune` as a function: from the name of a dense model to a verified folder of a sparse one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import SparseLayer, sparse_linears, weight_parameter
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import Documents, HubDocuments
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import open_encoder
from castlm.distributed.loading import Checkpoint, Place, fingerprint, open_sharded
from castlm.dtypes import dtype_name
from castlm.export.hf import check_export, export_blocks, export_model
from castlm.export.origin import origin_of
from castlm.files.output import begin_output, output_folder
from castlm.files.reading import read_json_object
from castlm.files.record import command_of
from castlm.hardware import (
    available_memory,
    choose_precision,
    keep_freed_memory,
    return_freed_memory,
    why_slow,
)
from castlm.models.architecture import is_vision_language
from castlm.models.io import Loaded, fp32_bytes, load_model, save_dtype
from castlm.oneshot.calibration import calibration_length, default_sequences
from castlm.oneshot.folder import PROGRESS, StartFolder, partial_folder, remove_work
from castlm.oneshot.options import EFFORTS, Effort
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.source import MemoryModel, StoredModel
from castlm.oneshot.start import Start
from castlm.oneshot.walk import Extras
from castlm.progress import note, shown_progress

Memory = Literal["model", "block"]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """One prune: the model, the start, the calibration text and the output."""

    model: str
    start: Start
    text: Documents | HubDocuments | None
    text_name: str | None
    num_sequences: int | None
    """None takes `default_sequences` for `effort`."""
    seq_len: int
    """Tokens per sequence; 0 takes the model's context, at most 2,048."""
    device: str
    memory: Memory
    effort: Effort = EFFORTS["best"]
    precision: str = "auto"
    save_dtype: str = "source"
    options: TextOptions = DEFAULTS
    """The options of the calibration text."""
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    """Begin again if an unfinished prune has other options or is damaged."""
    evaluate: Callable[[Loaded], dict[str, Any]] | None = None
    """Measures the model in memory before and after it is pruned: returns its `perplexity`, and further entries of
    castlm.json.
    """

    def run(self, folder: Path) -> OneshotReport:
        """Prunes the model and writes the result to `folder` at the end.

        Until then, finished blocks are in `partial_folder(folder)`, so that a killed prune continues.

        Raises:
            InputError: as `Start.make_`, `load_model` and `export_model`; or an unfinished prune with other options.
        """
        if self.text is None and self.memory == "model":
            return self._run(folder, None)
        partial = partial_folder(folder)
        with output_folder(partial, "prune", resume=True):
            begin_output(partial, "prune", resume=True)
            report = self._run(folder, partial)
            remove_work(partial)
        return report

    def _run(self, folder: Path, partial: Path | None) -> OneshotReport:
        loaded, checkpoint = self._open()
        model, device = loaded.model, torch.device(self.device)
        dtype = save_dtype(self.save_dtype, loaded.dtype)
        layers, left_dense = sparse_linears(model, self.start.pattern)
        source: MemoryModel | StoredModel
        if checkpoint is None:
            check_export(model, self.start.pattern)
        else:
            source = StoredModel(model, checkpoint, layers, device, dtype)
            for _ in source.outside():
                pass  # a weight that is not finite raises before the work on the blocks begins
        sequences, extras, calibration = self._calibration(model, loaded.tokenizer, layers)
        if checkpoint is None:
            source = MemoryModel(model.to(device), layers)
        before = self.evaluate(loaded) if self.evaluate else {}
        precision = choose_precision(self.precision, device, model.config)
        if slow := why_slow(precision, device):
            note(slow)
        start = replace(self.start, precision=precision)
        work = None
        if partial is not None:
            options = {
                "model": loaded.source,
                "weights": fingerprint(model) if checkpoint is None else _states_of_files(checkpoint),
                "calibration": calibration,
                "memory": self.memory,
                "dtype": dtype_name(dtype),
                **start.options(),
            }
            work = StartFolder(partial, options, restart=self.overwrite)
        with shown_progress(f"{start.method}, transformer blocks", before=work.done if work else 0) as progress:
            report = start.make_(source, sequences, extras, folder=work, say=note, progress=progress)
        record = {
            **origin_of(self.model, self.revision),
            "method": start.method,
            "refinements": asdict(start.refinements) if start.method == "sparsegpt" else {},
            "calibration": {**calibration, "precision": start.precision} if calibration else {},
            **report.record(),
        }
        if self.evaluate:
            after = self.evaluate(loaded)
            record |= {**after, "perplexity": {"dense": before["perplexity"], "pruned": after["perplexity"]}}
        if checkpoint is None:
            export_model(
                model.to("cpu"),
                loaded.tokenizer,
                folder,
                pattern=start.pattern,
                left_dense=left_dense,
                record=record,
                dtype=dtype,
                overwrite=True,
            )
        else:
            assert work is not None
            assert isinstance(source, StoredModel)
            export_blocks(
                model,
                loaded.tokenizer,
                folder,
                blocks=[work.block_file(index) for index in range(len(source.blocks))],
                outside=source.outside(),
                pattern=start.pattern,
                left_dense=left_dense,
                record=record,
                dtype=dtype,
            )
        return report

    def _open(self) -> tuple[Loaded, Checkpoint | None]:
        """The model in memory and None; or the model without weights and the checkpoint that holds them.

        Raises:
            InputError: a pattern or a model that cannot be pruned with one block in memory.
        """
        options: Any = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        if self.memory == "model":
            keep_freed_memory()
            # Solvers and changes of basis compute in fp32; magnitude can compare weights in their stored dtype.
            dtype = torch.float32 if self.text is not None or self.evaluate else None
            return load_model(self.model, dtype=dtype, **options), None
        return_freed_memory()
        opened = None if self.start.pattern.cut_out else open_sharded(self.model, **options)
        layers = sparse_linears(opened[0].model, self.start.pattern)[0] if opened else {}
        is_stacked = any(weight_parameter(layer).dim() == 3 for layer in layers.values())
        if opened is None or is_stacked or is_vision_language(opened[0].model.config):
            raise InputError(
                f"memory block is not for {self.model} with pattern {self.start.pattern}: it takes n:m, and "
                "safetensors with the tensor names of a model without experts and images; use memory model"
            )
        return opened

    def _calibration(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Mapping[str, SparseLayer]
    ) -> tuple[Tensor | None, Extras, dict[str, Any]]:
        """The calibration sequences, their extras, and their record for castlm.json."""
        if self.text is None:
            return None, None, {}
        seq_len, seed = self.seq_len or calibration_length(model), self.start.seed
        num_sequences = self.num_sequences or default_sequences(layers, seq_len, self.effort)
        loading: Any = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
        encoder = open_encoder([self.text], tokenizer, self.model, self.options, **loading)
        sequences, extras = calibration_sequences(self.text, encoder, num_sequences, seq_len, seed, note)
        record = {
            "text": self.text_name,
            "text_sha256": self.text.text_hash(),
            "tokens_sha256": hashlib.sha256(sequences.numpy().tobytes()).hexdigest(),  # a column or template changes it
            "num_sequences": len(sequences),
            "seq_len": seq_len,
            "seed": seed,
        }
        return sequences, extras, record


def _states_of_files(checkpoint: Checkpoint) -> list[list[Any]]:
    """Name, size and time of each weight file; hashing their content would take a pass over the disk."""
    files = sorted({place.file for place in checkpoint.places.values() if isinstance(place, Place)})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def choose_memory(model: str, revision: str | None, folder: Path, pattern: Pattern, device: str) -> Memory:
    """Chooses "block" if the whole model does not fit in memory, with a note why, else "model".

    A prune that continues keeps its choice.
    """
    if pattern.cut_out is not None:
        return "model"
    partial = partial_folder(folder)
    if command_of(partial) == "prune" and (partial / PROGRESS).is_file():
        begun = read_json_object(partial / PROGRESS).get("options", {}).get("memory")
        return "block" if begun == "block" else "model"
    needed, free = fp32_bytes(model, revision), available_memory(device)
    if needed <= free:
        return "model"
    note(
        f"the model takes {needed / 2**30:.1f} GiB in fp32 and {free / 2**30:.1f} GiB are free: one transformer "
        "block at a time is in memory (memory block)"
    )
    return "block"
