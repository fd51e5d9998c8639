"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from castlm.cli.options import parse
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.oneshot.options import BasisOptions, Refinements, part_of


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What is pruned, how, and on which text."""

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    output_dir: str
    """Folder for the pruned model."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    """What decides which weights go; SparseGPT also updates those that stay."""

    calibration: str | None = None
    """Text for wanda and sparsegpt."""

    pattern: str = "2:4"
    """n:m, n weights kept of every m along the input axis."""

    num_sequences: int = 128
    """Calibration sequences."""

    seq_len: int = 0
    """Their length in tokens; 0 means the model's context, at most 2,048."""

    seed: int = 0
    """Which windows of the text are taken."""

    damping: float = 0.01
    """SparseGPT: share of the mean diagonal that is added to the Hessian."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""


@dataclass(frozen=True, kw_only=True)
class PruneCommand(Refinements, BasisOptions, PruneOptions):  # the fields of the last base come first
    """Prune a model one-shot, without training, and verify the result."""

    def run(self) -> int:
        from castlm.hardware import keep_freed_memory
        from castlm.output import claimed

        keep_freed_memory()
        pattern = Pattern.parse(self.pattern)
        if self.method != "magnitude" and self.calibration is None:
            raise InputError(f"method {self.method} needs a calibration text: pass --calibration FILE")
        if self.method == "magnitude" and self.rotate in ("values", "residual"):
            raise InputError(f"rotate {self.rotate} needs a calibration text: use method sparsegpt or wanda")
        inputs = {"model": self.model, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            return self._prune(folder, pattern)

    def _prune(self, folder: Path, pattern: Pattern) -> int:
        from castlm.core.sparsify import sparse_linears
        from castlm.data.documents import text_hash
        from castlm.data.tokens import token_ids
        from castlm.export.hf import export_model
        from castlm.models import load_model
        from castlm.oneshot.basis import change_basis_
        from castlm.oneshot.calibration import calibration_blocks, calibration_length
        from castlm.oneshot.prune import prune_oneshot_
        from castlm.progress import note, shown_progress

        loaded = load_model(self.model, trust_remote_code=self.trust_remote_code)
        _, left_dense = sparse_linears(loaded.model, pattern)
        blocks, calibration = None, {}
        if self.method != "magnitude":
            length = self.seq_len or calibration_length(loaded.model)
            ids = token_ids(str(self.calibration), loaded.tokenizer)
            blocks = calibration_blocks(ids, self.num_sequences, length, self.seed)
            calibration = {
                "text": self.calibration,
                "text_sha256": text_hash(str(self.calibration)),
                "num_sequences": self.num_sequences,
                "seq_len": length,
                "seed": self.seed,
            }
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
                refinements=part_of(self, Refinements),
                progress=progress,
            )
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
        )
        if report.raised_damping:
            print(f"{report.damping_note()}: castlm.json lists them")
        print(f"{folder}: {self.pattern} by {self.method}, proved; measure it with: castlm eval {folder} --text FILE")
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(PruneCommand, arguments, "prune").run())
