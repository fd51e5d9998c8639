"""STE and SR-STE: the forward pass uses the masked weights, and the gradient reaches every weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from castlm.methods.base import Retraining


class STE(Retraining):
    """Straight-through estimator: a new mask by magnitude at every step (Bengio et al. 2013, arXiv 1308.3432)."""

    mask_every = 1


class SRSTE(STE):
    """STE whose gradient also decays the masked weights (Zhou et al. 2021, arXiv 2102.04010, Eq. 9)."""

    @property
    def lam(self) -> float:
        """The decay coefficient."""
        assert isinstance(self.options.lam, float)  # a config has filled it in, and refuses "auto"
        return self.options.lam

    def before_update(self, step: int, parameters: Iterable[Tensor]) -> None:
        self.add_decay_(parameters, self.lam)

    @torch.no_grad()
    def add_decay_(self, parameters: Iterable[Tensor], coefficient: float) -> None:
        """Adds `coefficient * weight` to the gradient of every masked weight of `parameters`."""
        masks = self.masks()
        for weight in parameters:
            if weight in masks and weight.grad is not None:
                weight.grad.add_(weight * ~masks[weight], alpha=coefficient)  # g + lam (~M * W), Eq. 9; (1536, 576)
