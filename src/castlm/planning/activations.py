"""Counts the bytes that autograd saves in a forward pass, by running blocks of the real model on fake tensors.

A formula would hold for one model family alone. Fake tensors have shapes but no storage, so nothing is computed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.core.scaling import add_weight_scaling
from castlm.core.sparsify import transformer_blocks
from castlm.distributed.sharding import beside_linears, is_gathered_narrow
from castlm.models.architecture import backbone, linearize_

# HF writes out a causal mask for fake tensors, where a run has none; for an attention of its own it leaves that alone.
_ATTENTION = "castlm_causal_sdpa"

# Fake tensors do not show how many tokens each expert gets; together the experts get `top_k` per token.
_EXPERTS = "castlm_experts_together"


def _experts_together(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The tensors that transformers' `grouped_mm` saves: every token goes through as many experts as it takes."""
    flip = experts.is_transposed
    tokens = hidden[index.flatten() // index.shape[-1]]
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    out = tokens @ (up[0] if flip else up[0].mT)
    out = experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    out = out @ (experts.down_proj[0] if flip else experts.down_proj[0].mT)
    out = (out * weights.flatten()[:, None])[index.flatten()]
    summed: Tensor = out.view(*index.shape, -1).sum(dim=1).to(hidden.dtype)
    return summed


@dataclass(frozen=True)
class Settings:
    """The settings of a training run that its memory depends on, except the number of ranks."""

    seq_len: int
    micro_batch: int
    """Sequences of a forward pass, on each rank."""
    pattern: Pattern = field(default=NM(2, 4))
    scale_groups: int = 2
    accumulates: bool = False
    """Whether a step has several micro-steps, so that gradients are there throughout."""
    checkpointing: bool = False
    compute: torch.dtype = torch.bfloat16
    """Type of the forward and backward pass; master weights are fp32."""
    teacher: torch.dtype | None = torch.bfloat16
    """Type of the teacher; None without one."""
    hidden_states: bool = True
    """Whether the teacher's hidden states are distilled; no effect without a teacher."""
    chunk_tokens: int = 1024
    """Tokens whose logits are in memory at once (default of the loss: 1,024 on a GPU, 192 on a CPU)."""
    moments: str = "fp32"
    """"fp32" or "8bit", as `AdamS` has them."""
    calibration_tokens: int = 0
    """Tokens of calibration text of the start (SparseGPT or Wanda); 0 if it reads none: then no phase `start`."""
    fused: bool = True
    """Whether the optimizer step is fused."""

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


def trace(config: PretrainedConfig, run: Settings, sharded: bool, kinds: Sequence[Hashable] = ("all",)) -> Saved:
    """Saved bytes, from the differences between some blocks and one more, and between two small numbers of tokens.

    Args:
        kinds: `block_kinds` of the model.
    """
    sizes = [(run.micro_batch, run.seq_len), (1, 16), (1, 32)]
    first = functools.cache(lambda number: saved_bytes(config, number, sizes, run, sharded))
    of_kind = {}
    for kind in set(kinds):
        later = [
            *kinds,
            kinds[-1],
        ]  # not the first block if another is like it: its trace includes layers around the blocks
        index = next((i for i, other in enumerate(later) if i and other == kind), 0)
        of_kind[kind] = [more - less for less, more in zip(first(index), first(index + 1))]
    block, of_16, of_32 = (sum(of_kind[kind][size] for kind in kinds) // len(kinds) for size in range(len(sizes)))
    weights = 2 * of_16 - of_32  # saved = weights + tokens * x
    return Saved(block - weights, weights, first(1)[0] - of_kind[kinds[0]][0])


def saved_bytes(
    config: PretrainedConfig, num_layers: int, sizes: Sequence[tuple[int, int]], run: Settings, sharded: bool
) -> list[int]:
    """Bytes of the storages that autograd saves in a forward pass of `num_layers` blocks, parameters excluded.

    Args:
        sizes: (sequences, tokens per sequence) of each forward pass; returns one number for each.
    """
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_together)
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = num_layers
    with FakeTensorMode(), as_config_error(config):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        attention = _ATTENTION if kind is None or kind._supports_sdpa else "eager"
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=attention
        )
        model.config._experts_implementation = _EXPERTS
        linearize_(model)
        if run.scale_groups:
            add_weight_scaling(model, run.scale_groups, pattern=run.pattern)
        if sharded and run.compute is not torch.float32:
            _narrow_linears_(model, run.compute)
        model.train()
        return [_saved_by_forward(model, micro_batch, seq_len, run.compute) for micro_batch, seq_len in sizes]


def _saved_by_forward(model: PreTrainedModel, micro_batch: int, seq_len: int, compute: torch.dtype) -> int:
    storages: dict[int, Tensor] = {}  # kept alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    input_ids = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
    autocast = torch.autocast("cpu", compute, enabled=compute is not torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        backbone(model)(input_ids=input_ids, use_cache=False)
    for param in model.parameters():
        storages.pop(param.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _narrow_linears_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The blocks' parameters in the types that `castlm.distributed.sharding.shard_` gathers them in."""
    for block in filter(is_gathered_narrow, transformer_blocks(model).values()):
        wide = {parameter for module in beside_linears(block) for parameter in module.parameters()}
        for parameter in block.parameters():
            if parameter not in wide:
                parameter.data = parameter.data.to(dtype)


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
        if isinstance(error, KeyError) and error.args == (_ATTENTION,):
            raise InputError(
                f"the memory of a {config.model_type} is not planned: its attention is chosen in code of its own"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"a {config.model_type} causal LM cannot be built from this config: {reason}") from error
    finally:
        logger.setLevel(level)
