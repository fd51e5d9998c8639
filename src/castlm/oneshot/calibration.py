"""Draws the calibration sequences of one-shot solvers, and checks that a model can take them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer
from castlm.models.architecture import context_length
from castlm.oneshot.options import Effort


def calibration_length(model: PreTrainedModel) -> int:
    """The sequence length of the published figures: the context of the model, at most 2,048 tokens."""
    return min(2048, context_length(model.config) or 2048)


def default_sequences(layers: Mapping[str, SparseLayer], seq_len: int, effort: Effort) -> int:
    """The number of calibration sequences if none is given: enough for 32,768 tokens, at most 128.

    Wide layers need more: 16 tokens for each input of the widest. An effort takes a share of this. On stories260K,
    twice the tokens bring nothing after 100 steps, and half of them cost 2.7 % (docs/results/stories260k-start.md).
    """
    widest = max(layer.weight.shape[-1] for layer in layers.values())
    tokens = max(32_768, 16 * widest) * effort.calibration
    return min(128, math.ceil(tokens / seq_len))


def check_calibration(model: PreTrainedModel, calibration: Tensor) -> None:
    """Raises `InputError` if the sequences of `calibration` (num_sequences, seq_len) do not fit the model's context."""
    seq_len, context = calibration.shape[1], context_length(model.config)
    if context is not None and seq_len > context:
        raise InputError(
            f"calibration sequences of {seq_len} tokens are longer than the model's context of {context}: "
            f"use a seq_len of at most {context}"
        )
