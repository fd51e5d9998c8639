"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castlm.cli.options import parse
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern


@dataclass
class PruneCommand:
    """Prune a model one-shot, without training, and prove the result."""

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

    save_dtype: Literal["source", "fp32", "bf16", "fp16"] = "source"
    """What the result is written in; source: what the model is stored in."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        from castlm.hardware import keep_freed_memory
        from castlm.output import claimed

        keep_freed_memory()
        pattern = Pattern.parse(self.pattern)
        if self.method != "magnitude" and self.calibration is None:
            raise InputError(f"method {self.method} needs a calibration text: pass --calibration FILE")
        inputs = {"model": self.model, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            return self._prune(folder, pattern)

    def _prune(self, folder: Path, pattern: Pattern) -> int:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.data.documents import text_hash
        from castlm.data.tokens import token_ids
        from castlm.export.hf import export_model
        from castlm.hardware import has_fast_bf16
        from castlm.models import load_model, save_dtype
        from castlm.oneshot.calibration import calibration_blocks, calibration_length
        from castlm.oneshot.prune import prune_oneshot_
        from castlm.progress import shown_progress

        # Forward passes over the calibration text are several times slower in 16 bits where the CPU has no bf16 units.
        held = None if self.method == "magnitude" or has_fast_bf16() else torch.float32
        loaded = load_model(self.model, dtype=held, trust_remote_code=self.trust_remote_code)
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
        with shown_progress(f"{self.method}, blocks") as progress:
            report = prune_oneshot_(
                loaded.model, self.method, pattern=pattern, calibration=blocks, damping=self.damping, progress=progress
            )
        record = {
            "base_model": self.model,
            "method": self.method,
            "calibration": calibration,
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
        print(f"{folder}: {self.pattern} by {self.method}, proved; measure it with: castlm eval {folder} --text FILE")
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(PruneCommand, arguments, "prune").run())
