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
from castlm.models import backbone, check_head, output_head


class Objective(nn.Module):
    """`forward(input_ids, labels, num_tokens)` -> the distillation loss of a batch (batch, seq), labels shifted.

    Args:
        teacher: frozen, in eval mode; None where `eta` is 0.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, eta: float, temperature: float
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eta, self.temperature = eta, temperature

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_tokens: int | Tensor, ce_only: bool = False
    ) -> DistillationLoss:
        hidden = backbone(self.student)(input_ids=input_ids, use_cache=False).last_hidden_state
        head = output_head(self.student)
        if ce_only or self.teacher is None:
            return distillation_loss(hidden, head, labels, eta=0.0, num_tokens=num_tokens)
        with torch.no_grad():
            taught = backbone(self.teacher)(input_ids=input_ids, use_cache=False).last_hidden_state
        return distillation_loss(
            hidden,
            head,
            labels,
            taught,
            output_head(self.teacher),
            eta=self.eta,
            temperature=self.temperature,
            num_tokens=num_tokens,
        )

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
