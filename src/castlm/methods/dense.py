"""The dense control: continued training alone changes perplexity, so every comparison needs it."""

from __future__ import annotations

from torch import nn

from castlm.methods.base import Retraining


class Dense(Retraining):
    """The control: the same continued training with no sparsity at all."""

    def prepare(self, model: nn.Module) -> None:
        self.layers = {}
