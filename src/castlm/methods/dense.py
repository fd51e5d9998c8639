"""The dense control. Continued training alone changes the perplexity, so every comparison needs it."""

from __future__ import annotations

from torch import nn

from castlm.methods.base import Retraining


class Dense(Retraining):
    """The same continued training without any sparsity."""

    masks_forward = False

    def prepare(self, model: nn.Module) -> None:
        self.layers = {}
