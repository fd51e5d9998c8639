"""The teacher beside the loss: its output for a batch, its most probable tokens, and their cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from castlm.core.distill import OutputHead, TopTokens, top_tokens
from castlm.training.reader import Reader, Reading
from castlm.training.teacher_cache import TeacherCache


class Teacher(nn.Module):
    """A frozen model that is distilled from, or the cache that stands for it.

    Args:
        model: in eval mode, with a vocabulary at least as large as the student's; None if `cache` holds all sequences.
        temperature: divides the logits of both models in the KL term.
        top_k: distill from the `top_k` most probable tokens; 0 uses the full distribution.
        cache: stores these tokens.
        keeps_stream: whether hidden states are compared.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        temperature: float,
        top_k: int = 0,
        cache: TeacherCache | None = None,
        keeps_stream: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature, self.top_k, self.cache = temperature, top_k, cache
        self._reader = None if model is None else Reader(model, keeps_stream)

    @torch.no_grad()
    def read(self, inputs: dict[str, Any], stream: bool) -> Reading:
        """The output for the arguments of a forward pass; see `Reader.read`."""
        assert self._reader is not None  # only a cache that holds all sequences stands alone
        return self._reader.read(inputs, stream)

    @contextmanager
    def head(self, vocab: int) -> Iterator[OutputHead]:
        """The head on the first `vocab` tokens, the student's: families pad larger models to more rows of no token."""
        assert self._reader is not None
        with self._reader.head() as head:
            yield head._replace(weight=head.weight[:vocab], bias=None if head.bias is None else head.bias[:vocab])

    def top_tokens(self, inputs: dict[str, Any], vocab: int, stream: bool) -> tuple[TopTokens, Reading | None]:
        """The most probable of `vocab` tokens for a batch, and the output of the model if it was run."""
        input_ids, position_ids = inputs["input_ids"], inputs.get("position_ids")  # the key of a sequence in the cache
        found = self.cache.get(input_ids, position_ids) if self.cache is not None else None
        if found is not None:
            return found, None
        reading = self.read(inputs, stream)
        with self.head(vocab) as head:
            top = top_tokens(reading.states, head, self.top_k, self.temperature)
        if self.cache is not None:
            self.cache.put(input_ids, top, position_ids)
        return top, reading


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
