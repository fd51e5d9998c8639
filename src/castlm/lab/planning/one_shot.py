"""Bounds the memory of `castlm prune` and `castlm quantize` on a CPU, from the model's config alone.

A measured rule, not a count of what each step holds: while a transformer block is at work, the process takes at
most some bytes for each weight of the block, and some for each element of the statistic of its widest layer (`PRUNE`,
`ROUND`). `benchmarks.prune_memory` compares it with real processes (docs/results/prune-memory.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.core.sparsify import num_weights, sparse_linears, transformer_blocks, weight_parameter
from castlm.hardware import resident_memory
from castlm.lab.planning.memory import OPENED_LATER, MemoryPlan, as_config_error, read_config
from castlm.models.architecture import embedding_weight, shape_model
from castlm.models.locate import gguf_bytes
from castlm.oneshot.draw import calibration_length, default_sequences
from castlm.oneshot.options import Effort

PRUNE, ROUND = (13, 20), (22, 22)
"""Bytes for a weight of a block (in fp32, with old and new values, masks and what a solver makes of them), and for an
element of the statistic of its widest layer (the sums, and their factors), in a prune and in rounding."""
OUTSIDE, OUTSIDE_GGUF = 4, 10
"""Bytes for a weight outside the blocks, which is read and written in bf16; of a GGUF file also its copy in fp32."""


def plan_one_shot(
    config: PretrainedConfig | str | Path,
    *,
    memory: Literal["model", "block"] = "block",
    pattern: Pattern = NM(1, 2),  # noqa: B008  # every layer of even width
    rule: tuple[int, int] = PRUNE,
    reads_text: bool = True,
    num_sequences: int | None = None,
    seq_len: int | None = None,
    effort: Effort | None = None,
    reconstructs: bool = False,
) -> MemoryPlan:
    """The peak memory of one walk over the transformer blocks on a CPU. Blocks are taken to be alike.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        memory: "model" or "block", as in `castlm prune`.
        rule: `PRUNE` or `ROUND`.
        reads_text: whether the solver, or the format, reads a calibration text.
        num_sequences, seq_len: of the calibration text; by default those of `castlm prune` with `effort`.
        reconstructs: whether the outputs of the dense blocks are kept too, for `--reconstruct-epochs`.

    Raises:
        InputError: an unreadable config, not a causal LM, no layer that can be sparse, or a model with experts, whose
            tokens are not known.
    """
    source, config = config, read_config(config)
    with as_config_error(config):
        model = shape_model(config)
    layers, _ = sparse_linears(model, pattern)
    if any(weight_parameter(layer).dim() == 3 for layer in layers.values()):
        raise InputError(f"the memory of experts is not known: measure {config.model_type} by running it")
    blocks = [sum(p.numel() for p in block.parameters()) for block in transformer_blocks(model).values()]
    total, hidden = sum(p.numel() for p in model.parameters()), embedding_weight(model).shape[1]
    outside = total - sum(blocks)
    seq_len = seq_len or calibration_length(model)
    if num_sequences is None:
        assert effort is not None
        num_sequences = default_sequences(layers, seq_len, effort)
    process = resident_memory() + OPENED_LATER
    of_weight, of_square = rule
    at_work = of_weight * max(blocks)
    if reads_text:
        at_work += of_square * max(layer.in_features for layer in layers.values()) ** 2
    if memory == "block":
        phases = {"block": process + at_work, "outside the blocks": process + bytes_outside(source) * outside}
    else:  # the result is read back beside the model, and the pages of its files stay mapped
        weights = process + 4 * total
        phases = {"block": weights + at_work, "verify": weights + (4 + stored_bytes(config)) * total}
    # inputs and outputs of a block, and those of the dense block
    disk = 4 * num_sequences * seq_len * hidden * (4 if reconstructs else 2) if reads_text else 0
    sparse = sum(map(num_weights, layers.values()))
    return MemoryPlan({"process": process}, phases, total, sparse, disk=disk)


def bytes_outside(source: PretrainedConfig | str | Path) -> int:
    """Bytes for each weight outside the blocks of a model in memory by block."""
    is_named = not isinstance(source, PretrainedConfig) and Path(source).suffix != ".json"
    return OUTSIDE_GGUF if is_named and gguf_bytes(str(source)) is not None else OUTSIDE


def stored_bytes(config: PretrainedConfig) -> int:
    """Bytes of a weight in the files of the result, in the dtype of its source; fp32 where the config names none."""
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
