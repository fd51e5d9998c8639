"""Runs a one-shot solver as part of a comparison; `castlm.cli.oneshot` starts it in its own process.

Like a training run it writes a verified model, and a castlm.json with the same figures.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castlm.core.sparsify import sparse_linears
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.options import ScoredTextOptions
from castlm.data.scored import scored_text
from castlm.data.tokens import text_encoder
from castlm.evaluation.perplexity import measured_on, perplexity
from castlm.export.hf import check_export, export_model
from castlm.files.output import begin_output, output_folder
from castlm.hardware import choose_device, choose_precision, peak_memory
from castlm.models.io import load_model
from castlm.oneshot.calibration import calibration_length
from castlm.oneshot.start import prune_oneshot_
from castlm.patterns import parse_pattern
from castlm.training.options import SEQ_LEN


@dataclass(frozen=True)
class OneshotConfig(ScoredTextOptions):
    """The options of a one-shot run, named as in TrainConfig."""

    model: str
    method: str
    calibration: str
    eval_dataset: str
    output_dir: str = ""
    pattern: str = "2:4"
    seq_len: int = SEQ_LEN
    """Tokens per sequence of the evaluation. Calibration sequences have the model's context, at most 2,048 tokens."""
    num_sequences: int = 128
    eval_tokens: int = 32768
    calibration_split: str = "train"
    calibration_config: str | None = None
    eval_split: str = "validation"
    eval_config: str | None = None
    device: str = "auto"
    precision: str = "auto"
    """Compute type of the evaluation."""
    seed: int = 0
    trust_remote_code: bool = False
    revision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_oneshot(config: OneshotConfig) -> dict[str, Any]:
    """Prunes, measures and exports; returns the record of the run.

    Raises:
        InputError: as `load_model`, `open_documents`, `prune_oneshot_` and `export_model`.
    """
    inputs = {name: getattr(config, name) for name in ("model", "calibration", "eval_dataset")}
    with output_folder(config.output_dir, "oneshot", resume=True, inputs=inputs) as folder:
        begin_output(folder, "oneshot", resume=True)
        return _prune(config, folder / "model")


def _prune(config: OneshotConfig, folder: Path) -> dict[str, Any]:
    pattern = parse_pattern(config.pattern)
    loaded = load_model(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
    model = loaded.model
    device = torch.device(choose_device(config.device))
    precision = choose_precision(config.precision, device, model.config)
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    documents = open_documents(config.eval_dataset, config, split=config.eval_split, data_config=config.eval_config)
    encoder = text_encoder(loaded.tokenizer, config)
    held_out = scored_text(documents, encoder, config.eval_tokens or None)
    check_export(model, pattern)
    _, left_dense = sparse_linears(model, pattern)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it
    dense = perplexity(model, held_out, seq_len=config.seq_len, autocast_dtype=autocast_dtype).perplexity
    length = calibration_length(model)
    calibration = open_documents(
        config.calibration,
        config,
        split=config.calibration_split,
        data_config=config.calibration_config,
    )
    sequences, _ = calibration_sequences(calibration, encoder, config.num_sequences, length, config.seed)
    report = prune_oneshot_(
        model, config.method, pattern=pattern, calibration=sequences, seed=config.seed, precision=precision
    )
    pruned = perplexity(model, held_out, seq_len=config.seq_len, autocast_dtype=autocast_dtype).perplexity
    model.to("cpu")  # type: ignore[arg-type]
    record = {
        "base_model": config.model,
        "method": config.method,
        "config": config.as_dict(),
        "perplexity": {"dense": dense, "pruned": pruned},
        "measured": measured_on(
            loaded.tokenizer,
            seq_len=config.seq_len,
            text=config.eval_dataset,
            text_sha256=documents.text_hash(),
            held_out=held_out,
            precision=precision,
        ),
        "calibration": {"text": config.calibration, "num_sequences": config.num_sequences, "seq_len": length},
        **report.record(),
        "train_tokens": 0,
        "train_seconds": round(report.seconds, 1),
        "peak_memory_bytes": peak_memory(device.type),
        "machine": f"{platform.machine()} {device.type}",
    }
    return export_model(
        model,
        loaded.tokenizer,
        folder,
        pattern=pattern,
        left_dense=left_dense,
        record=record,
        overwrite=True,
        dtype=loaded.dtype,
    )
