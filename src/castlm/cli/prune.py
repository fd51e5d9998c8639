"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from castlm.cli.options import parse, refuse_given
from castlm.core.combined import is_structured
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.fields import choice
from castlm.oneshot.options import UNIT_SCORES, BasisOptions, Refinements, default_start

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from castlm.data.documents import Documents
    from castlm.data.hub import HubDocuments
    from castlm.distributed.loading import Checkpoint
    from castlm.models.io import Loaded
    from castlm.oneshot.basis import BasisReport
    from castlm.oneshot.report import OneshotReport
    from castlm.oneshot.start import OneshotStart
    from castlm.oneshot.walk import Images


def solver_names() -> Iterable[str]:
    """The rows of the table of solvers, which imports torch, and the scores of structured patterns."""
    from castlm.oneshot.solvers import SOLVERS

    return dict.fromkeys((*SOLVERS, *UNIT_SCORES))


_OF_CALIBRATION = ("calibration", "column", "chat_template_path", "precision")


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What is pruned, how, and on which text."""

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    output_dir: str
    """Folder for the pruned model."""

    method: str | None = choice(None, solver_names)
    """Solver that chooses the masked weights: sparsegpt (the default; it also updates the kept ones), wanda, magnitude.
    Structured patterns rank their units by flap (the default of channels), taylor (of heads), wanda,
    magnitude or random."""

    calibration: str | None = None
    """Text that all methods but magnitude and random need: a file, folder, glob or hub dataset, as --dataset of castlm
    train."""

    column: str | None = None
    """Column of .jsonl and .parquet that holds the text, or messages, which the chat template renders. By default it is
    found."""

    chat_template_path: str | None = None
    """File with a Jinja chat template to use, and to save, in place of the tokenizer's own."""

    pattern: str = "2:4"
    """n:m, where n of every m consecutive weights along the input axis are kept, or a structured pattern as
    channels:0.5, heads:0.5, channels:0.75+2:4."""

    num_sequences: int = field(default=128, metadata={"at_least": 1})
    """Calibration sequences."""

    seq_len: int = field(default=0, metadata={"at_least": 0})
    """Tokens per calibration sequence. 0 takes the model's context, at most 2,048."""

    seed: int = 0
    """Seed of the draw of calibration sequences."""

    damping: float = 0.01
    """SparseGPT: fraction of the mean diagonal that is added to the Hessian."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the passes over the calibration text; the solvers compute in fp32. auto: bf16 where the hardware multiplies it
    faster and the model is not tiny."""

    memory: Literal["auto", "model", "block"] = "auto"
    """What is in memory: the whole model in fp32, or one transformer block of it, with the hidden states of the text in
    OUTPUT_DIR.partial; then the same command goes on after a kill. auto: a block where the model does not fit, on the
    GPU if there is one."""

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """What the result is written in; source: what the model is stored in."""

    overwrite: bool = False
    """Replace an earlier result in output_dir."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model."""


@dataclass(frozen=True, kw_only=True)
class PruneCommand(Refinements, BasisOptions, PruneOptions):  # the fields of the last base come first
    """Prune a model one-shot, without training, and verify the result."""

    def run(self) -> int:
        from castlm.data.documents import open_documents
        from castlm.files.output import claimed
        from castlm.hardware import choose_device
        from castlm.models.locate import local_folder
        from castlm.oneshot.start import OneshotStart

        pattern = Pattern.parse(self.pattern)
        if self.memory == "block":
            local_folder(self.model)
        device, text = choose_device(self.device), None
        structured = is_structured(pattern)
        method = self.method or default_start(pattern)
        if method == "magnitude" and self.rotate in ("values", "residual"):
            raise InputError(f"rotate {self.rotate} needs a calibration text: use method sparsegpt or wanda")
        needs_text = method not in (("magnitude", "random") if structured else ("magnitude",))
        if needs_text and self.calibration is None:
            raise InputError(
                f"method {method} needs a calibration text: give --calibration FILE, or --method magnitude"
            )
        if not (needs_text or structured):
            why = f"is for a method that reads a text, and {method} reads none: leave it out, or use wanda or sparsegpt"
            refuse_given(self, _OF_CALIBRATION, why)
        if self.calibration is not None and (needs_text or structured):
            text = open_documents(self.calibration, column=self.column)
        start = OneshotStart.of(self, method, pattern, damping=self.damping, seed=self.seed)
        inputs = {"model": self.model, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            prune = self._prune_by_block if self._holds_a_block(folder, pattern, device) else self._prune
            report = prune(folder, start, text, device)
        for line in report.notes():
            print(line)
        measure = f"castlm eval {shlex.quote(str(folder))} --text FILE"
        print(f"{folder}: {self.pattern} by {method}, verified; measure it with: {measure}")
        return 0

    def _holds_a_block(self, folder: Path, pattern: Pattern, device: str) -> bool:
        """Whether one block at a time is in memory, and why where that is not asked for."""
        from castlm.files.owned import command_of
        from castlm.hardware import available_memory
        from castlm.models.io import fp32_bytes
        from castlm.progress import note

        if self.memory != "auto":
            return self.memory == "block"
        if is_structured(pattern):
            return False
        if command_of(partial_folder(folder)) == "prune":
            note(f"{partial_folder(folder)} holds an unfinished prune by block: this start prunes by block too")
            return True
        needed, free = fp32_bytes(self.model, self.revision), available_memory(device)
        if needed <= free:
            return False
        note(
            f"the model takes {needed / 2**30:.1f} GiB in fp32 and {free / 2**30:.1f} GiB are free: one transformer "
            "block at a time is in memory (memory block)"
        )
        return True

    def _in_precision(self, start: OneshotStart, model: PreTrainedModel, device: str) -> OneshotStart:
        import torch

        from castlm.hardware import choose_precision, why_slow
        from castlm.progress import note

        precision = choose_precision(self.precision, torch.device(device), model.config)
        if slow := why_slow(precision, torch.device(device)):
            note(slow)
        return replace(start, precision=precision)

    def _calibration(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Documents | HubDocuments | None
    ) -> tuple[Tensor | None, Images, dict[str, Any]]:
        """The calibration sequences, their images, and what the record says of them."""
        from castlm.data.calibration import calibration_sequences
        from castlm.data.chat import with_template
        from castlm.models.opening import open_processor
        from castlm.oneshot.calibration import calibration_length
        from castlm.progress import note

        with_template(tokenizer, self.chat_template_path)
        if text is None:
            return None, None, {}
        length, processor = self.seq_len or calibration_length(model), None
        if text.has_images:
            options = {"trust_remote_code": self.trust_remote_code, "revision": self.revision}
            processor = open_processor(self.model, tokenizer, **options)
        blocks, images = calibration_sequences(text, tokenizer, self.num_sequences, length, self.seed, processor, note)
        record = {
            "text": self.calibration,
            "text_sha256": text.text_hash(),
            "tokens_sha256": hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),  # of a column, by a template
            "num_sequences": len(blocks),
            "seq_len": length,
            "seed": self.seed,
        }
        return blocks, images, record

    def _prune(
        self, folder: Path, start: OneshotStart, text: Documents | HubDocuments | None, device: str
    ) -> OneshotReport:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.export.hf import check_export, export_model
        from castlm.hardware import keep_freed_memory
        from castlm.models.io import load_model, save_dtype
        from castlm.progress import note, shown_progress

        keep_freed_memory()
        # Solvers and changes of basis compute in fp32; magnitude alone needs no more than what is stored.
        held = None if text is None else torch.float32
        loaded = load_model(self.model, dtype=held, trust_remote_code=self.trust_remote_code, revision=self.revision)
        model = loaded.model
        check_export(model, start.pattern)
        _, left_dense = sparse_linears(model, start.pattern)
        blocks, images, calibration = self._calibration(model, loaded.tokenizer, text)
        start = self._in_precision(start, model, device)
        model.to(device)
        basis = None
        if blocks is not None:
            with shown_progress("changing the basis, steps") as progress:
                basis = start.change_basis_(model, blocks, images, say=note, progress=progress)
        with shown_progress(f"{start.method}, blocks") as progress:
            report = start.prune_(model, blocks, images, progress=progress)
        model.to("cpu")
        export_model(
            model,
            loaded.tokenizer,
            folder,
            pattern=start.pattern,
            left_dense=left_dense,
            record=self._record(start, report, basis, calibration),
            overwrite=True,
            dtype=save_dtype(self.save_dtype, loaded.dtype),
        )
        return report

    def _prune_by_block(
        self, folder: Path, start: OneshotStart, text: Documents | HubDocuments | None, device: str
    ) -> OneshotReport:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.distributed.loading import Place
        from castlm.export.from_blocks import export_blocks
        from castlm.files.output import continued
        from castlm.files.owned import discard
        from castlm.hardware import return_freed_memory
        from castlm.models.io import save_dtype
        from castlm.oneshot.by_block import BlockPrune, block_file, prune_by_block
        from castlm.oneshot.stored_model import check_outside_blocks, outside_blocks
        from castlm.oneshot.walk import block_stack
        from castlm.progress import note, shown_progress

        return_freed_memory()
        loaded, checkpoint = self._open_by_block(start.pattern)
        partial = partial_folder(folder)
        layers, left_dense = sparse_linears(loaded.model, start.pattern)
        stack, stacked = block_stack(loaded.model, layers)
        check_outside_blocks(checkpoint, stack)
        with continued(partial, "prune"):
            blocks, _, calibration = self._calibration(loaded.model, loaded.tokenizer, text)
            start = self._in_precision(start, loaded.model, device)
            dtype = save_dtype(self.save_dtype, loaded.dtype)
            places = [place for place in checkpoint.places.values() if isinstance(place, Place)]
            files = sorted({place.file for place in places})
            run = BlockPrune(
                loaded.model,
                checkpoint,
                blocks,
                partial,
                inputs={
                    "model": loaded.source,
                    "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
                    "calibration": calibration,
                },
                start=start,
                dtype=dtype,
                device=torch.device(device),
                overwrite=self.overwrite,
            )
            with shown_progress(f"{start.method}, blocks") as progress:
                report, basis = prune_by_block(run, say=note, progress=progress)
            export_blocks(
                loaded.model,
                loaded.tokenizer,
                folder,
                blocks=[block_file(partial, index) for index in range(len(stacked))],
                outside=outside_blocks(checkpoint, stack),
                pattern=start.pattern,
                left_dense=left_dense,
                record=self._record(start, report, basis, calibration),
                dtype=dtype,
            )
            discard(partial)
        return report

    def _open_by_block(self, pattern: Pattern) -> tuple[Loaded, Checkpoint]:
        """The model without its weights, and where they are stored.

        Raises:
            InputError: a pattern or a model that cannot be pruned with one block in memory.
        """
        from castlm.core.experts import ExpertLinear
        from castlm.distributed.loading import open_sharded
        from castlm.models.architecture import is_vision_language

        if is_structured(pattern):
            raise InputError(f"pattern {pattern} is chosen over the whole model: use memory model")
        opened = open_sharded(self.model, trust_remote_code=self.trust_remote_code, revision=self.revision)
        if opened is None:
            raise InputError(
                f"the blocks of {self.model} cannot be read one by one: memory block needs a folder of safetensors "
                "whose names are those of the model; use memory model"
            )
        model = opened[0].model
        if any(isinstance(module, ExpertLinear) for module in model.modules()):
            raise InputError(f"{self.model} has experts, of which a block holds many: use memory model")
        if is_vision_language(model.config):
            raise InputError(f"{self.model} stores its layers under other names than it loads: use memory model")
        return opened

    def _record(
        self, start: OneshotStart, report: OneshotReport, basis: BasisReport | None, calibration: dict[str, Any]
    ) -> dict[str, Any]:
        """The content of castlm.json that is this command's."""
        from castlm.oneshot.start import start_record

        text = {**calibration, "precision": start.precision} if calibration else {}
        return {"base_model": self.model, "method": start.method, "calibration": text, **start_record(basis, report)}


def partial_folder(folder: Path) -> Path:
    """Where the work of a prune by block is held until the result is verified: beside the result."""
    return folder.with_name(f"{folder.name}.partial")


def main(arguments: list[str]) -> int:
    return int(parse(PruneCommand, arguments, "prune").run())
