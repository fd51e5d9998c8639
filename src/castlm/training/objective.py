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

from castlm.architecture import backbone, check_head, output_head
from castlm.core.distill import DistillationLoss, distillation_loss
from castlm.core.errors import InputError
from castlm.core.head import OutputHead
from castlm.core.top_tokens import TopTokens, top_tokens
from castlm.data.positions import document_mask
from castlm.training.teacher_cache import TeacherCache


class Objective(nn.Module):
    """`forward(input_ids, labels, num_tokens)` -> the distillation loss of a batch (batch, seq), labels shifted.

    Tokens whose label is -100 count neither in the cross-entropy nor in the KL.

    Args:
        teacher: frozen, in eval mode; None where `eta` is 0, or `cache` holds all that is asked for.
        top_k: distill from the teacher's `top_k` most probable tokens; 0 uses the full distribution.
        cache: keeps them.
        apart: the documents of a training sequence do not attend to each other; `position_ids` then say where each one
            begins.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        eta: float,
        temperature: float,
        top_k: int = 0,
        cache: TeacherCache | None = None,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eta, self.temperature, self.top_k, self.cache = eta, temperature, top_k, cache
        self.apart, self.explicit_mask = apart, False

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_tokens: int | Tensor,
        position_ids: Tensor | None = None,
        ce_only: bool = False,
    ) -> DistillationLoss:
        position_ids = position_ids if self.apart and not ce_only else None
        inputs = self._inputs(input_ids, position_ids)
        hidden = backbone(self.student)(**inputs, use_cache=False).last_hidden_state
        head = output_head(self.student)
        if ce_only or self.eta == 0:
            return distillation_loss(hidden, head, labels, eta=0.0, num_tokens=num_tokens)
        settings = {"eta": self.eta, "temperature": self.temperature, "num_tokens": num_tokens}
        if self.top_k:
            top = self.teacher_top_tokens(input_ids, position_ids)
            return distillation_loss(hidden, head, labels, teacher_top=top, **settings)
        return distillation_loss(hidden, head, labels, *self._teacher_output(input_ids, position_ids), **settings)

    def _inputs(self, input_ids: Tensor, position_ids: Tensor | None) -> dict[str, Tensor]:
        """The arguments of a forward pass in which the documents of a sequence do not attend to each other."""
        if position_ids is None:
            return {"input_ids": input_ids}
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        return inputs | ({"attention_mask": document_mask(position_ids)} if self.explicit_mask else {})

    @torch.no_grad()
    def check_documents_apart(self) -> None:
        """Finds out how the student keeps the documents of a sequence apart: by position ids alone, or with a mask.

        The test is exact: another first document must not change the hidden states of the second.

        Raises:
            InputError: it cannot.
        """
        if not self.apart:
            return
        has_window = getattr(self.student.config.get_text_config(), "sliding_window", None) is not None
        for self.explicit_mask in (False,) if has_window else (False, True):  # such a mask would replace the window's
            if self._are_documents_apart():
                return
        raise InputError(
            f"{type(self.student).__name__} cannot keep the documents of a sequence apart: set cross_document_attention"
        )

    def _are_documents_apart(self) -> bool:
        device = next(self.student.parameters()).device
        vocab = self.student.get_input_embeddings().weight.shape[0]
        words = list(range(min(vocab, 32)))
        first, second = ([words[0]] * 5, words[1:6]), words[6:12]
        input_ids = torch.tensor([[*ids, *second] for ids in first], device=device)
        positions = torch.tensor([[*range(len(first[0])), *range(len(second))]] * 2, device=device)

        def influence(inputs: dict[str, Tensor]) -> float:
            states = backbone(self.student)(**inputs, use_cache=False).last_hidden_state[:, -len(second) :].float()
            return float((states[0] - states[1]).abs().max())

        try:
            # experts and low precision may round a little differently, which is far below a real influence
            return influence(self._inputs(input_ids, positions)) <= 0.01 * influence({"input_ids": input_ids})
        except (TypeError, ValueError, RuntimeError):  # the model takes no position ids, or no such mask
            return False

    @torch.no_grad()
    def _teacher_output(self, input_ids: Tensor, position_ids: Tensor | None) -> tuple[Tensor, OutputHead]:
        """The teacher's hidden states, and its head."""
        assert self.teacher is not None
        states = backbone(self.teacher)(**self._inputs(input_ids, position_ids), use_cache=False).last_hidden_state
        return states, output_head(self.teacher)

    def teacher_top_tokens(self, input_ids: Tensor, position_ids: Tensor | None) -> TopTokens:
        """The teacher's tokens for `input_ids` (batch, seq): those of the cache, or else the teacher's, which it keeps.

        Args:
            position_ids: (batch, seq); used only if the documents are `apart`.
        """
        position_ids = position_ids if self.apart else None
        found = self.cache.get(input_ids, position_ids) if self.cache is not None else None
        if found is not None:
            return found
        top = top_tokens(*self._teacher_output(input_ids, position_ids), self.top_k, self.temperature)
        if self.cache is not None:
            self.cache.put(input_ids, top, position_ids)
        return top

    def prove_head(self) -> None:
        """`check_head` of the student, as a forward of this module, in which sharded weights are whole."""
        check_head(self.student)


@torch.no_grad()
def make_teacher(student: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen copy of the dense model as it is now, its weights in `dtype`."""
    return as_teacher_(copy.deepcopy(student), dtype)


def as_teacher_(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` itself, frozen, with its weights in `dtype`; buffers such as rotary frequencies are not cast: bf16 has
    too few bits for them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


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
