"""The size of a calibration text by default, its draw for a model, and the check that a model can take it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer
from castlm.data.calibration import CalibrationText, calibration_sequences
from castlm.data.documents import AnyDocuments
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import Encoder
from castlm.hardware import choose_precision
from castlm.models.architecture import check_of_transformers, context_length
from castlm.oneshot.options import EFFORTS, Effort
from castlm.say import Say, silent


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A calibration text, and the options with which sequences are drawn from it."""

    documents: AnyDocuments
    name: str | None = None
    """The name of the text in castlm.json."""
    options: TextOptions = DEFAULTS
    """How it is read."""
    num_sequences: int | None = None
    """None takes `default_sequences` for `effort`."""
    seq_len: int = 0
    """Tokens of a sequence; 0 takes `calibration_length`."""
    seed: int = 0
    precision: str = "auto"
    """The option `precision`, for the passes over the text."""
    effort: Effort = EFFORTS["best"]

    def text(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, SparseLayer],
        encoder: Encoder,
        device: torch.device,
        say: Say = silent,
    ) -> CalibrationText:
        """Draws the text for a start on `device` that prunes `layers` of a model."""
        seq_len = self.seq_len or calibration_length(model)
        num_sequences = self.num_sequences or default_sequences(layers, seq_len, self.effort)
        sequences, extras = calibration_sequences(self.documents, encoder, num_sequences, seq_len, self.seed, say)
        return CalibrationText(sequences, extras, choose_precision(self.precision, device, model.config))

    def within_context(self, model: PreTrainedModel) -> Draw:
        """The draw of sequences that are no longer than `calibration_length`."""
        return replace(self, seq_len=min(self.seq_len, calibration_length(model)))

    def source(self) -> dict[str, Any]:
        """The text and the seed, for castlm.json."""
        return {"text": self.name, "text_sha256": self.documents.text_hash(), "seed": self.seed}


def calibration_length(model: PreTrainedModel) -> int:
    """The sequence length of the published figures: the context of the model, at most 2,048 tokens."""
    check_of_transformers(model)
    return min(2048, context_length(model.config) or 2048)


def default_sequences(layers: Mapping[str, SparseLayer], seq_len: int, effort: Effort) -> int:
    """The number of calibration sequences if none is given: enough for 32,768 tokens, at most 128.

    Wide layers need more: 16 tokens for each input of the widest. An effort takes a share of this. On stories260K,
    twice the tokens bring nothing after 100 steps, and half of them cost 2.7 % (docs/results/start.md).
    """
    widest = max(layer.weight.shape[-1] for layer in layers.values())
    # SmolLM2-135M: max(32768, 16 x 1536) = 32,768, 64 sequences of 512
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
