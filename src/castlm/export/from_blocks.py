"""Assembles a model folder from files of transformer blocks, with at most one tensor in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.nm import Pattern
from castlm.dtypes import STORED_NAMES
from castlm.export.hf import (
    dtype_name,
    new_manifest,
    rejected,
    verify_pattern,
    write_all_but_weights,
    write_index,
    write_record,
)
from castlm.export.stream import write_safetensors
from castlm.export.verify import verify
from castlm.files.atomic_dir import atomic_dir
from castlm.files.reading import user_path


def export_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    blocks: Sequence[Path],
    outside: Iterator[tuple[str, Tensor]],
    pattern: Pattern,
    left_dense: Mapping[str, str],
    record: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Writes `folder` with castlm.json and a model card, and verifies it; returns the content of castlm.json.

    Args:
        model: the model on the meta device, for names and shapes.
        blocks: a safetensors file of each block, in `dtype`, each tensor under its name in `model`. They are linked
            where the file system allows it, and copied otherwise.
        outside: all other weights by name, in the order of `model.named_parameters()`; rounded to `dtype`.

    Raises:
        InputError: the disk is full, or the verification fails; the result is then kept as `<folder>.rejected`.
    """
    folder = Path(os.path.realpath(user_path(folder)))
    manifest = new_manifest(pattern, left_dense, {**record, "dtype": dtype_name(dtype)})
    with atomic_dir(folder, overwrite=True) as temporary:
        files = [f"model-{i:05d}-of-{len(blocks) + 1:05d}.safetensors" for i in range(1, len(blocks) + 2)]
        weight_map: dict[str, str] = {}
        for block, name in zip(blocks, files[1:]):
            _link_or_copy(block, temporary / name)
            with safe_open(block, "pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), name)
        others = {name: p for name, p in model.named_parameters() if name not in weight_map}
        layout = {name: (STORED_NAMES[dtype], tuple(parameter.shape)) for name, parameter in others.items()}
        rounded = ((name, tensor.to(dtype)) for name, tensor in outside)
        write_safetensors(temporary / files[0], layout, rounded, {"format": "pt"})
        weight_map |= dict.fromkeys(layout, files[0])
        total = sum(p.numel() for p in model.parameters())
        write_index(temporary, dict(sorted(weight_map.items())), total, dtype)
        write_all_but_weights(model, tokenizer, temporary, dtype)
        try:
            report = verify(temporary, pattern, known_layers=())
            verify_pattern(report, model, manifest["left_dense"])
        except Exception as error:
            raise rejected(temporary, folder, error) from error
        manifest["proof"] = report.totals()
        write_record(temporary, folder.name, manifest)
    return manifest


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
