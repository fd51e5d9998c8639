"""Draws the calibration sequences of one-shot solvers, and checks that a model can take them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
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


def draw_calibration(token_ids: Tensor, num_sequences: int = 128, seq_len: int = 2048, seed: int = 0) -> Tensor:
    """Draws random sequences of a text: the same as SparseGPT's and Wanda's loaders of WikiText-2 and PTB for a seed.

    Each sequence begins at `random.Random(seed).randint(0, num_tokens - seq_len - 1)`, also in the middle of a
    document; sequences can overlap. For C4, those loaders draw a document first, and then one sequence of it.

    Args:
        token_ids: int64, (num_tokens,): the text, tokenized as a whole with the special tokens at its start.
        seq_len: tokens per sequence; `calibration_length(model)` is the convention.

    Returns:
        int64, (num_sequences, seq_len), in the order drawn.

    Raises:
        InputError: fewer than `seq_len + 1` tokens.
    """
    last = len(token_ids) - seq_len - 1
    if last < 0:
        raise InputError(
            f"the calibration text has {len(token_ids):,} tokens, and sequences of seq_len {seq_len:,} need "
            f"{seq_len + 1:,}: pass a longer text or a smaller seq_len"
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, last) for _ in range(num_sequences)]
    return torch.stack([token_ids[start : start + seq_len] for start in starts]).long()


def check_calibration(model: PreTrainedModel, calibration: Tensor) -> None:
    """Raises `InputError` if the sequences of `calibration` (num_sequences, seq_len) do not fit the model's context."""
    seq_len, context = calibration.shape[1], context_length(model.config)
    if context is not None and seq_len > context:
        raise InputError(
            f"calibration sequences of {seq_len} tokens are longer than the model's context of {context}: "
            f"use a seq_len of at most {context}"
        )
