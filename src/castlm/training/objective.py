"""Student and teacher as one module whose forward pass returns the loss.

They are one module because the loss needs the output head. Tied embeddings are the head too, and FSDP gathers them
only during the forward pass of its root module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from castlm.core.distill import distillation_loss
from castlm.core.hidden import hidden_distance
from castlm.data.packing import DocumentOffsets, document_offsets
from castlm.distributed.loading import Checkpoint, load_rows_, materialize_
from castlm.distributed.sharding import is_sharded, reshard_, shard_
from castlm.distributed.world import World
from castlm.hardware import autocast
from castlm.models.architecture import check_head, embedding_weight
from castlm.training.apart import Way, inputs_of, way_to_keep_apart
from castlm.training.attention import use_attention_
from castlm.training.reader import Reader, Reading
from castlm.training.teacher import Teacher


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
        teacher: None without distillation (`eta` is 0).
        apart: the documents of a training sequence do not attend to each other; each begins where `position_ids` are 0.
        hidden_weight: weight of the distance between the hidden states of student and teacher; 0 compares none.
        own_attention: let the models attend by castlm's attention function where they can (`use_attention_`). It is for
            models without compiled blocks.
    """

    teacher: Teacher | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None,
        eta: float,
        *,
        apart: bool = False,
        hidden_weight: float = 0.0,
        own_attention: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.eta, self.hidden_weight = student, teacher, eta, hidden_weight
        self.way: Way = "positions" if apart else "together"
        """How documents are kept apart; `check_documents_apart` finds out whether it must be another way."""
        self._reader = Reader(student, keeps_stream=hidden_weight > 0)
        if own_attention:
            for model in (student, self.teacher_model):
                if model is not None:
                    use_attention_(model)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The model of the teacher; None without a teacher, or if its cache stands for it."""
        return None if self.teacher is None else self.teacher.model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_tokens: int | Tensor,
        position_ids: Tensor | None = None,
        documents: DocumentOffsets | None = None,
        ce_only: bool = False,
        **extra: Tensor,
    ) -> TrainingLoss:
        way: Way = "together" if ce_only or position_ids is None else self.way
        inputs = inputs_of(input_ids, position_ids, way, documents) | extra
        teacher, compares_hidden = self.teacher, self.hidden_weight > 0 and not ce_only
        ours = self._reader.read(inputs, compares_hidden)
        if ce_only or teacher is None:
            with self._reader.head() as head:
                loss = distillation_loss(ours.states, head, labels, eta=0.0, num_tokens=num_tokens)
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        eta, temperature, vocab = self.eta, teacher.temperature, len(embedding_weight(self.student))
        theirs: Reading | None
        if teacher.top_k:
            top, theirs = teacher.top_tokens(inputs, vocab, compares_hidden)
            with self._reader.head() as head:
                loss = distillation_loss(
                    ours.states,
                    head,
                    labels,
                    teacher_top=top,
                    eta=eta,
                    temperature=temperature,
                    num_tokens=num_tokens,
                )
        else:
            theirs = teacher.read(inputs, compares_hidden)
            with self._reader.head() as head, teacher.head(vocab) as their_head:
                loss = distillation_loss(
                    ours.states,
                    head,
                    labels,
                    theirs.states,
                    their_head,
                    eta=eta,
                    temperature=temperature,
                    num_tokens=num_tokens,
                )
        if not compares_hidden:
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        assert theirs is not None  # a cache, which holds no hidden states, is not used with a hidden_weight
        hidden = hidden_distance(ours.stream, theirs.stream, labels, num_tokens=num_tokens)
        # Eq. 13, plus the distance of hidden states (ours)
        return TrainingLoss(loss.loss + self.hidden_weight * hidden, loss.ce, loss.kl, hidden.detach())

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
            self.way = way_to_keep_apart(self.student, self.teacher_model)

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


def shard_objective_(
    objective: Objective,
    stored: Checkpoint | None,
    teacher_stored: Checkpoint | None,
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
    for model, places in ((objective.student, stored), (objective.teacher_model, teacher_stored)):
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
