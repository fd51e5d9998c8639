"""The commands beside `train`: their options, and what they print. The work is done in the modules they import."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from castlm.core.errors import InputError
from castlm.core.pattern import parse_pattern


def result_folder(path: str) -> str:
    """A run's `model` folder when `path` is a run of `castlm train`, else `path`."""
    inner = Path(path) / "model"
    return str(inner) if (inner / "config.json").is_file() and not (Path(path) / "config.json").exists() else path


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Writes a report where `--json` says; "-" is the standard output."""
    if path == "-":
        print(json.dumps(content, indent=2))
    elif path is not None:
        from castlm.files import atomic_write_json

        atomic_write_json(path, content)


@dataclass
class VerifyCommand:
    """Prove that every group of every sparse layer of a checkpoint is n:m. Exit 0: it is; 1: it is not."""

    path: Annotated[str, tyro.conf.Positional]
    """Folder in Hugging Face format, or one .safetensors file."""

    pattern: str = "2:4"
    """n:m, at most n non-zeros in every m along the input axis."""

    json: str | None = None
    """Write the report there; "-" prints it instead of the table."""

    def run(self) -> int:
        from castlm.export.verify import verify

        report = verify(result_folder(self.path), *parse_pattern(self.pattern))
        write_json(self.json, report.as_dict())
        if self.json != "-":
            report.table()
        return 0 if report.ok else 1


@dataclass
class EvalCommand:
    """Perplexity of a model on a text, or its zero-shot accuracies on tasks of lm-eval, or both."""

    path: Annotated[str, tyro.conf.Positional]
    """Local Hugging Face folder, run of `castlm train`, hub id, GGUF file, or "demo"."""

    text: str | None = None
    """Text file, or .jsonl, .jsonl.gz, .parquet, a folder or glob of these."""

    seq_len: int = 1024
    """Tokens of context; figures at different lengths do not compare."""

    stride: int | None = None
    """Tokens between windows; seq_len when not given, which scores every window by itself."""

    tasks: str | None = None
    """Tasks of lm-eval, with commas: piqa,arc_easy. Without examples, without a chat template."""

    tasks_from: str | None = None
    """Folder with local files of the tasks, instead of the hub."""

    limit: int | None = None
    """Only the first so many questions of each task."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Compute type of the forward pass; auto: bf16 where it is fast."""

    json: str | None = None
    """Write the figures there; "-" prints them as JSON."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        if self.text is None and self.tasks is None:
            raise InputError("nothing to evaluate on: give --text FILE, or --tasks piqa,arc_easy, or both")
        import torch

        from castlm.evaluate import evaluate_file
        from castlm.models import load_model
        from castlm.progress import shown_progress
        from castlm.training.hardware import choose_precision, keep_freed_memory

        keep_freed_memory()
        loaded = load_model(result_folder(self.path), trust_remote_code=self.trust_remote_code)
        model = loaded.model
        if torch.cuda.is_available():
            model.to("cuda")
        bf16 = choose_precision(self.precision, model.device, model.config) == "bf16"
        dtype = torch.bfloat16 if bf16 else None
        figures: dict[str, Any] = {"model": self.path}
        if self.text is not None:
            with shown_progress("perplexity, windows") as progress:
                figures |= evaluate_file(
                    model,
                    loaded.tokenizer,
                    self.text,
                    seq_len=self.seq_len,
                    stride=self.stride,
                    autocast_dtype=dtype,
                    progress=progress,
                )
        if self.tasks is not None:
            from castlm.zeroshot import zero_shot

            names = [name.strip() for name in self.tasks.split(",")]
            figures["zero_shot"] = zero_shot(
                model, loaded.tokenizer, names, folder=self.tasks_from, limit=self.limit, autocast_dtype=dtype
            )
        write_json(self.json, figures)
        if self.json != "-":
            self._print(figures)
        return 0

    def _print(self, figures: dict[str, Any]) -> None:
        if "perplexity" in figures:
            print(
                f"perplexity {figures['perplexity']:.4f}  ({figures['num_tokens']:,} tokens of {self.text}, "
                f"context {figures['seq_len']}, stride {figures['stride']})"
            )
        for row in figures.get("zero_shot", {}).get("results", []):
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            print(f"{row['task']:16}{row['metric']:12}{row['value']:.4f}{error}  ({row['num_docs']:,} questions)")


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

    overwrite: bool = False
    """Replace what output_dir holds."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    def run(self) -> int:
        from castlm.baselines.oneshot import calibration_blocks, calibration_length, prune_oneshot_
        from castlm.core.sparsify import sparse_linears
        from castlm.export.hf import export_model
        from castlm.files import prepare_output_dir
        from castlm.models import load_model
        from castlm.progress import shown_progress
        from castlm.training.data import text_hash, token_ids
        from castlm.training.hardware import keep_freed_memory

        keep_freed_memory()
        n, m = parse_pattern(self.pattern)
        if self.method != "magnitude" and self.calibration is None:
            raise InputError(f"method {self.method} needs a calibration text: pass --calibration FILE")
        folder = prepare_output_dir(self.output_dir, self.overwrite)
        loaded = load_model(self.model, trust_remote_code=self.trust_remote_code)
        _, left_dense = sparse_linears(loaded.model, n, m)
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
                loaded.model, self.method, n=n, m=m, calibration=blocks, damping=self.damping, progress=progress
            )
        record = {
            "base_model": self.model,
            "method": self.method,
            "calibration": calibration,
            "prune_seconds": round(report.seconds, 2),
            **report.damping_record(),
        }
        export_model(
            loaded.model, loaded.tokenizer, folder, n=n, m=m, left_dense=left_dense, record=record, overwrite=True
        )
        if report.raised_damping:
            print(f"{report.damping_note()}: castlm.json lists them")
        print(f"{folder}: {self.pattern} by {self.method}, proved; measure it with: castlm eval {folder} --text FILE")
        return 0


@dataclass
class DemoCommand:
    """The main job on the embedded SmolLM2-135M-Instruct: dense to a proven 2:4, with all that it is compared to."""

    output_dir: str = "demo-output"
    """Folder for the runs and the result."""

    max_steps: int = 60
    """Optimizer steps of 512 tokens, for castlm and for the dense control each."""

    overwrite: bool = False
    """Replace what output_dir holds."""

    def run(self) -> int:
        from castlm.demo import run_demo
        from castlm.training.hardware import keep_freed_memory

        keep_freed_memory()
        run_demo(Path(self.output_dir), self.max_steps, self.overwrite)
        return 0
