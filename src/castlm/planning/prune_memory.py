"""Computes the memory that `castlm prune` takes with the whole model or with one block, from the model's config alone.

Each count follows the tensors that are alive at once in `castlm.oneshot`; a benchmark compares it with a real process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from castlm.core.blocks import in_block
from castlm.core.combined import is_structured
from castlm.core.errors import InputError
from castlm.core.experts import linearize_experts_
from castlm.core.pattern import Pattern, as_pattern
from castlm.core.sparsify import sparse_linears
from castlm.hardware import resident_memory
from castlm.models.architecture import auto_class, backbone, linearize_conv1d_
from castlm.oneshot.admm import ADMM_ROWS
from castlm.oneshot.options import BasisOptions, Refinements
from castlm.oneshot.solvers import REFIT_ROWS, SOLVERS
from castlm.oneshot.units import BACKWARD_TOKENS, SCORES
from castlm.oneshot.walk import PASS_TOKENS_CPU, block_stack
from castlm.planning.activations import as_config_error
from castlm.planning.memory import GIB, read_config

_BLOCKS_OF_WIDTHS = 4  # activations of the widest layer that a block holds at once: gate, up, and their products


class _Read(NamedTuple):
    """Layers that read one input."""

    columns: int
    rows: int
    """Of all of them together."""


@dataclass(frozen=True)
class PruneMemoryPlan:
    """Bytes of a `castlm prune` on a CPU."""

    components: dict[str, int]
    """`process` is what Python and its libraries take, as measured in this process."""
    phases: dict[str, int]
    disk: int
    """Bytes of hidden states on disk."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    def table(self) -> str:
        """The numbers as text."""
        rows = [*self.components.items(), *((f"phase: {name}", size) for name, size in self.phases.items())]
        rows += [("peak", self.peak)] + ([("hidden states on disk", self.disk)] if self.disk else [])
        return "\n".join(f"{name:<34}{size / GIB:>10.3f} GiB" for name, size in rows)


def plan_prune_memory(
    config: PretrainedConfig | str | Path,
    *,
    memory: Literal["model", "block"] = "block",
    method: str = "sparsegpt",
    pattern: Pattern | str = "2:4",
    num_sequences: int = 128,
    seq_len: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    basis: BasisOptions | None = None,
    refinements: Refinements | None = None,
) -> PruneMemoryPlan:
    """The peak memory of `castlm prune` on a CPU, without the options that hold a dense twin.

    The phases: `enter` (the text passes through the embeddings, and once through the blocks), `statistics` (the
    inputs of a block are seen), `basis` (the neurons of its MLP are permuted), `solve`, and with the whole model in
    memory `verify` (the result is read back beside it). Structured patterns have no `basis`, and with the method taylor
    `gradients` (a backward pass of the whole model, whose blocks are run again). Blocks are taken to be alike.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        memory: what is held, as the option of `castlm prune`; "model" for structured patterns.
        method: one that reads a calibration text: "wanda" or "sparsegpt", and "wanda", "flap" or "taylor" for
            structured patterns.
        dtype: what the model is stored in.

    Raises:
        InputError: an unreadable config, not a causal LM, nothing to prune, or a method or memory that the pattern does
            not have.
    """
    config, basis, refinements = read_config(config), basis or BasisOptions(), refinements or Refinements()
    pattern = as_pattern(pattern)
    structured = is_structured(pattern)
    scores = [name for name, score in SCORES.items() if score.needs]
    known = scores if structured else [name for name, solver in SOLVERS.items() if solver.add is not None]
    if method not in known:
        raise InputError(
            f"method {method!r} reads no calibration text for {pattern}: the plan is for {', '.join(known)}"
        )
    if structured and memory == "block":
        raise InputError(f"memory 'block' is not for {pattern}, which takes the whole model: choose 'model'")
    whole = _fake_model(config, config.get_text_config().num_hidden_layers)
    total = sum(p.numel() for p in whole.parameters())
    one = _fake_model(config, 1)
    reads, block = _reads_of_a_block(one, pattern)
    hidden = int(whole.get_input_embeddings().weight.shape[1])
    num_layers = config.get_text_config().num_hidden_layers
    outside = total - num_layers * block
    tokens = max(PASS_TOKENS_CPU // seq_len, 1) * seq_len
    widest = max(max(read.columns, read.rows) for read in reads)
    states = 4 * num_sequences * seq_len * hidden
    axes = 2 if structured else SOLVERS[method].axes
    solver = _units(reads) if structured else max(_solve(read, axes, refinements, pattern) for read in reads)
    parts = {
        "process": resident_memory(),
        "weights": 4 * (block if memory == "block" else total),
        "statistics": 4 * sum(read.columns**axes for read in reads),
        "activations": 4 * tokens * (_BLOCKS_OF_WIDTHS * widest // 2 + 4 * hidden),
        "hidden states": 0 if memory == "block" else states,
        "solver": 4 * solver,
        "basis": 0 if basis.is_off or structured else 4 * max(_turn(read, basis) for read in reads),
    }
    if method == "taylor":
        parts["gradients"] = 4 * num_layers * sum(read.columns * read.rows for read in reads)
        parts["kept for backward"] = 4 * max(BACKWARD_TOKENS // seq_len, 1) * seq_len * _kept(one, num_layers)
    static = parts["process"] + parts["weights"] + parts["hidden states"]
    phases = {
        "statistics": static + parts["statistics"] + parts["activations"],
        "solve": static + parts["statistics"] + parts["solver"],
    }
    if memory == "block":
        embeddings = outside * dtype.itemsize  # beside them stands the file that they are read from, or a block
        phases["enter"] = parts["process"] + embeddings + max(embeddings, parts["weights"] + parts["activations"])
    else:
        phases["verify"] = parts["process"] + 2 * parts["weights"]
    if method == "taylor":
        static = parts["process"] + parts["weights"]
        phases["gradients"] = static + parts["gradients"] + parts["kept for backward"]
    if parts["basis"]:
        phases["basis"] = static + parts["statistics"] + parts["basis"]
    return PruneMemoryPlan(parts, phases, 2 * states if memory == "block" else 0)


def _solve(read: _Read, axes: int, refinements: Refinements, pattern: Pattern) -> int:
    """Elements that a solver holds beside weights and statistics."""
    size, square = read.rows * read.columns, read.columns**2
    if axes < 2:
        return 4 * size
    # Weight as given, without dead columns, transposed, and what is lost so far; the factor of the Hessian and the
    # products with it. For what comes after, the target and the Hessian are kept beside them.
    masks, refits = refinements.mask_iterations > 0, refinements.num_refits(pattern) > 0
    kept = int(masks or refits)
    solve = (4 + kept) * size + (2 + kept) * square
    # For better masks, first the eigenvectors of the damped Hessian are found, then a part of the rows is solved for.
    find, solve_rows = 3 * size + 7 * square, 7 * size + 4 * min(read.rows, ADMM_ROWS) * read.columns + 3 * square
    improve = max(find, solve_rows) if masks else 0
    refit = 3 * size + 7 * min(read.rows, REFIT_ROWS) * read.columns + 2 * square if refits else 0
    return max(solve, improve, refit)


def _units(reads: list[_Read]) -> int:
    """Elements that the choice of units and the least squares on the rest hold beside weights and statistics."""
    # The layers of a block as they were, their masks and what becomes of them; the damped Hessian and its factor.
    return 3 * sum(read.rows * read.columns for read in reads) + 3 * max(read.columns for read in reads) ** 2


def _kept(model: PreTrainedModel, num_layers: int) -> int:
    """Elements for each token of a backward pass that runs the blocks again, by a model of one block."""
    vocab, hidden = model.get_input_embeddings().weight.shape
    widest = max(max(p.shape) for name, p in model.named_parameters() if in_block(name))
    # What enters each block, what a LLaMA block saves and as much of gradients, and four buffers of logits.
    return num_layers * hidden + 2 * (_BLOCKS_OF_WIDTHS * widest + 10 * hidden) + 4 * vocab


def _turn(read: _Read, basis: BasisOptions) -> int:
    """Elements that a permutation of the input's neurons holds beside weights and statistics."""
    # The permuted Hessian, and of 512 rows solved with it: a copy, its factor, that transposed, and the products.
    return (5 * read.columns**2 + 6 * read.rows * read.columns) if basis.permute or basis.rotates_values else 0


def _fake_model(config: PretrainedConfig, num_layers: int) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = num_layers
    with FakeTensorMode(), as_config_error(config):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        linearize_conv1d_(model)
    return model


def _reads_of_a_block(model: PreTrainedModel, pattern: Pattern) -> tuple[list[_Read], int]:
    """Which sparse layers of a model of one block read one input, and the number of parameters of that block."""
    layers, _ = sparse_linears(model, pattern)
    if linearize_experts_(model):
        raise InputError(f"the memory of pruning experts is not known: measure {model.config.model_type} by running it")
    _, (block,) = block_stack(model, layers)
    seen: list[tuple[Tensor, list[nn.Linear]]] = []

    def before(layer: nn.Linear, x: Tensor) -> None:
        for tensor, readers in seen:
            if tensor is x:
                readers.append(layer)
                return
        seen.append((x, [layer]))

    hooks = [layer.register_forward_pre_hook(lambda module, args: before(module, args[0])) for layer in layers.values()]
    embeddings = model.get_input_embeddings().weight
    with embeddings.fake_mode, torch.no_grad(), as_config_error(model.config):  # type: ignore[attr-defined]
        backbone(model)(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    reads = [_Read(readers[0].in_features, sum(reader.out_features for reader in readers)) for _, readers in seen]
    return reads, sum(p.numel() for p in block.parameters())
