"""Computes the memory of a run on each rank, and the number of ranks it needs, from the model's config alone.

Weights are counted on the meta device. The bytes that autograd saves in a forward pass are counted by running blocks of
the real model on fake tensors, which have shapes but no storage: a formula would hold for one model family alone. The
rest is arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from castlm.core.blocks import in_block
from castlm.core.errors import InputError, one_line
from castlm.core.experts import activate
from castlm.core.moments import new_moments
from castlm.core.nm import NM, Pattern
from castlm.core.rounding import add_weight_rounding, fit_rounding_
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import num_weights, sparse_linears, transformer_blocks
from castlm.distributed.sharding import beside_linears, is_gathered_narrow
from castlm.export.hf import check_export
from castlm.hardware import resident_memory
from castlm.models.architecture import backbone, is_vision_language, linearize_, shape_model
from castlm.models.io import check_no_kernels, check_num_layers, open_config
from castlm.names import aligned
from castlm.oneshot.ranks import PARTS
from castlm.training.attention import can_lay_end_to_end, use_attention_
from castlm_runtime.formats import FORMATS
from castlm_runtime.reading import read_json_object, user_path

# HF writes out a causal mask for fake tensors, where a run has none; for an attention of its own it leaves that alone.
_ATTENTION = "castlm_causal_sdpa"

_APART = "castlm_documents_apart"


def _documents_apart(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention with the mask (1, 1, T, T) that transformers makes for documents that do not attend to each other.

    torch keeps it in the compute type for each block, and transformers copies shared keys and values for each head.
    """
    mask = torch.ones(1, 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


_END_TO_END = "castlm_documents_end_to_end"


class _Varlen(torch.autograd.Function):
    """The tensors of torch's attention over sequences of any length, without values: it keeps its inputs, its output
    and the sum of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = torch.empty_like(query)  # (tokens, heads, head_dim)
        ctx.save_for_backward(query, key, value, states, query.new_empty(query.shape[:2], dtype=torch.float32))
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _documents_end_to_end(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention without a mask, as `castlm.training.attention` has it on a GPU."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    parts = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
    states: Tensor = _Varlen.apply(*parts)
    return states.unflatten(0, (query.shape[0], query.shape[2])), None


# Fake tensors do not show how many tokens each expert gets; together the experts get `top_k` per token.
_EXPERTS = "castlm_experts_together"


def _experts_together(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The tensors that transformers' `grouped_mm` saves: every token goes through as many experts as it takes."""
    flip = experts.is_transposed
    tokens = hidden[index.flatten() // index.shape[-1]]
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    out = tokens @ (up[0] if flip else up[0].mT)
    out = activate(experts, out)
    out = out @ (experts.down_proj[0] if flip else experts.down_proj[0].mT)
    out = (out * weights.flatten()[:, None])[index.flatten()]
    summed: Tensor = out.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)
    return summed


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a training run that its memory depends on, except the number of ranks."""

    seq_len: int
    micro_batch: int
    """Sequences of a forward pass, on each rank."""
    pattern: Pattern = field(default=NM(2, 4))
    scale_groups: int = 2
    weight_bits: int | None = None
    apart: bool = False
    """Whether the documents of a sequence do not attend to each other. On a CPU, and in families whose attention does
    not take their offsets, a mask for each token of a sequence tells them apart."""
    accumulates: bool = False
    """Whether a step has several micro-steps, so that gradients are there throughout."""
    steps_in_backward: bool = False
    """Whether each transformer block is stepped in the backward pass, so that one block's gradients are there."""
    measures_first: bool = False
    """Whether such a step is clipped, so that its passes run twice."""
    moments_on_host: bool = False
    """Whether moments are on the card only while their parameters are stepped."""
    checkpointing: bool = False
    compute: torch.dtype = torch.bfloat16
    """Type of the forward and backward pass; master weights are fp32."""
    teacher: torch.dtype | None = torch.bfloat16
    """Type of the teacher; None without one."""
    cached: bool = False
    """Whether a full cache stands for the teacher."""
    hidden_states: bool = True
    """Whether the teacher's hidden states are distilled; no effect without a teacher."""
    chunk_tokens: int = 1024
    """Tokens whose logits are in memory at once (default of the loss: 1,024 on a GPU, 192 on a CPU)."""
    moments: str = "fp32"
    """"fp32" or "8bit", as `AdamS` has them."""
    calibration_tokens: int = 0
    """Tokens of calibration text of the start (SparseGPT or Wanda); 0 if it reads none: then no phase `start`."""
    on_cpu: bool = False
    """Plan the memory of a process on a CPU: with Python and its libraries, the copy of the state that a checkpoint
    writes in the background, and the model that is read back in the end."""
    saves_in_background: bool = True
    """With `on_cpu`: whether there are checkpoints, and `async_save` writes them from a copy."""

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch


class Saved(NamedTuple):
    """Bytes that autograd keeps for the backward pass, parameters themselves excluded."""

    block: int
    """Activations of one block, on average."""
    block_weights: int
    """Weights of one block cast to the compute type, and products `W * A`, on average; independent of tokens."""
    rest: int
    """Outside the blocks."""


def block_kinds(model: PreTrainedModel, num_layers: int) -> tuple[Hashable, ...]:
    """A key for each transformer block, equal for blocks whose parameters have the same names and shapes."""
    blocks = transformer_blocks(model)
    stack_of = {name: name.rpartition(".")[0] for name in blocks}
    whole = [name for name in blocks if [*stack_of.values()].count(stack_of[name]) == num_layers]
    if len(whole) != num_layers:
        return ("all",) * num_layers
    return tuple(tuple((key, *p.shape) for key, p in blocks[name].named_parameters()) for name in whole)


def trace(config: PretrainedConfig, run: PlannedRun, sharded: bool, kinds: Sequence[Hashable] = ("all",)) -> Saved:
    """Saved bytes, from the differences between some blocks and one more, and between two small numbers of tokens."""
    sizes = [(run.micro_batch, run.seq_len), (1, 16), (1, 32)]
    first = functools.cache(lambda number: saved_bytes(config, number, sizes, run, sharded))
    of_kind = {}
    for kind in set(kinds):
        later = [*kinds, kinds[-1]]
        # Not the first block if another is like it: its trace includes layers around the blocks.
        index = next((i for i, other in enumerate(later) if i and other == kind), 0)
        of_kind[kind] = [more - less for less, more in zip(first(index), first(index + 1))]
    block, of_16, of_32 = (sum(of_kind[kind][size] for kind in kinds) // len(kinds) for size in range(len(sizes)))
    weights = max(0, 2 * of_16 - of_32)  # saved = weights + tokens * x, and little of tokens^2
    return Saved(block - weights, weights, first(1)[0] - of_kind[kinds[0]][0])


def saved_bytes(
    config: PretrainedConfig, num_layers: int, sizes: Sequence[tuple[int, int]], run: PlannedRun, sharded: bool
) -> list[int]:
    """Bytes of the storages that autograd saves in a forward pass of `num_layers` blocks, parameters excluded.

    Args:
        sizes: (sequences, tokens per sequence) of each forward pass; returns one number for each.
    """
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionInterface.register(_APART, _documents_apart)
    AttentionInterface.register(_END_TO_END, _documents_end_to_end)
    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_together)
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = num_layers
    with FakeTensorMode(), as_config_error(config):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        sdpa = ("sdpa" if not run.on_cpu else _APART) if run.apart else _ATTENTION  # "sdpa" is replaced below
        attention = sdpa if kind is None or kind._supports_sdpa else "eager"
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        if attention == "sdpa":
            ends = use_attention_(model) and can_lay_end_to_end(model)
            model.set_attn_implementation(_END_TO_END if ends else _APART)
        model.set_experts_implementation(_EXPERTS)
        linearize_(model)
        _parametrize_(model, run)
        if sharded and run.compute is not torch.float32:  # the types in which `shard_` gathers the blocks' parameters
            for block in filter(is_gathered_narrow, transformer_blocks(model).values()):
                wide = {parameter for module in beside_linears(block) for parameter in module.parameters()}
                for parameter in block.parameters():
                    if parameter not in wide:
                        parameter.data = parameter.data.to(run.compute)
        model.train()
        return [_saved_by_forward(model, micro_batch, seq_len, run.compute) for micro_batch, seq_len in sizes]


def _parametrize_(model: PreTrainedModel, run: PlannedRun) -> None:
    if run.scale_groups:
        add_weight_scaling(model, run.scale_groups, pattern=run.pattern)
    if run.weight_bits:
        add_weight_rounding(model, run.weight_bits, FORMATS[f"int{run.weight_bits}"].group)
        fit_rounding_(model, keep_scales=True)


def _saved_by_forward(model: PreTrainedModel, micro_batch: int, seq_len: int, compute: torch.dtype) -> int:
    storages: dict[StorageWeakRef, Tensor] = {}  # kept alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storages[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    input_ids = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
    autocast = torch.autocast("cpu", compute, enabled=compute is not torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        backbone(model)(input_ids=input_ids, use_cache=False)
    for param in model.parameters():
        storages.pop(StorageWeakRef(param.untyped_storage()), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@contextlib.contextmanager
def as_config_error(config: PretrainedConfig) -> Iterator[None]:
    """Turns the error of a config that transformers cannot build into one line, without torch's traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # families fail with errors of any type
        raise InputError(
            f"a {config.model_type} causal LM cannot be built from this config: {one_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)


GIB = 2**30
WORLD_SIZES = tuple(2**i for i in range(13))
CONTEXT_GIB, FRAGMENTATION = 1.0, 0.05
"""Reserve on a card: the memory of CUDA and NCCL, and the share of the peak that the allocator loses."""
MALLOC, KEPT = 0.07, 2**27
"""Freed memory that malloc keeps on a CPU: a share of the peak, and a number of bytes (docs/how-to/plan.md has
figures)."""

OPENED_LATER = 100 * 2**20
"""Bytes that a run on a CPU takes for what it opens later: tokenizer, logs, report, and pages of the result's files."""


_STEPS = ("evaluate", "loss", "backward", "step")
"""The phases between the start and the finish."""


class _Sizes(NamedTuple):
    """Numbers of elements of a model's parameters, counted on the meta device."""

    total: int
    sparse: int
    block: int
    """Parameters of one transformer block, on average."""
    largest: int
    largest_sparse: int
    largest_solved: int
    """Weights that a one-shot solver holds at once: one layer or one expert."""
    widest: int
    """Largest input or output width of a sparse layer."""
    widest_input: int
    hidden: int
    vocab: int
    num_layers: int
    inputs: int
    """Sum of the squared input widths of a block's sparse layers."""
    moments: int
    """Bytes of both moments of all parameters, with the scales of 8-bit moments."""
    is_tied: bool
    """Whether the output head is the embeddings."""
    kinds: tuple[Hashable, ...]
    """A key for each transformer block; see `block_kinds`."""

    @property
    def outside(self) -> int:
        """Parameters outside the transformer blocks."""
        return self.total - self.block * self.num_layers


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each rank. `components` are not all allocated at once; each of `phases` adds up those that are."""

    components: dict[str, int]
    phases: dict[str, int]
    """Peak bytes of each phase, in a run `start` (which prunes one-shot), `evaluate`, `loss`, `backward` and `step`
    (with `--step-in-backward` a part of `backward`); on a CPU also `save` (a step while a checkpoint is written) and
    `finish`."""
    num_params: int
    num_sparse: int
    world_size: int = 1
    gpu_gib: float | None = None
    smallest_world_size: int | None = None
    """The smallest power of two of ranks that fits `gpu_gib`; None if 4,096 do not fit, or without `gpu_gib`."""
    most_ranks: int = WORLD_SIZES[-1]
    """The number of ranks up to which a smallest one was looked for."""
    remedy: str = ""
    """The largest phase of a plan that does not fit, and what makes it smaller; on the most ranks, if none fit."""
    disk: int = 0
    """Bytes of the hidden states on disk, of `castlm prune`."""
    host: int = 0
    """Bytes of moments in host memory, with `--moments-on-host`."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def needed_gib(self) -> float:
        """GiB that a card needs for this peak, with the reserve for context and fragmentation."""
        return self.peak / GIB * (1 + FRAGMENTATION) + CONTEXT_GIB

    @property
    def fits(self) -> bool | None:
        """Whether the plan fits `gpu_gib`; None if that was not given."""
        return None if self.gpu_gib is None else self.needed_gib <= self.gpu_gib

    def table(self) -> str:
        """Components, phases and peak as text, with the answer for `gpu_gib` in the last line."""
        rows = [*self.components.items(), *((f"phase: {name}", size) for name, size in self.phases.items())]
        rows += [("peak", self.peak)] + ([("hidden states on disk", self.disk)] if self.disk else [])
        rows += [("moments on the host", self.host)] if self.host else []
        lines = aligned([(name, f"{size / GIB:.3f} GiB") for name, size in rows])
        if self.gpu_gib is not None:
            verdict = "fits" if self.fits else "does not fit"
            least = f"the smallest number of ranks that fits is {self.smallest_world_size}"
            if self.smallest_world_size is None:
                least = f"it fits on no number of ranks up to {self.most_ranks}"
            least += f"; {self.remedy}" if self.remedy else ""
            lines.append(
                f"{verdict} {self.gpu_gib:g} GiB on {self.world_size} rank(s): {self.needed_gib:.1f} GiB with "
                f"context and fragmentation; {least}"
            )
        return "\n".join(lines)


def plan_memory(
    config: PretrainedConfig | str | Path,
    run: PlannedRun,
    *,
    teacher: PretrainedConfig | str | Path | None = None,
    world_size: int = 1,
    gpu_gib: float | None = None,
) -> MemoryPlan:
    """Memory of each of `world_size` ranks that shard everything (FSDP2), in steps of micro_batch x seq_len tokens.

    `_components` has the formula of each component, `_phases` what is there at once: in the `start` (before step 0; on
    several ranks block by block, as of a model without images whose weights are read one by one), in `evaluate` (with a
    copy of the masked weights), in the `loss` (all activations, and the loss), `backward` (activations shrink while
    gradients grow, so the larger of its two ends, plus what flows inside a block) and `step`; on a CPU also in `save`
    and `finish`.

    Args:
        config: a HF config, the path of a `config.json` or of a folder with one.
        teacher: the config of a teacher other than the model itself, as `config`.
        gpu_gib: memory of a card in GiB, to check whether the run fits. The plan is then of the card's memory, without
            the bytes that the start holds on the host.

    Raises:
        InputError: an unreadable config, not a causal LM, or no layer that can be n:m sparse.
    """
    config = read_config(config)
    if run.steps_in_backward and world_size > 1:
        raise InputError(f"step_in_backward is for one rank, not for world_size {world_size}: omit one of them")
    sizes = _sizes(config, run)
    plain = replace(run, scale_groups=0, weight_bits=None)  # a teacher has neither scales nor rounding
    tutor = sizes if teacher is None and plain == run else _sizes(read_config(teacher or config), plain)
    sharded_or_not = {world_size > 1} if gpu_gib is None else {False, True}
    saved = {sharded: trace(config, run, sharded, sizes.kinds) for sharded in sharded_or_not}

    def plan(ranks: int) -> MemoryPlan:
        parts = _components(sizes, tutor, saved[ranks > 1], run, ranks)
        phases = _phases(parts, sizes, saved[ranks > 1], run, ranks)
        if run.calibration_tokens:
            # One rank has a copy of the model beside it, and of what is not sparse, in the new basis; of several, each
            # has one block, and the outputs of its attention for an eighth of the text or more.
            held, tokens = sizes.block, run.calibration_tokens // min(PARTS, ranks)
            if ranks == 1:
                held = sizes.total if gpu_gib is not None else 3 * sizes.total - sizes.sparse
            # A matrix (in, in) for each sparse layer of a block, four of the widest, five copies of the largest weight.
            work = sizes.inputs + 4 * sizes.widest_input**2 + 5 * sizes.largest_solved
            phases["start"] = 4 * (held + tokens * sizes.hidden + work)
        if run.on_cpu:
            parts["process"] = resident_memory() + OPENED_LATER + KEPT
            phases = {name: parts["process"] + int(size * (1 + MALLOC)) for name, size in phases.items()}
            if run.saves_in_background:
                written = parts["weights"] + parts["moments"] + parts["masks"]
                phases["save"] = max(phases[name] for name in _STEPS if name in phases) + written
        host = sizes.moments if run.moments_on_host else 0
        return MemoryPlan(
            parts, phases, sizes.total, sizes.sparse, ranks, gpu_gib, most_ranks=sizes_of_world[-1], host=host
        )

    sizes_of_world = WORLD_SIZES[: 1 if run.steps_in_backward else None]
    least = None if gpu_gib is None else next((ranks for ranks in sizes_of_world if plan(ranks).fits), None)
    found = plan(world_size)
    if found.fits is False:
        found = replace(found, remedy=_remedy(plan(sizes_of_world[-1]) if least is None else found, run))
    return replace(found, smallest_world_size=least)


def _remedy(plan: MemoryPlan, run: PlannedRun) -> str:
    """The largest phase of `plan`, and the options that make it smaller."""
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    shorter = "a smaller --per-device-train-batch-size or --seq-len"
    remedies = {
        "start": "prune beforehand with castlm prune --memory block, and pass its folder as --init-from",
        "evaluate": shorter,
        "loss": shorter if run.checkpointing else f"use --gradient-checkpointing, or {shorter}",
        "step": "use more ranks" if run.moments == "8bit" else "use --moments 8bit, or more ranks",
    }
    remedies["backward"] = remedies["loss"]
    if plan.world_size == 1 and not run.accumulates and not run.moments_on_host:
        more = "--moments-on-host" if run.steps_in_backward else "--step-in-backward"
        for name in ("evaluate", "backward", "step"):
            remedies[name] += f", or {more}"
    ranks = f"{plan.world_size} rank(s)"
    return f"its largest phase is {phase}, {plan.phases[phase] / GIB:.1f} GiB on {ranks}: {remedies[phase]}"


def read_config(config: PretrainedConfig | str | Path) -> PretrainedConfig:
    """Returns the config itself, or reads it from a JSON file or a model, whose weights are not needed.

    Raises `InputError` if there is no such file, or for a family that transformers does not know.
    """
    if isinstance(config, PretrainedConfig):
        return config
    path = user_path(config)
    if path.suffix != ".json":
        return open_config(config)
    made: PretrainedConfig = AutoConfig.for_model(**read_json_object(path))
    check_num_layers(made, path)
    check_no_kernels(made, path)
    return made


def _masked_share(pattern: Pattern) -> float:
    """The largest share of the sparse weights that is masked."""
    return 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 1.0


def _components(sizes: _Sizes, tutor: _Sizes, saved: Saved, run: PlannedRun, world_size: int) -> dict[str, int]:
    """Bytes of each component on a rank."""
    sharded, c = world_size > 1, run.compute.itemsize
    t = 0 if run.teacher is None or run.cached else run.teacher.itemsize
    residual = 4  # in autocast too: only the inputs of linear layers are cast
    narrow = c if c < 4 else 0  # of a copy that is not made in fp32
    head, states = sizes.vocab * sizes.hidden, run.tokens * sizes.hidden

    def shard(size: int) -> int:
        return -(-size // world_size)

    # the embeddings, or a block, beside which the moments of the next one are fetched
    with_gradient = max(sizes.block, sizes.largest) if run.steps_in_backward else sizes.total
    with_moments = max(2 * sizes.block, sizes.largest) if run.moments_on_host else sizes.total

    # Two blocks in the compute type, and the same of the teacher, in its own. What is outside the blocks, but of heads
    # that are not the embeddings only the heads, which are whole in the loss and as large.
    gathered = 2 * c * sizes.block + 2 * t * tutor.block
    for each, size, of_head in ((sizes, 4, c), (tutor, t, t)):
        matrix = each.vocab * each.hidden
        gathered += size * each.outside if each.is_tied else size * (each.outside - 2 * matrix) + of_head * matrix
    # a checkpoint drops products W * A, rounded weights and autocast's copies with the activations
    layers_kept = 1 if run.checkpointing else sizes.num_layers
    return {
        "weights": shard(4 * sizes.total),
        "gradients": shard(4 * with_gradient),
        "moments": shard(int(sizes.moments * with_moments / sizes.total)),
        "masks": shard(sizes.sparse // 4),  # the current and the first, in bits
        # while the model is evaluated as if it were pruned now: a copy of them, and the masks as bytes
        "masked weights": shard(
            sizes.sparse + (0 if run.moments_on_host else int(4 * sizes.sparse * _masked_share(run.pattern)))
        ),
        "teacher": shard(t * tutor.total),
        # In fp32 a LLaMA block of inner size I, with as many key as query heads, saves 4T (10H + 4I): input, normalised
        # input and output of both norms; q, k, v and the attention's output; gate, its silu, up and their product.
        # Under bf16 autocast it is T (34H + 8I): norms and residual path stay fp32, and each linear layer keeps a bf16
        # copy of its own input.
        "activations": sizes.num_layers * saved.block + saved.rest,
        "activations, checkpointed": sizes.num_layers * states * residual + saved.block + saved.rest,
        # W * A of weight scaling, rounded weights, or the bf16 copies that autocast makes of fp32 weights on one rank
        "weights kept for backward": layers_kept * saved.block_weights,
        "teacher's hidden states": run.hidden_states * sizes.num_layers * states * t,
        "gathered weights": sharded * gathered,
        # of one block, and its copy in which it is summed; on CPUs also as the other ranks have it
        "gathered gradients": sharded * sizes.block * (c + 4 + 4 * run.on_cpu),
        # 3 buffers in fp32 (1 without a teacher), and one in the compute type
        "logits": min(run.chunk_tokens, run.tokens) * sizes.vocab * ((12 if run.teacher else 4) + narrow),
        # the gradients of the head and of the hidden states, and copies of both in the compute type
        "head's gradient and copies": head * (4 + 2 * narrow) + states * (residual + (c if t else 0) + 2 * narrow),
        # The step is fused; with 8-bit moments torch.compile makes two fp32 copies of the largest parameter (C++ none).
        "optimizer step": shard(8 * sizes.largest) if run.moments == "8bit" else 0,
    }


def _phases(parts: dict[str, int], sizes: _Sizes, saved: Saved, run: PlannedRun, world_size: int) -> dict[str, int]:
    """Bytes of each phase, without the start; on a CPU without the process."""
    static = sum(parts[name] for name in ("weights", "masks", "teacher", "gathered weights"))
    static += 0 if run.moments_on_host else parts["moments"]
    earlier = parts["gradients"] if run.accumulates else 0
    block = saved.block + saved.block_weights
    activations = parts["activations, checkpointed" if run.checkpointing else "activations"]
    activations += parts["teacher's hidden states"]
    first = activations + parts["weights kept for backward"]  # the last block's backward pass, with all activations
    at_work = saved.block + saved.block_weights  # freed after a checkpointed block
    forward = first - at_work if run.checkpointing else first
    last = saved.rest + block + parts["gradients"] - earlier  # the backward pass of the first block, with all gradients
    head_gradient = 4 * sizes.vocab * sizes.hidden
    if sizes.is_tied:  # the gradient of the embeddings is there twice, as that of the head too, and then their sum
        last += 2 * head_gradient
    if run.steps_in_backward:  # of a block at work, or of the embeddings at the end
        first += 4 * sizes.block
    flowing = 4 * run.tokens * sizes.widest * run.compute.itemsize + 8 * sizes.largest_sparse
    phases = {
        "evaluate": static + parts["masked weights"] + 2 * saved.block + parts["logits"] + head_gradient // 2,
        "loss": static + earlier + forward + parts["logits"] + parts["head's gradient and copies"],
        "backward": static + earlier + max(first + head_gradient, last) + flowing + parts["gathered gradients"],
        "step": static - parts["gathered weights"] + parts["gradients"] + parts["optimizer step"],
    }
    if run.steps_in_backward:
        phases["backward"] += parts["optimizer step"] + (parts["moments"] if run.moments_on_host else 0)
        del phases["step"]
    if run.on_cpu:  # the result, and the same read back: a file in the page cache, and the model of it
        result = 4 * sizes.total // world_size
        phases["finish"] = 3 * result + parts["gathered weights"] + parts["logits"] + head_gradient // 2
    return phases


def _sizes(config: PretrainedConfig, run: PlannedRun) -> _Sizes:
    if is_vision_language(config):
        raise InputError(
            f"the memory of a {config.model_type} is not planned: give the config of its language model, which is what "
            "is trained, and add the tower's weights"
        )
    model = shape_model(config)
    check_export(model, run.pattern)
    layers, _ = sparse_linears(model, run.pattern)
    _parametrize_(model, run)
    num_layers = config.get_text_config().num_hidden_layers
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if in_block(name))
    sparse = [num_weights(layer) for layer in layers.values()]
    vocab, hidden = cast("Tensor", model.get_input_embeddings().weight).shape
    inputs = sum(num_weights(layer) // layer.out_features * layer.in_features for layer in layers.values())
    return _Sizes(
        total=sum(p.numel() for p in model.parameters()),
        sparse=sum(sparse),
        block=in_blocks // num_layers,
        largest=max(p.numel() for p in model.parameters()),
        largest_sparse=max(sparse),
        largest_solved=max(layer.out_features * layer.in_features for layer in layers.values()),
        widest=max(max(layer.out_features, layer.in_features) for layer in layers.values()),
        widest_input=max(layer.in_features for layer in layers.values()),
        hidden=hidden,
        vocab=vocab,
        num_layers=num_layers,
        inputs=inputs // num_layers,
        is_tied=bool(config.get_text_config().tie_word_embeddings),
        kinds=block_kinds(model, num_layers),
        moments=sum(state.nbytes for p in model.parameters() for state in new_moments(p, run.moments).values()),
    )
