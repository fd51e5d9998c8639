"""Student and teacher as one module whose forward pass returns the loss.

They are one module because the loss needs the output head. Tied embeddings are the head too, and FSDP gathers them
only during the forward pass of its root module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from castlm.core.blocks import is_tower
from castlm.core.distill import OutputHead, TopTokens, distillation_loss, hidden_distance, top_tokens
from castlm.core.sparsify import transformer_blocks
from castlm.data.packing import DocumentOffsets, document_offsets
from castlm.distributed.sharding import free_blocks_, gathered, is_sharded, reshard_, shard_
from castlm.hardware import autocast
from castlm.models.architecture import backbone, check_head, embedding_weight, output_head
from castlm.models.loading import StoredWeights, load_rows_, materialize_
from castlm.training.attention import Way, inputs_of, use_attention_, way_to_keep_apart
from castlm.training.teacher_cache import TeacherCache
from castlm.world import World


class TrainingLoss(NamedTuple):
    """The loss of a batch and its parts, 0-dimensional. Only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    hidden: Tensor
    """Distance of the hidden states to the teacher's, without its weight."""


class Objective(nn.Module):
    """`forward(input_ids, labels, num_tokens)` returns the distillation loss of a batch (batch, seq), labels shifted.

    `(1 - eta) CE + eta T^2 KL + hidden_weight D`, with D the `hidden_distance` after all transformer blocks. Tokens
    with the label -100 count in none of the three. Further tensors go to the forward passes of student and teacher.

    Args:
        teacher: a model in eval mode, with a vocabulary at least as large as the student's. None without distillation,
            or if `cache` holds all sequences.
        eta: weight of the KL divergence; 0 distills nothing.
        temperature: divides the logits of both models in the KL divergence.
        top_k: distill from the `top_k` most probable tokens of the teacher; 0 uses the full distribution.
        cache: stores these tokens.
        apart: the documents of a training sequence do not attend to each other; each begins where `position_ids` are 0.
        compares_hidden: whether `forward` may get a `hidden_weight`.
        own_attention: let the models attend by castlm's attention function where they can (`use_attention_`). It is for
            models without compiled blocks.
    """

    teacher: PreTrainedModel | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        eta: float = 0.0,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        cache: TeacherCache | None = None,
        apart: bool = False,
        compares_hidden: bool = False,
        own_attention: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.eta = student, teacher, eta
        self.temperature, self.top_k, self.cache = temperature, top_k, cache
        self.way: Way = "positions" if apart else "together"
        """How documents are kept apart; `check_documents_apart` finds out whether it must be another way."""
        self._reader = _Reader(student, compares_hidden)
        self._teacher_reader = None if teacher is None else _Reader(teacher, compares_hidden)
        if own_attention:
            for model in (student, teacher):
                if model is not None:
                    use_attention_(model)

    def train(self, mode: bool = True) -> Self:
        """Sets the student to training or evaluation; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_tokens: int | Tensor,
        position_ids: Tensor | None = None,
        documents: DocumentOffsets | None = None,
        ce_only: bool = False,
        hidden_weight: float = 0.0,
        **extra: Tensor,
    ) -> TrainingLoss:
        way: Way = "together" if ce_only or position_ids is None else self.way
        inputs = inputs_of(input_ids, position_ids, way, documents) | extra
        distills, compares_hidden = self.eta > 0 and not ce_only, hidden_weight > 0 and not ce_only
        states, stream = self._reader.read(inputs, compares_hidden)
        if not distills:
            with self._reader.head() as head:
                loss = distillation_loss(states, head, labels, eta=0.0, num_tokens=num_tokens)
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        settings: dict[str, Any] = {"eta": self.eta, "temperature": self.temperature, "num_tokens": num_tokens}
        if self.top_k:
            top, their_stream = self.teacher_tokens(inputs, compares_hidden)
            with self._reader.head() as head:
                loss = distillation_loss(states, head, labels, teacher_top=top, **settings)
        else:
            their_states, their_stream = self._read_teacher(inputs, compares_hidden)
            with self._reader.head() as head, self._teacher_head() as their_head:
                loss = distillation_loss(states, head, labels, their_states, their_head, **settings)
        if not compares_hidden:
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        hidden = hidden_distance(stream, their_stream, labels, num_tokens=num_tokens)
        # Eq. 13, plus the distance of hidden states (ours)
        return TrainingLoss(loss.loss + hidden_weight * hidden, loss.ce, loss.kl, hidden.detach())

    def teacher_tokens(self, inputs: dict[str, Any], stream: bool = False) -> tuple[TopTokens, list[Tensor]]:
        """The teacher's most probable tokens for a batch, and its residual stream, which a cache does not hold.

        Args:
            inputs: the arguments of a forward pass; see `castlm.training.attention.inputs_of`.
            stream: also keep the residual stream.
        """
        input_ids, position_ids = inputs["input_ids"], inputs.get("position_ids")  # the key of a sequence in the cache
        cached = self.cache.get(input_ids, position_ids) if self.cache is not None else None
        if cached is not None:
            return cached, []
        states, kept = self._read_teacher(inputs, stream)
        with self._teacher_head() as head:
            top = top_tokens(states, head, self.top_k, self.temperature)
        if self.cache is not None:
            self.cache.put(input_ids, top, position_ids)
        return top, kept

    @torch.no_grad()
    def _read_teacher(self, inputs: dict[str, Any], stream: bool) -> tuple[Tensor, list[Tensor]]:
        assert self._teacher_reader is not None  # only a cache that holds all sequences stands alone
        return self._teacher_reader.read(inputs, stream)

    @contextmanager
    def _teacher_head(self) -> Iterator[OutputHead]:
        """The teacher's head on the student's tokens: families pad larger models to more rows of no token."""
        assert self._teacher_reader is not None
        vocab = len(embedding_weight(self.student))
        with self._teacher_reader.head() as head:
            yield head._replace(weight=head.weight[:vocab], bias=None if head.bias is None else head.bias[:vocab])

    def free_teacher(self) -> None:
        """Frees the memory of the teacher, after the last step."""
        if self.teacher is not None and is_sharded(self):
            free_blocks_(self.teacher)
        self.teacher = self._teacher_reader = None
        self.eta = 0.0

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` for a batch on the CPU.

        The offsets of its documents are counted before it leaves the CPU, so that nothing waits for a GPU to answer.
        """
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
        if self.way == "offsets" and "position_ids" in batch:
            moved["documents"] = document_offsets(batch["position_ids"])
        return moved

    def check_documents_apart(self) -> None:
        """Finds out how to keep documents apart, as a forward method of this module, in which FSDP gathers weights.

        Raises `InputError` if the student cannot keep them apart.
        """
        if self.way != "together":
            self.way = way_to_keep_apart(self.student, self.teacher)

    def trained_parameters(self) -> dict[Tensor, str]:
        """The names of the student's parameters.

        Call it right after sharding: FSDP leaves the root's parameters unsharded after a forward pass, and a later walk
        over the model would find other tensors than the optimizer's.
        """
        names: dict[Tensor, str] = {param: name for name, param in self.student.named_parameters()}
        if is_sharded(self):
            whole = [name for param, name in names.items() if not isinstance(param, DTensor)]
            assert not whole, f"{whole[0]} is not sharded"
        return names

    def check_head(self) -> None:
        """Checks the student's head, as a forward method of this module, in which FSDP gathers the weights."""
        check_head(self.student, self._reader.head())


class _Reader:
    """Runs a model, student or teacher, up to its head.

    Args:
        keeps_stream: whether `read` may be asked for the residual stream.
    """

    def __init__(self, model: PreTrainedModel, keeps_stream: bool) -> None:
        self.model = model
        self._kept: list[Tensor] | None = None
        if keeps_stream:
            for name, block in transformer_blocks(backbone(model)).items():
                if not is_tower(name):
                    block.register_forward_pre_hook(_as_sharded)
                    block.register_forward_hook(self._keep)

    def read(self, inputs: dict[str, Any], stream: bool) -> tuple[Tensor, list[Tensor]]:
        """The output for the arguments of a forward pass, (batch, seq, hidden) after the final norm.

        With it, if `stream`, the residual stream after each transformer block, (batch, seq, hidden) each.
        """
        self._kept = [] if stream else None
        # Without the head, whose logits for 8 x 512 tokens would be 768 MiB: the loss makes them in chunks.
        states = backbone(self.model)(**inputs, use_cache=False).last_hidden_state
        kept, self._kept = self._kept, None  # blocks that checkpointing runs again in the backward pass add nothing
        return states, kept or []

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._kept is not None:
            self._kept.append(output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """The head of the model, with its whole weight if it is sharded by itself."""
        with gathered(self.model.get_output_embeddings()):
            yield output_head(self.model)


# A view: compiled, it would be a graph of its own beside each block's.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_sharded(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a block, of which the residual stream is a tensor of its own.

    Its gradients, from the branches of the block, are added up before the one of the stream that is kept, as FSDP has
    them: three sums in one place would come in another order, and with other bits, in one process.
    """
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


def shard_objective_(
    objective: Objective,
    stored: StoredWeights | None,
    teacher_stored: StoredWeights | None,
    precision: str,
    world: World,
    whole_copies: bool,
) -> None:
    """Moves student and teacher to the device, sharded unless `whole_copies`.

    Args:
        stored: the place of the student's weights, of which each rank reads its rows; None if they are in memory.
        teacher_stored: the same of the teacher.
    """
    # Of models on the meta device there is nothing to move: `materialize_` below allocates this rank's rows.
    if stored is None and teacher_stored is None:
        objective.to(world.device)
    if not whole_copies:
        shard_(objective, world, precision)
    if stored is not None or teacher_stored is not None:
        materialize_(objective, world.device)
    for model, places in ((objective.student, stored), (objective.teacher, teacher_stored)):
        if model is not None and places is not None:
            load_rows_(model, places, world)
    if is_sharded(objective):
        register_fsdp_forward_method(objective, "check_head")
        register_fsdp_forward_method(objective, "check_documents_apart")
    with autocast(world.device, precision):  # weights gathered in bf16 cannot be multiplied with fp32
        if stored is not None:
            objective.check_head()
        objective.check_documents_apart()
    reshard_(objective)  # else the root would keep using these gathered weights after a checkpoint is loaded


def checkpoint_activations_(model: PreTrainedModel) -> None:
    """Recomputes the activations of `model` in the backward pass, to save memory."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


@torch.no_grad()
def as_teacher_(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Freezes `model` and casts its weights to `dtype`; returns it.

    Buffers such as rotary frequencies keep their dtype, because bf16 has too few bits for them.
    """
    for parameter in model.parameters():
        # `model.to(dtype)` would cast the buffers too.
        parameter.data = parameter.data.to(dtype)
    model.eval()
    model.requires_grad_(False)
    return model


@contextmanager
def pruned(masks: dict[Tensor, Tensor], on_host: bool = False) -> Iterator[None]:
    """Sets masked weights to zero inside the context, and restores them bit for bit; holds a copy of them.

    Args:
        masks: this rank's part of each sparse weight with its mask, True = kept.
        on_host: hold the copy in host memory.
    """
    with torch.no_grad():
        held = []
        for weight, mask in masks.items():
            values = weight[~mask]  # the masked half alone, (442368,) of (1536, 576)
            held.append((weight, mask, values.cpu() if on_host else values))
            weight[~mask] = 0.0
        try:
            yield
        finally:
            for weight, mask, values in held:
                weight[~mask] = values.to(weight.device)
