"""Computes the memory of `castlm prune`, with the whole model or one block, from the model's config alone.

Each count follows the tensors that are alive at once in `castlm.oneshot`; a benchmark compares it with a real process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from castlm.core.blocks import in_block
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.core.sparsify import sparse_linears, weight_parameter
from castlm.hardware import resident_memory
from castlm.models.architecture import auto_class, backbone, linearize_
from castlm.oneshot.admm import ADMM_ROWS
from castlm.oneshot.options import BasisOptions, Refinements
from castlm.oneshot.solvers import REFIT_ROWS, SOLVERS
from castlm.oneshot.source import block_stack
from castlm.oneshot.walk import KEPT_BYTES, PASS_TOKENS_CPU
from castlm.planning.memory import GIB, as_config_error, read_config
from castlm.structured.prune import BACKWARD_TOKENS

_BLOCKS_OF_WIDTHS = 4  # activations of the widest layer that a block holds at once: gate, up, and their products


class _Read(NamedTuple):
    """Layers that read one input."""

    columns: int
    rows: int
    """Total of these layers."""

    @property
    def size(self) -> int:
        return self.rows * self.columns


class _Model(NamedTuple):
    """The sizes of a model that the plan needs."""

    reads: list[_Read]
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

    @property
    def outside(self) -> int:
        """Parameters outside the blocks."""
        return self.total - self.num_layers * self.block

    @property
    def widest(self) -> int:
        return max(max(read.columns, read.rows) for read in self.reads)


@dataclass(frozen=True)
class PruneMemoryPlan:
    """Bytes of a `castlm prune` on a CPU."""

    components: dict[str, int]
    """Bytes by component; `process` is Python and its libraries, measured in this process."""
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
    pattern: Pattern = NM(2, 4),  # noqa: B008
    num_sequences: int = 128,
    seq_len: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    basis: BasisOptions | None = None,
    refinements: Refinements | None = None,
) -> PruneMemoryPlan:
    """The peak memory of `castlm prune` on a CPU.

    The phases: `enter` (the text passes through the embeddings, and once through the blocks), `statistics` (the inputs
    of a block are seen), `basis` (the neurons of its MLP are permuted), `solve`, `reconstruction`, and with the whole
    model in memory `verify` (the result is read back beside it). Structured patterns have no `basis`, and with the
    method taylor `gradients` (a backward pass of the whole model, whose blocks are run again). Blocks are taken to be
    alike.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        memory: "model" or "block", as in `castlm prune`; "model" for structured patterns.
        method: one that reads a calibration text: "wanda" or "sparsegpt", and "wanda", "flap" or "taylor" for
            structured patterns.
        dtype: the dtype of the stored model.
        basis: not with the residual stream rotated, whose statistics are not counted.

    Raises:
        InputError: an unreadable config, not a causal LM, nothing to prune, or a method, a memory or a rotation that
            there is no plan for.
    """
    config, basis = read_config(config), basis or BasisOptions()
    _check(method, pattern, basis)
    refinements = (refinements or Refinements()).for_solver(method, pattern)
    basis.check()
    refinements.check()
    model = _model(config, pattern)
    tokens = max(PASS_TOKENS_CPU // seq_len, 1) * seq_len
    states = 4 * num_sequences * seq_len * model.hidden
    parts = {
        "process": resident_memory(),
        "weights": 4 * (model.block if memory == "block" else model.total),
        **_of_a_block(model, tokens, method, pattern, basis, refinements),
    }
    if refinements.staged_statistics:
        parts["kept outputs"] = _kept(model, num_sequences * seq_len)
    if method == "taylor":
        backward = max(BACKWARD_TOKENS // seq_len, 1) * seq_len
        parts["gradients"] = 4 * model.num_layers * sum(read.size for read in model.reads)
        parts["kept for backward"] = 4 * backward * _kept_by_model(model)
    # The inputs and outputs of a block, also of the dense model if that runs beside it.
    on_disk = states * (4 if refinements.reconstruct_epochs else 2)
    return PruneMemoryPlan(parts, _phases(parts, memory, model.outside * dtype.itemsize), on_disk)


def _check(method: str, pattern: Pattern, basis: BasisOptions) -> None:
    if method not in pattern.calibrated:
        known = ", ".join(pattern.calibrated)
        raise InputError(f"method {method!r} reads no calibration text for {pattern}: the plan is for {known}")
    if basis.rotate == "residual":
        raise InputError("the memory of rotate residual is not known: plan for rotate values")


def _of_a_block(
    model: _Model, tokens: int, method: str, pattern: Pattern, basis: BasisOptions, refinements: Refinements
) -> dict[str, int]:
    """Bytes held for one block beside its weights, by phase.

    Args:
        tokens: tokens of a forward pass.
    """
    structured = pattern.cut_out is not None
    axes = 2 if structured else SOLVERS[method].axes
    solver = _units(model.reads) if structured else max(_solve(r, axes, refinements, pattern) for r in model.reads)
    of_reads = [read.columns**axes for read in model.reads]
    parts = {
        "statistics": 4 * (max(of_reads) if refinements.staged_statistics else sum(of_reads)),
        "activations": 4 * tokens * (_BLOCKS_OF_WIDTHS * model.widest // 2 + 4 * model.hidden),
        "solver": 4 * solver,
        "basis": 0 if basis.is_off or structured else 4 * max(_turn(read, basis) for read in model.reads),
    }
    if parts["basis"]:  # is chosen by SparseGPT's statistics, whatever solves the layers after that
        parts["statistics of the basis"] = 4 * sum(read.columns**2 for read in model.reads)
    if refinements.reconstruct_epochs:
        # The masks, a byte each; gradients, two moments and the best weights beside what is saved for the backward
        # pass, or beside the new best weights that replace them.
        parts["reconstruction"] = model.block + 4 * (4 * model.block + max(tokens * model.kept, model.block))
    return parts


def _phases(parts: dict[str, int], memory: str, embeddings: int) -> dict[str, int]:
    """Bytes at each moment that can be the peak; `embeddings` is all outside the blocks, as stored."""
    block = parts["process"] + parts["weights"]
    held = block + parts.get("kept outputs", 0)
    seen, turned = held + parts["statistics"], block + parts.get("statistics of the basis", 0)
    phases = {"statistics": max(seen, turned) + parts["activations"], "solve": seen + parts["solver"]}
    if memory == "block":  # beside the embeddings stands the file that they are read from, or a block
        phases["enter"] = parts["process"] + embeddings + max(embeddings, parts["weights"] + parts["activations"])
    else:
        phases["verify"] = block + parts["weights"]
    if "gradients" in parts:
        phases["gradients"] = held + parts["gradients"] + parts["kept for backward"]
    if parts["basis"]:
        phases["basis"] = turned + parts["basis"]
    if "reconstruction" in parts:
        phases["reconstruction"] = block + parts["reconstruction"]
    return phases


def _kept(model: _Model, num_tokens: int) -> int:
    """Bytes of the outputs of finished layers, see `BlockInputs.keep_outputs`."""
    kept = 0
    for read in model.reads[:-1]:  # after the last layers comes the next block
        size = 4 * num_tokens * read.rows
        kept += size if kept + size <= KEPT_BYTES else 0
    return kept


def _solve(read: _Read, axes: int, refinements: Refinements, pattern: Pattern) -> int:
    """Elements that a solver holds beside weights and statistics."""
    size, square = read.size, read.columns**2
    if axes < 2:
        return 4 * size
    # Weight as given, without dead columns, transposed, and what is lost so far; the factor of the Hessian and the
    # products with it. For what comes after, the target and the Hessian are kept beside them.
    masks, refits = refinements.mask_iterations > 0, refinements.num_refits(pattern) > 0
    kept = int(masks or refits)
    solve = (4 + kept) * size + (2 + kept) * square
    # For better masks, first the eigenvectors of the damped Hessian are found, then a part of the rows is solved for.
    find, solve_rows = 3 * size + 5 * square, 7 * size + 4 * min(read.rows, ADMM_ROWS) * read.columns + 3 * square
    improve = max(find, solve_rows) if masks else 0
    refit = 3 * size + 7 * min(read.rows, REFIT_ROWS) * read.columns + 2 * square if refits else 0
    return max(solve, improve, refit)


def _units(reads: list[_Read]) -> int:
    """Elements that the choice of units and the least squares on the rest hold beside weights and statistics."""
    # The layers of a block as they were, their masks and what becomes of them; the damped Hessian and its factor.
    return 3 * sum(read.size for read in reads) + 3 * max(read.columns for read in reads) ** 2


def _kept_by_model(model: _Model) -> int:
    """Elements for each token of a backward pass that runs the blocks again."""
    # What enters each block, what one block saves and as much of gradients, and four buffers of logits.
    return model.num_layers * model.hidden + 2 * model.kept + 4 * model.vocab


def _turn(read: _Read, basis: BasisOptions) -> int:
    """Elements that a permutation of the input's neurons holds beside weights and statistics."""
    # The permuted Hessian, and of 512 rows solved with it: a copy, its factor, that transposed, and the products,
    # beside the permuted weight. After that, new and old values of three matrices, which take less.
    return (5 * read.columns**2 + 2 * read.size) if basis.permute or basis.rotates_values else 0


def _model(config: PretrainedConfig, pattern: Pattern) -> _Model:
    num_layers = config.get_text_config().num_hidden_layers
    whole, one = _fake_model(config, num_layers), _fake_model(config, 1)
    reads, block = _reads_of_a_block(one, pattern)
    vocab, hidden = map(int, cast("Tensor", whole.get_input_embeddings().weight).shape)
    widest = max(max(p.shape) for name, p in one.named_parameters() if in_block(name))
    kept = _BLOCKS_OF_WIDTHS * widest + 10 * hidden
    return _Model(reads, hidden, num_layers, block, sum(p.numel() for p in whole.parameters()), kept, vocab)


def _fake_model(config: PretrainedConfig, num_layers: int) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = num_layers
    with FakeTensorMode(), as_config_error(config):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        linearize_(model)
    return model


def _reads_of_a_block(model: PreTrainedModel, pattern: Pattern) -> tuple[list[_Read], int]:
    """The sparse layers that read each input in a one-block model, and the number of parameters of that block."""
    layers, _ = sparse_linears(model, pattern)
    if any(weight_parameter(layer).dim() == 3 for layer in layers.values()):
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
    embeddings: Any = model.get_input_embeddings().weight
    with embeddings.fake_mode, torch.no_grad(), as_config_error(model.config):
        backbone(model)(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    reads = [_Read(readers[0].in_features, sum(reader.out_features for reader in readers)) for _, readers in seen]
    return reads, sum(p.numel() for p in block.parameters())
