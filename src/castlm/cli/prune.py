"""`castlm prune`: one-shot pruning without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from castlm.cli.options import parse
from castlm.core.errors import InputError
from castlm.core.pattern import Pattern
from castlm.core.structured import is_structured
from castlm.fields import choice
from castlm.oneshot.options import DEFAULT_SCORE, UNIT_SCORES, BasisOptions, Refinements, part_of

if TYPE_CHECKING:
    from castlm.data.documents import Documents, HubDocuments


def solver_names() -> Iterable[str]:
    """The rows of the table of solvers, which imports torch, and the scores of structured patterns."""
    from castlm.oneshot.solvers import SOLVERS

    return dict.fromkeys((*SOLVERS, *UNIT_SCORES))


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What is pruned, how, and on which text."""

    model: str
    """Local Hugging Face folder, hub id, GGUF file, or "demo"."""

    output_dir: str
    """Folder for the pruned model."""

    method: str | None = choice(None, solver_names)
    """Solver that chooses the masked weights: sparsegpt (the default; it also updates the kept ones), wanda, magnitude.
    Structured patterns rank their units by taylor (the default), flap, wanda, magnitude or random."""

    calibration: str | None = None
    """Text that wanda and sparsegpt need: a file, folder, glob or hub dataset, as --dataset of castlm train."""

    column: str = "text"
    """Column that holds the text in .jsonl and .parquet."""

    pattern: str = "2:4"
    """n:m, where n of every m consecutive weights along the input axis are kept, or a structured pattern as
    channels:0.5, heads:0.5, blocks:32x32:0.5, channels:0.75+2:4."""

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
        structured = is_structured(pattern)
        method = self.method or (DEFAULT_SCORE if structured else "sparsegpt")
        if method == "magnitude" and self.rotate in ("values", "residual"):
            raise InputError(f"rotate {self.rotate} needs a calibration text: use method sparsegpt or wanda")
        needs_text = method not in (("magnitude", "random") if structured else ("magnitude",))
        if needs_text and self.calibration is None:
            raise InputError(
                f"method {method} needs a calibration text: give --calibration FILE, or --method magnitude"
            )
        if needs_text or (structured and self.calibration is not None):
            assert self.calibration is not None
            text = open_documents(self.calibration, column=self.column)
        inputs = {"model": self.model, "calibration": self.calibration}
        with claimed(self.output_dir, "result", overwrite=self.overwrite, inputs=inputs) as folder:
            return self._prune(folder, pattern, method, text, device)

    def _prune(
        self, folder: Path, pattern: Pattern, method: str, text: Documents | HubDocuments | None, device: str
    ) -> int:
        import torch

        from castlm.core.sparsify import sparse_linears
        from castlm.data.tokens import token_ids
        from castlm.export.cut import check_cut
        from castlm.export.hf import export_model
        from castlm.models import load_model, save_dtype
        from castlm.oneshot.basis import change_basis_
        from castlm.oneshot.calibration import CALIBRATION_POOL, calibration_blocks, calibration_length
        from castlm.oneshot.prune import prune_oneshot_
        from castlm.progress import note, shown_progress

        # Solvers and changes of basis compute in fp32; magnitude alone needs no more than what is stored.
        held = None if text is None else torch.float32
        refinements = part_of(self, Refinements).for_solver(method, pattern)
        loaded = load_model(self.model, dtype=held, trust_remote_code=self.trust_remote_code, revision=self.revision)
        check_cut(loaded.model, pattern)
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
        with shown_progress(f"{method}, blocks") as progress:
            report = prune_oneshot_(
                loaded.model,
                method,
                pattern=pattern,
                calibration=blocks,
                damping=self.damping,
                refinements=refinements,
                seed=self.seed,
                progress=progress,
            )
        loaded.model.to("cpu")
        record = {
            "base_model": self.model,
            "method": method,
            "calibration": calibration,
            "basis": None if basis is None else asdict(basis),
            "prune_seconds": round(report.seconds, 2),
            **report.damping_record(),
            **report.experts_record(),
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
        if report.num_few_experts:
            print(report.few_note())
        if report.raised_damping:
            print(f"{report.damping_note()}: castlm.json lists them")
        print(f"{folder}: {self.pattern} by {method}, verified; measure it with: castlm eval {folder} --text FILE")
        return 0


def main(arguments: list[str]) -> int:
    return int(parse(PruneCommand, arguments, "prune").run())
