"""`castlm quantize`: a model rounded to int8, float8, int4 or int3, as a plain or a packed folder, and verified."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import sparse_linears
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import text_encoder
from castlm.export.folder import left_dense_reason, read_facts
from castlm.export.hf import export_model
from castlm.export.origin import origin_of
from castlm.export.packed import groups_of, naming_instead, pack_into
from castlm.facts import Perplexities
from castlm.files.output import atomic_dir
from castlm.formats.table import FORMATS
from castlm.models.architecture import move_
from castlm.models.io import load_model, save_dtype
from castlm.oneshot.calibration import calibration_length
from castlm.oneshot.steps.round import QuantizeReport, quantize_, stored_layers
from castlm.say import Progress, Say, silent


@dataclass(frozen=True)
class CalibrationOptions:
    """A calibration text for int4 or int3, and the draw of sequences from it."""

    text: str
    """A file, folder, glob or hub dataset."""
    num_sequences: int = 64
    seq_len: int = 512
    seed: int = 0


@torch.no_grad()
def quantize_folder(
    name: str,
    folder: Path,
    kind: str,
    *,
    pattern: Pattern | None,
    calibration: CalibrationOptions | None = None,
    packed: bool = False,
    head: str | None = None,
    damping: float = 0.01,
    options: TextOptions = DEFAULTS,
    dtype: str = "source",
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = silent,
) -> QuantizeReport:
    """Rounds the linear layers of a model, keeps zeros, and writes the result to `folder`.

    Args:
        name: a model folder, hub id, GGUF file or "demo".
        folder: the output, a plain model folder with the rounded values, or a packed one.
        kind: "int8" or "fp8", to the nearest with a scale per row; "int4", "int3", by GPTQ with a scale per 64 columns.
        pattern: the model's pattern, verified before and after; None for a dense model.
        calibration: int3 needs it; without it int4 is rounded to the nearest.
        packed: store the integers and scales in castlm's packed format.
        head: with `packed`, "int8" also rounds the output head and the embedding.
        damping: int4, int3: fraction of the mean diagonal to add to the Hessian.
        options: how the calibration text is read; a chat template is also saved.
        dtype: "bf16", "fp16" or "fp32", the dtype of a plain folder; "source" is the dtype of the stored model.
        overwrite: replace an earlier result in `folder`.
        progress: called with (finished blocks, all blocks).

    Returns:
        Codes, scales and errors by layer.

    Raises:
        InputError: a model without the pattern, a kind that cannot be packed, or a missing or superfluous calibration
            text, or `folder` holds something (without `overwrite`). `folder` stays unchanged after any error.
    """
    if packed and FORMATS[kind].kernel is None:
        raise InputError(f"the packed format does not hold {kind}: leave --packed out")
    if head is not None and not packed:
        raise InputError(f"--head {head} is for the packed format: pass --packed, or leave it out")
    form = FORMATS[kind]
    if calibration is not None and not form.reads_text:
        raise InputError(f"{kind} needs no calibration text: leave --calibration out")
    if calibration is None and form.needs_training:
        raise InputError(f"{kind} needs a calibration text: pass --calibration")
    if calibration is None and form.reads_text:
        say(f"{kind} without a calibration text, to the nearest: --calibration TEXT loses less")
    groups = groups_of(name, pattern)
    facts = read_facts(Path(name))
    if facts.rounded is not None:
        raise InputError(
            f"{name} was trained as {facts.rounded.kind}, which castlm pack stores: quantize another model"
        )
    documents = None if calibration is None else open_documents(calibration.text, options)
    # GPTQ computes in fp32; rounding to the nearest takes fp32 a layer at a time, and what is written is the same.
    held = None if calibration is None and dtype == "source" else torch.float32
    loaded = load_model(name, dtype=held, trust_remote_code=trust_remote_code)
    encoder = text_encoder(loaded.tokenizer, options)
    left_dense: dict[str, str] = {}
    if groups is not None:
        layers, left_dense = sparse_linears(loaded.model, groups)
        left_dense |= facts.left_dense
        for layer, module in layers.items():
            is_sparse = left_dense_reason(f"{layer}.weight", left_dense) is None
            if is_sparse and groups.violations(module.weight):
                raise InputError(f"{name} is not {groups} in {layer}: pass its own pattern, or prune it first")
    tokens: Tensor | None = None
    text: dict[str, Any] = {}
    if documents is not None and calibration is not None:
        seq_len, seed = min(calibration.seq_len, calibration_length(loaded.model)), calibration.seed
        tokens, _ = calibration_sequences(documents, encoder, calibration.num_sequences, seq_len, seed, say)
        text = {"text": calibration.text, "text_sha256": documents.text_hash(), "seed": seed}
    move_(loaded.model, device)
    report = quantize_(loaded.model, kind, calibration=tokens, damping=damping, progress=progress)
    move_(loaded.model, "cpu")
    origin = origin_of(name)
    record = replace(
        facts,  # their `earlier` and their own step stay: `quantized` is a step after it
        base_model=origin.base_model,
        license=origin.license,
        quantized=replace(report.facts(), source=name, **text),
        pattern=None if pattern is None else str(pattern),
        # no longer true
        packed=None,
        proof=None,
        perplexity=Perplexities(),
        figures=[
            row if row.name == "dense" else replace(row, name=f"{row.name}, before {kind}")
            for row in facts.figures or []
        ]
        or None,
    )
    write_plain = functools.partial(
        export_model,
        loaded.model,
        loaded.tokenizer,
        pattern=None if pattern is None else pattern.stored,  # what is cut out is gone already
        left_dense=left_dense,
        record=record,
        overwrite=overwrite,
        dtype=save_dtype(dtype, loaded.dtype),
    )
    if not packed:
        write_plain(folder)
        return report
    with atomic_dir(folder, overwrite) as temporary:
        plain = temporary / ".plain" / folder.name
        with naming_instead(temporary, folder), naming_instead(plain, name):
            write_plain(plain)
            pack_into(temporary, plain, groups, head=head, integers=stored_layers(loaded.model, report.layers))
        shutil.rmtree(plain.parent)
    return report
