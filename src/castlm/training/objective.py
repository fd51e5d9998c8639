"""Student and teacher as one module whose forward is the loss.

One module, because FSDP gathers the output head only inside its root's forward, and the loss needs the head itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.distill import DistillationLoss, distillation_loss
from castlm.core.head import OutputHead
from castlm.core.top_tokens import TopTokens, top_tokens
from castlm.models import backbone, check_head, output_head
from castlm.training.teacher_cache import TeacherCache


class Objective(nn.Module):
    """`forward(input_ids, labels, num_tokens)` -> the distillation loss of a batch (batch, seq), labels shifted.

    Args:
        teacher: frozen, in eval mode; None where `eta` is 0, or `cache` holds all that is asked for.
        top_k: teach by the teacher's so many most probable tokens and the rest as one; 0: by its whole distribution.
        cache: keeps them.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        eta: float,
        temperature: float,
        top_k: int = 0,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eta, self.temperature, self.top_k, self.cache = eta, temperature, top_k, cache

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_tokens: int | Tensor, ce_only: bool = False
    ) -> DistillationLoss:
        hidden = backbone(self.student)(input_ids=input_ids, use_cache=False).last_hidden_state
        head = output_head(self.student)
        if ce_only or self.eta == 0:
            return distillation_loss(hidden, head, labels, eta=0.0, num_tokens=num_tokens)
        settings = {"eta": self.eta, "temperature": self.temperature, "num_tokens": num_tokens}
        if self.top_k:
            return distillation_loss(hidden, head, labels, teacher_top=self._top_tokens(input_ids), **settings)
        return distillation_loss(hidden, head, labels, *self._teach(input_ids), **settings)

    @torch.no_grad()
    def _teach(self, input_ids: Tensor) -> tuple[Tensor, OutputHead]:
        """The teacher's hidden states, and its head."""
        assert self.teacher is not None
        states = backbone(self.teacher)(input_ids=input_ids, use_cache=False).last_hidden_state
        return states, output_head(self.teacher)

    def _top_tokens(self, input_ids: Tensor) -> TopTokens:
        found = self.cache.get(input_ids) if self.cache is not None else None
        if found is not None:
            return found
        top = top_tokens(*self._teach(input_ids), self.top_k, self.temperature)
        if self.cache is not None:
            self.cache.put(input_ids, top)
        return top

    def prove_head(self) -> None:
        """`check_head` of the student, as a forward of this module, in which sharded weights are whole."""
        check_head(self.student)


@torch.no_grad()
def make_teacher(student: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy of the dense model as it is now, its weights in `dtype`; buffers such as rotary frequencies are not
    cast: bf16 has too few bits for them."""
    teacher = copy.deepcopy(student).eval()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(dtype)
    return teacher.requires_grad_(False)


@contextmanager
def pruned(masks: dict[Tensor, Tensor]) -> Iterator[None]:
    """The model as the prune would leave it, for the time of the block; its weights come back bit for bit.

    Args:
        masks: this rank's part of each sparse weight with its mask, True = kept. Half of the weights are held twice.
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
