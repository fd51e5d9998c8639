"""Runs a one-shot row of `castlm compare`; `castlm compare --row` is its process.

It prunes as published, as `castlm prune` does without its refinements, and measures the model before and after.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from castlm.data.documents import open_documents
from castlm.data.options import TextOptions
from castlm.data.scored import scored_text
from castlm.data.tokens import text_encoder
from castlm.evaluation.perplexity import measured_on, perplexity
from castlm.export.pruned import prune_folder
from castlm.files.output import begin_output, output_folder
from castlm.hardware import choose_device, choose_precision, peak_memory
from castlm.lab.compare.runs import OneshotConfig
from castlm.models.io import Loaded
from castlm.oneshot.draw import Draw
from castlm.oneshot.methods import method_of, steps_of


def run_oneshot(config: OneshotConfig) -> None:
    """Prunes, measures and writes the verified model."""
    pattern, device = config.pattern, choose_device(config.device)
    options = TextOptions.of(asdict(config))
    draw = Draw(
        documents=open_documents(config.calibration, options, split=config.calibration_split),
        name=config.calibration,
        options=options,
        num_sequences=config.calibration_sequences,
        seed=config.seed,
        precision=config.precision,
    )
    inputs = {name: getattr(config, name) for name in ("model", "calibration", "eval_dataset")}
    with output_folder(config.output_dir, "oneshot", resume=True, inputs=inputs) as folder:
        begin_output(folder, "oneshot", resume=True)
        prune_folder(
            config.model,
            folder / "model",
            config.method,
            pattern,
            steps_of(config.method, pattern),
            draw=draw if method_of(config.method, pattern).reads_text else None,
            device=torch.device(device),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            overwrite=True,
            evaluate=lambda loaded: _measure(config, loaded, device),
        )


def _measure(config: OneshotConfig, loaded: Loaded, device: str) -> tuple[float, dict[str, Any]]:
    """The perplexity of one model, and the entries of castlm.json about its measurement."""
    precision = choose_precision(config.precision, torch.device(device), loaded.model.config)
    documents = open_documents(config.eval_dataset, config, split=config.eval_split)
    encoder = text_encoder(loaded.tokenizer, config)
    held_out = scored_text(documents, encoder, config.eval_tokens or None)
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    found = perplexity(loaded.model, held_out, seq_len=config.seq_len, autocast_dtype=autocast_dtype)
    return found.perplexity, {
        "config": config.as_dict(),
        "measured": measured_on(
            loaded.tokenizer,
            seq_len=config.seq_len,
            text=config.eval_dataset,
            text_sha256=documents.text_hash(),
            held_out=held_out,
            precision=precision,
        ),
        "train_tokens": 0,
        "peak_memory_bytes": peak_memory(device),
        "machine": f"{platform.machine()} {device}",
    }
