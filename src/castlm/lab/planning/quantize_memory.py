"""Computes the memory of `castlm quantize`, block by block or with the whole model, from the model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from castlm.core.nm import NM
from castlm.formats.rounding import round_in_groups_holds
from castlm.hardware import resident_memory
from castlm.lab.planning.memory import MemoryPlan, read_config
from castlm.lab.planning.prune_memory import (
    BLOCK_WIDTHS,
    LIBRARIES,
    MALLOC,
    enter_holds,
    sizes_of,
    stored_bytes,
)
from castlm.oneshot.walk import PASS_TOKENS_CPU
from castlm_runtime.formats import FORMATS

_PACKING = 20 * 2**20  # bytes of code and buffers beyond those of a prune
_EVERY_LAYER = NM(1, 2)  # leaves out layers of odd widths alone


def plan_quantize_memory(
    config: PretrainedConfig | str | Path,
    kind: str,
    *,
    memory: Literal["model", "block"] = "block",
    packed: bool = False,
    has_text: bool = True,
    num_sequences: int = 64,
    seq_len: int | None = None,
) -> MemoryPlan:
    """The peak memory of `castlm quantize` on a CPU.

    The phases: `enter` (the text passes through the embeddings, and once through the blocks), `statistics` (the inputs
    of a block are seen), `round` (of the layers of a block that read one input, or of one layer without a text), and
    `finish` (the result is written and verified; with the whole model in memory it is read back beside it). Blocks are
    taken to be alike. The process that loads a packed result to check it is not counted.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        kind: the format.
        memory: "block" for a model whose weights are read one by one, "model" for others.
        packed: whether the result is packed.
        has_text: whether int4 or int3 reads a calibration text.
        num_sequences, seq_len: of the calibration text; `seq_len` is 512 by default, or the model's context.

    Raises:
        InputError: an unreadable config, not a causal LM, or a model with experts.
    """
    source, config = config, read_config(config)
    model, has_text = sizes_of(config, _EVERY_LAYER), has_text and FORMATS[kind].reads_text
    seq_len = seq_len or min(512, model.calibration_length)
    widest = max(max(read.columns, read.rows) for read in model.reads)
    tokens = max(PASS_TOKENS_CPU // seq_len, 1) * seq_len  # of a forward pass
    held = model.block if memory == "block" else model.total
    # Rounding to the nearest holds a whole model as it is stored, and blocks in fp32.
    itemsize = 4 if has_text or memory == "block" else stored_bytes(config)
    parts = {"process": resident_memory() + LIBRARIES + _PACKING, "weights": itemsize * held}
    block = parts["process"] + parts["weights"]
    phases: dict[str, int] = {}
    if has_text:
        parts["statistics"] = 4 * sum(read.columns**2 for read in model.reads)
        parts["activations"] = 4 * tokens * (BLOCK_WIDTHS * widest // 2 + 4 * model.hidden)
        # the layers that read one input, put together
        parts["rounding"] = 4 * max(read.size + round_in_groups_holds(*read) for read in model.reads)
        # while a text is read, the statistics of its part stand beside their sums
        phases["statistics"] = block + 2 * parts["statistics"] + parts["activations"]
    else:
        largest = max(layer.in_features * layer.out_features for layer in model.layers.values())
        parts["statistics"] = 0
        # in fp32: the old weight, a copy, its magnitudes or its codes, and the new weight
        parts["rounding"] = 4 * 5 * largest
        if FORMATS[kind].group:  # which has no Hessian, and an identity in its place
            parts["rounding"] += 4 * max(read.columns**2 for read in model.reads)
    phases["round"] = block + parts["statistics"] + parts["rounding"]
    outside = model.total - model.num_layers * model.block
    table = model.vocab * model.hidden
    if memory == "block":
        if has_text:
            phases["enter"] = parts["process"] + enter_holds(source, outside, parts["weights"] + parts["activations"])
        # a table of embeddings as it is stored, and where it is packed also as it is written
        phases["finish"] = parts["process"] + (2 if packed else 1) * table * stored_bytes(config)
    else:
        # the model that is read back, and the pages of its files, which stay mapped
        phases["finish"] = block + parts["weights"] + stored_bytes(config) * model.total
    process = parts["process"]
    phases = {name: process + int((size - process) * (1 + MALLOC)) for name, size in phases.items()}
    on_disk = 2 * 4 * num_sequences * seq_len * model.hidden if has_text and memory == "block" else 0
    layers = model.num_layers * sum(read.size for read in model.reads)
    return MemoryPlan(parts, phases, model.total, layers, disk=on_disk)
