"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from castlm.cli.options import parse
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.fields import choice
from castlm.oneshot.options import BasisOptions, Refinements, part_of

if TYPE_CHECKING:
    from castlm.data.documents import Documents, HubDocuments


def solver_names() -> Iterable[str]:
    """The rows of the table of solvers, which imports torch."""
    from castlm.oneshot.solvers import SOLVERS

    return SOLVERS


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What is pruned, how, and on which text."""

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    output_dir: str
    """Folder for the pruned model."""

    method: str = choice("sparsegpt", solver_names)
    """Solver that chooses the masked weights. sparsegpt also updates the kept ones."""

    calibration: str | None = None
    """Text that wanda and sparsegpt need: a file, folder, glob or hub dataset, as --dataset of castlm train."""

    column: str | None = None
    """Column of .jsonl and .parquet that holds the text, or messages, which the chat template renders. By default it is
    found."""

    pattern: str = "2:4"
    """n:m, where n of every m consecutive weights along the input axis are kept."""

    num_sequences: int = field(default=128, metadata={"at_least": 1})
    """Calibration sequences."""

    seq_len: int = field(default=0, metadata={"at_least": 0})
    """Tokens per calibration sequence. 0 takes the model's context, at most 2,048."""

    seed: int = 0
    """Seed of the draw of calibration sequences."""

    damping: float = field(default=0.01, metadata={"at_least": 0})
    """SparseGPT: fraction of the mean diagonal that is added to the Hessian."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""

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
        from castlm.hardware import choose_device, keep_freed_memory
        from castlm.output import claimed

        keep_freed_memory()
        pattern = Pattern.parse(self.pattern)
        device, text = choose_device(self.device), None
        if self.method == "magnitude" and self.rotate in ("values", "residual"):
            raise InputError(f"rotate {self.rotate} needs a calibration text: use method sparsegpt or wanda")
        if self.method != "magnitude":
            if self.calibration is None:
                raise InputError(
                    f"method {self.method} needs a calibration text: give --calibration FILE, or --method magnitude"
                )
            text = open_documents(self.calibration, column=self.column)
        inputs = {"model": self.model, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            return self._prune(folder, pattern, text, device)

    def _prune(self, folder: Path, pattern: Pattern, text: Documents | HubDocuments | None, device: str) -> int:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.data.tokens import token_ids
        from castlm.export.hf import export_model
        from castlm.models import load_model, save_dtype
        from castlm.oneshot.basis import change_basis_
        from castlm.oneshot.calibration import CALIBRATION_POOL, calibration_blocks, calibration_length
        from castlm.oneshot.prune import prune_oneshot_
        from castlm.progress import note, shown_progress

        # Solvers and changes of basis compute in fp32; magnitude alone needs no more than what is stored.
        held = None if text is None else torch.float32
        refinements = part_of(self, Refinements).for_solver(self.method)
        loaded = load_model(self.model, dtype=held, trust_remote_code=self.trust_remote_code, revision=self.revision)
        _, left_dense = sparse_linears(loaded.model, pattern)
        blocks, calibration = None, {}
        if text is not None:
            length = self.seq_len or calibration_length(loaded.model)
            ids = token_ids(text, loaded.tokenizer, limit=CALIBRATION_POOL * self.num_sequences * length)
            blocks = calibration_blocks(ids, self.num_sequences, length, self.seed)
            calibration = {
                "text": self.calibration,
                "text_sha256": text.text_hash(),
                "num_sequences": self.num_sequences,
                "seq_len": length,
                "seed": self.seed,
            }
        loaded.model.to(device)
        basis = None
        if blocks is not None:
            with shown_progress("changing the basis, steps") as progress:
                basis = change_basis_(
                    loaded.model, blocks, part_of(self, BasisOptions), pattern=pattern, say=note, progress=progress
                )
        with shown_progress(f"{self.method}, blocks") as progress:
            report = prune_oneshot_(
                loaded.model,
                self.method,
                pattern=pattern,
                calibration=blocks,
                damping=self.damping,
                refinements=refinements,
                progress=progress,
            )
        loaded.model.to("cpu")
        record = {
            "base_model": self.model,
            "method": self.method,
            "calibration": calibration,
            "basis": None if basis is None else asdict(basis),
            "prune_seconds": round(report.seconds, 2),
            **report.damping_record(),
        }
        export_model(
            loaded.model,
            loaded.tokenizer,
            folder,
            pattern=pattern,
            left_dense=left_dense,
            record=record,
            overwrite=True,
            dtype=save_dtype(self.save_dtype, loaded.dtype),
        )
        if report.raised_damping:
            print(f"{report.damping_note()}: castlm.json lists them")
        print(f"{folder}: {self.pattern} by {self.method}, verified; measure it with: castlm eval {folder} --text FILE")
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(PruneCommand, arguments, "prune").run())
