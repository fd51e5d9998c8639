"""Student and teacher as one module whose forward pass returns the loss.

They are one module because FSDP gathers tied embeddings, which are the output head too, only during its root's forward
pass, and the loss needs the head.
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

from castlm.core.blocks import is_tower
from castlm.core.distill import OutputHead, TopTokens, distillation_loss, top_tokens
from castlm.core.errors import InputError
from castlm.core.hidden import hidden_distance
from castlm.core.sparsify import transformer_blocks
from castlm.data.packing import DocumentOffsets, document_mask, document_offsets
from castlm.distributed.loading import Checkpoint, load_rows_, materialize_
from castlm.distributed.sharding import gathered, is_sharded, reshard_, shard_
from castlm.distributed.world import World
from castlm.hardware import autocast
from castlm.models.architecture import backbone, check_head, output_head
from castlm.training.attention import can_lay_end_to_end, of_documents, use_attention_
from castlm.training.teacher_cache import TeacherCache


class TrainingLoss(NamedTuple):
    """The loss of a batch and its parts, 0-dimensional. Only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    hidden: Tensor
    """Distance of the hidden states to the teacher's, without its weight."""


class _Output(NamedTuple):
    """The output of a model for a batch."""

    states: Tensor
    """(batch, seq, hidden), after the final norm."""
    stream: list[Tensor]
    """The residual stream after each transformer block, (batch, seq, hidden); empty if not compared."""


class Objective(nn.Module):
    """`forward(input_ids, labels, num_tokens)` returns the distillation loss of a batch (batch, seq), labels shifted.

    `(1 - eta) CE + eta T^2 KL + hidden_weight D`, with D the `hidden_distance` after all transformer blocks. Tokens
    with the label -100 count in none of the three. Further tensors go to the forward passes of student and teacher.

    Args:
        teacher: frozen, in eval mode, with a vocabulary at least as large as the student's. None without distillation
            (`eta` is 0), or if `cache` holds all sequences.
        top_k: distill from the teacher's `top_k` most probable tokens; 0 uses the full distribution.
        cache: stores these tokens.
        apart: the documents of a training sequence do not attend to each other; each begins where `position_ids` are 0.
        hidden_weight: weight of the distance between the hidden states of student and teacher; 0 compares none.
        own_attention: let the models attend by castlm's attention function where they can (`use_attention_`). It is for
            models without compiled blocks.

    The buffer `stream_basis` is the rotation (hidden, hidden) that brings the teacher's residual stream into the basis
    of the student's, multiplied from the right; None if both have the same basis.
    """

    stream_basis: Tensor | None

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        eta: float,
        temperature: float,
        top_k: int = 0,
        cache: TeacherCache | None = None,
        apart: bool = False,
        hidden_weight: float = 0.0,
        own_attention: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eta, self.temperature, self.top_k, self.cache = eta, temperature, top_k, cache
        self.apart, self.explicit_mask, self.end_to_end = apart, False, False
        self.hidden_weight = hidden_weight
        if own_attention:
            for model in self._models():
                use_attention_(model)
        self.register_buffer("stream_basis", None, persistent=False)
        self._kept: list[Tensor] | None = None
        for model in (student, teacher) if hidden_weight else ():
            if model is not None:
                for name, block in transformer_blocks(backbone(model)).items():
                    if not is_tower(name):
                        block.register_forward_hook(self._keep)

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
        if ce_only or not self.apart:
            position_ids = documents = None
        inputs = self._inputs(input_ids, position_ids, documents) | extra
        settings = {"eta": self.eta, "temperature": self.temperature, "num_tokens": num_tokens}
        compares_hidden = self.hidden_weight > 0 and not ce_only
        ours = self._output(self.student, inputs, compares_hidden)
        if ce_only or self.eta == 0:
            with _head_of(self.student) as head:
                loss = distillation_loss(ours.states, head, labels, eta=0.0, num_tokens=num_tokens)
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        if self.top_k:
            found, theirs = self._top_tokens(inputs, position_ids, compares_hidden)
            with _head_of(self.student) as head:
                loss = distillation_loss(ours.states, head, labels, teacher_top=found, **settings)
        else:
            theirs = self._teacher_output(inputs, compares_hidden)
            with _head_of(self.student) as head, self._teacher_head() as their_head:
                loss = distillation_loss(ours.states, head, labels, theirs.states, their_head, **settings)
        if not compares_hidden:
            return TrainingLoss(*loss, torch.zeros_like(loss.ce))
        assert theirs is not None  # a cache, which holds no hidden states, is not used with a hidden_weight
        basis = self.stream_basis
        targets = [states if basis is None else states @ basis.to(states.dtype) for states in theirs.stream]
        hidden = hidden_distance(ours.stream, targets, labels, num_tokens=num_tokens)
        # Eq. 13, plus the distance of hidden states (ours)
        return TrainingLoss(loss.loss + self.hidden_weight * hidden, loss.ce, loss.kl, hidden.detach())

    def on_device(self, batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` for a batch on the CPU.

        The offsets of its documents are counted before it leaves the CPU, so that nothing waits for a GPU to answer.
        """
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
        if self.end_to_end and "position_ids" in batch:
            moved["documents"] = document_offsets(batch["position_ids"])
        return moved

    def _models(self) -> list[PreTrainedModel]:
        return [model for model in (self.student, self.teacher) if model is not None]

    def _inputs(
        self, input_ids: Tensor, position_ids: Tensor | None, documents: DocumentOffsets | None = None
    ) -> dict[str, Any]:
        """The arguments of a forward pass in which the documents of a sequence do not attend to each other."""
        if position_ids is None:
            return {"input_ids": input_ids}
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if documents is not None:
            return inputs | of_documents(documents, input_ids.device)
        return inputs | ({"attention_mask": document_mask(position_ids)} if self.explicit_mask else {})

    @torch.no_grad()
    def check_documents_apart(self) -> None:
        """Finds out whether position ids are enough to keep the student's documents apart, or a mask is needed.

        It runs the student: a change of the first document must not change the hidden states of the second. Raises
        `InputError` if neither keeps them apart. On a GPU their offsets take the place of both, if student and teacher
        then compute the same.
        """
        if not self.apart:
            return
        if self._are_documents_apart():
            self.end_to_end = self._device().type == "cuda" and self.agrees_end_to_end()
            return
        has_window = getattr(self.student.config.get_text_config(), "sliding_window", None) is not None
        if not has_window:  # an explicit mask would replace the window's
            self.explicit_mask = True
            if self._are_documents_apart():
                return
        raise InputError(
            f"{type(self.student).__name__} cannot keep the documents of a sequence apart: set cross_document_attention"
        )

    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    def _two_documents(self) -> tuple[Tensor, Tensor]:
        """Token ids and positions (2, 11) of two documents, of which the first, 5 tokens, differs between the rows."""
        vocab = self.student.get_input_embeddings().weight.shape[0]
        words = torch.arange(min(vocab, 32), device=self._device())
        first = torch.stack([words[:1].expand(5), words[1:6]])
        second = words[6:12].expand(2, -1)
        starts = [torch.arange(part.shape[1], device=self._device()) for part in (first, second)]
        return torch.cat([first, second], dim=1), torch.cat(starts).expand(2, -1)

    @torch.no_grad()
    def agrees_end_to_end(self) -> bool:
        """Whether the models compute the same by `of_documents` as by positions, up to the rounding of bf16."""
        if not all(map(can_lay_end_to_end, self._models())):
            return False
        input_ids, positions = self._two_documents()
        documents = document_offsets(positions.cpu())
        try:
            for model in self._models():
                expected, found = (
                    backbone(model)(**inputs, use_cache=False).last_hidden_state.float()
                    for inputs in (self._inputs(input_ids, positions), self._inputs(input_ids, positions, documents))
                )
                if not (found - expected).abs().max() <= 0.05 * expected.abs().max():
                    return False
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # no such arguments, or no kernel for the dtype or the head's size
            return False
        return True

    def _are_documents_apart(self) -> bool:
        input_ids, positions = self._two_documents()

        def influence(inputs: dict[str, Tensor]) -> float:
            """The largest change of the second document's hidden states by the first document."""
            states = backbone(self.student)(**inputs, use_cache=False).last_hidden_state[:, 5:].float()
            return float((states[0] - states[1]).abs().max())

        try:
            # Not exactly 0: experts and low precision may round a little differently, far below a real influence.
            return influence(self._inputs(input_ids, positions)) <= 0.01 * influence({"input_ids": input_ids})
        except (TypeError, ValueError, RuntimeError):  # the model takes no position ids, or no such mask
            return False

    def _output(self, model: PreTrainedModel, inputs: dict[str, Tensor], stream: bool) -> _Output:
        self._kept = [] if stream else None
        states = backbone(model)(**inputs, use_cache=False).last_hidden_state
        kept, self._kept = self._kept, None  # blocks that checkpointing runs again in the backward pass add nothing
        return _Output(states, kept or [])

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        """A hook after the forward pass of each transformer block."""
        if self._kept is not None:
            self._kept.append(output if isinstance(output, Tensor) else output[0])

    @torch.no_grad()
    def _teacher_output(self, inputs: dict[str, Tensor], stream: bool) -> _Output:
        assert self.teacher is not None
        return self._output(self.teacher, inputs, stream)

    @contextmanager
    def _teacher_head(self) -> Iterator[OutputHead]:
        """The teacher's head on the student's vocabulary: families pad larger models to more rows of no token."""
        assert self.teacher is not None
        rows = len(self.student.get_input_embeddings().weight)
        with _head_of(self.teacher) as head:
            yield head._replace(weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])

    def fill_cache(self, input_ids: Tensor, position_ids: Tensor | None) -> None:
        """Lets the teacher read a batch (batch, seq), unless the cache holds all of it."""
        position_ids = position_ids if self.apart else None
        self._top_tokens(self._inputs(input_ids, position_ids), position_ids, stream=False)

    def _top_tokens(
        self, inputs: dict[str, Tensor], position_ids: Tensor | None, stream: bool
    ) -> tuple[TopTokens, _Output | None]:
        """The teacher's most probable tokens, and its output if it was run."""
        input_ids = inputs["input_ids"]
        found = self.cache.get(input_ids, position_ids) if self.cache is not None else None
        if found is not None:
            return found, None
        output = self._teacher_output(inputs, stream)
        with self._teacher_head() as head:
            top = top_tokens(output.states, head, self.top_k, self.temperature)
        if self.cache is not None:
            self.cache.put(input_ids, top, position_ids)
        return top, output

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
        check_head(self.student, _head_of(self.student))


@contextmanager
def _head_of(model: PreTrainedModel) -> Iterator[OutputHead]:
    """The head of a model, with its whole weight if it is sharded by itself."""
    with gathered(model.get_output_embeddings()):
        yield output_head(model)


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
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


@contextmanager
def pruned(masks: dict[Tensor, Tensor]) -> Iterator[None]:
    """Sets masked weights to zero inside the context, and restores them bit for bit; holds a copy of them.

    Args:
        masks: this rank's part of each sparse weight with its mask, True = kept.
    """
    with torch.no_grad():
        held = []
        for weight, mask in masks.items():
            held.append((weight, ~mask, weight[~mask]))
            weight[~mask] = 0.0
        try:
            yield
        finally:
            for weight, out, values in held:
                weight[out] = values
