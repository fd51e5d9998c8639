"""Computes the memory of `castlm prune`, with the whole model or one block, from the model's config alone.

Each step of `castlm.oneshot` declares what it holds at its peak, in a function beside it such as `refit_holds`; this
module adds them up to the phases of a prune. A benchmark compares the sum with a real process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from castlm.core.blocks import in_block
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.core.sparsify import SparseLayer, sparse_linears, weight_parameter
from castlm.hardware import resident_memory
from castlm.lab.planning.memory import MemoryPlan, as_config_error, read_config
from castlm.models.architecture import auto_class, backbone, linearize_
from castlm.models.locate import gguf_bytes
from castlm.oneshot.basis import permute_neurons_holds
from castlm.oneshot.draw import calibration_length, default_sequences
from castlm.oneshot.methods import applied, method_of, methods_of
from castlm.oneshot.options import EFFORTS, BasisOptions, Refinements
from castlm.oneshot.solvers import SOLVERS, Settings
from castlm.oneshot.source import block_stack
from castlm.oneshot.steps.reconstruct import reconstruct_holds
from castlm.oneshot.steps.solve import prune_layers_holds
from castlm.oneshot.walk import PASS_TOKENS_CPU

LIBRARIES = 40 * 2**20
"""Bytes of buffers that tokenizer, BLAS, LAPACK and oneDNN keep from their first call on."""
MALLOC = 0.05
"""The share that malloc loses: less than in training, as most tensors are large and have pages of their own."""
BLOCK_WIDTHS = 4
"""Activations of the widest layer that a block holds at once: gate, up, and their products."""


class Read(NamedTuple):
    """Layers that read one input."""

    rows: int
    """Total of these layers."""
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


class Model(NamedTuple):
    """The sizes of a model that the plan needs."""

    reads: list[Read]
    """The layers of one block."""
    hidden: int
    num_layers: int
    block: int
    """Parameters of one block."""
    total: int
    """Parameters of the whole model."""
    kept: int
    """Elements for each token that one block saves for a backward pass."""
    vocab: int
    layers: Mapping[str, SparseLayer]
    calibration_length: int


def plan_prune_memory(
    config: PretrainedConfig | str | Path,
    *,
    memory: Literal["model", "block"] = "block",
    method: str = "sparsegpt",
    pattern: Pattern = NM(2, 4),  # noqa: B008
    num_sequences: int | None = None,
    seq_len: int | None = None,
    basis: BasisOptions | None = None,
    refinements: Refinements | None = None,
    effort: str = "best",
) -> MemoryPlan:
    """The peak memory of `castlm prune` on a CPU.

    The phases: `enter` (the text passes through the embeddings, and once through the blocks), `statistics` (the inputs
    of a block are seen), `basis` (the neurons of its MLP are permuted), `solve`, `reconstruction`, and with the whole
    model in memory `verify` (the result is read back beside it). Blocks are taken to be alike.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        memory: "model" or "block", as in `castlm prune`.
        method: one that reads a calibration text: "wanda" or "sparsegpt".
        num_sequences, seq_len: of the calibration text; by default as in `castlm prune`.
        effort: the `start_effort`, whose options are in `basis` and `refinements` already.

    Raises:
        InputError: an unreadable config, not a causal LM, nothing to prune, or a method or a memory that there is no
            plan for.
    """
    basis, refinements = basis or BasisOptions(), applied(refinements or Refinements(), method, pattern, effort)
    if not method_of(method, pattern).reads_text:
        known = ", ".join(name for name, row in methods_of(pattern).items() if row.reads_text)
        raise InputError(f"method {method!r} reads no calibration text for {pattern}: the plan is for {known}")
    source, config = config, read_config(config)
    model = sizes_of(config, pattern)
    seq_len = seq_len or model.calibration_length
    num_sequences = num_sequences or default_sequences(model.layers, seq_len, EFFORTS[effort])
    reads, layers = model.reads, sum(read.size for read in model.reads)
    turns_axes = not basis.is_off
    is_staged = EFFORTS[effort].is_staged and SOLVERS[method].is_refined
    # Of the statistics: a vector or a matrix for each input.
    of_reads = [read.columns ** SOLVERS[method].axes for read in reads]
    widest = max(max(read.columns, read.rows) for read in reads)
    tokens = max(PASS_TOKENS_CPU // seq_len, 1) * seq_len  # of a forward pass
    solver = max(prune_layers_holds(*read, SOLVERS[method], Settings(pattern, refinements)) for read in reads)
    parts = {
        "process": resident_memory() + LIBRARIES,
        "weights": 4 * (model.block if memory == "block" else model.total),
        "statistics": 4 * (max(of_reads) if is_staged else sum(of_reads)),
        "activations": 4 * tokens * (BLOCK_WIDTHS * widest // 2 + 4 * model.hidden),
        "solver": 4 * solver,
        "basis": 0,
    }
    block = parts["process"] + parts["weights"]
    turned = block
    if turns_axes and (basis.permute or basis.rotates_values):
        parts["basis"] = 4 * max(permute_neurons_holds(*read) for read in reads)
        # It is chosen by SparseGPT's statistics, whatever solves the layers after that.
        parts["statistics of the basis"] = 4 * sum(read.columns**2 for read in reads)
        turned += parts["statistics of the basis"]
    if memory == "model" and is_staged:
        parts["attention outputs"] = 4 * num_sequences * seq_len * model.hidden
    seen = block + parts["statistics"] + parts.get("attention outputs", 0)
    # While a text is read, the statistics of its part stand beside their sums.
    reading = max(seen + parts["statistics"], turned + parts.get("statistics of the basis", 0))
    phases = {"statistics": reading + parts["activations"], "solve": seen + parts["solver"]}
    outside = model.total - model.num_layers * model.block
    if memory == "block":
        phases["enter"] = parts["process"] + enter_holds(source, outside, parts["weights"] + parts["activations"])
    else:
        # the model that is read back, the pages of its files, which stay mapped, and activations that malloc keeps
        phases["verify"] = block + parts["weights"] + stored_bytes(config) * model.total + parts["activations"]
    if parts["basis"]:
        phases["basis"] = turned + parts["basis"]
    if refinements.reconstruct_epochs:
        parts["reconstruction"] = reconstruct_holds(model.block, tokens * model.kept)
        phases["reconstruction"] = block + parts["reconstruction"]
    process = parts["process"]
    phases = {name: process + int((size - process) * (1 + MALLOC)) for name, size in phases.items()}
    # The inputs and outputs of a block, also of the dense model if that runs beside it.
    on_disk = 4 * num_sequences * seq_len * model.hidden * (4 if refinements.reconstruct_epochs else 2)
    return MemoryPlan(parts, phases, model.total, model.num_layers * layers, disk=on_disk)


def enter_holds(source: PretrainedConfig | str | Path, outside: int, block: int) -> int:
    """Bytes while the text enters the model block by block.

    A weight outside the blocks is read and written in bf16, beside its file. A GGUF file takes 4 bytes in fp32 and 2 in
    bf16, and malloc keeps 4.

    Args:
        outside: number of weights outside the blocks.
        block: bytes of a block at work.
    """
    is_named = not isinstance(source, PretrainedConfig) and Path(source).suffix != ".json"
    is_gguf = is_named and gguf_bytes(str(source)) is not None
    narrow = torch.bfloat16.itemsize
    return max(outside * (10 if is_gguf else 2 * narrow), outside * narrow + block)


def stored_bytes(config: PretrainedConfig) -> int:
    """Bytes of a weight in the files of the result, in the dtype of its source; fp32 where the config names none."""
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def sizes_of(config: PretrainedConfig, pattern: Pattern) -> Model:
    """The sizes of a model. Raises `InputError` for one with experts, whose tokens are not known, or without layers."""
    num_layers = config.get_text_config().num_hidden_layers

    def fake(num: int) -> PreTrainedModel:
        shorter = copy.deepcopy(config)
        shorter.get_text_config().num_hidden_layers = num
        with FakeTensorMode(), as_config_error(shorter):
            model: PreTrainedModel = auto_class(shorter).from_config(shorter, dtype=torch.float32)
            linearize_(model)
        return model

    whole, one = fake(num_layers), fake(1)
    layers, _ = sparse_linears(one, pattern)
    if any(weight_parameter(layer).dim() == 3 for layer in layers.values()):
        raise InputError(f"the memory of experts is not known: measure {config.model_type} by running it")
    readers_of: list[tuple[Tensor, list[nn.Linear]]] = []

    def before(layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        for x, readers in readers_of:
            if x is args[0]:
                readers.append(layer)
                return
        readers_of.append((args[0], [layer]))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers.values()]
    embeddings: Any = one.get_input_embeddings().weight
    with embeddings.fake_mode, torch.no_grad(), as_config_error(config):
        backbone(one)(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    _, (block,) = block_stack(one, layers)
    vocab, hidden = map(int, embeddings.shape)
    widest = max(max(p.shape) for name, p in one.named_parameters() if in_block(name))
    return Model(
        [Read(sum(layer.out_features for layer in each), each[0].in_features) for _, each in readers_of],
        hidden,
        num_layers,
        block=sum(p.numel() for p in block.parameters()),
        total=sum(p.numel() for p in whole.parameters()),
        kept=BLOCK_WIDTHS * widest + 10 * hidden,
        vocab=vocab,
        layers=layers,
        calibration_length=calibration_length(whole),
    )
