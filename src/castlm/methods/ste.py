"""STE and SR-STE: the forward pass uses the masked weights, and the gradient reaches every weight."""

from __future__ import annotations

import torch

from castlm.methods.base import Retraining


class STE(Retraining):
    """Straight-through estimator: a new mask by magnitude at every step (Bengio et al. 2013, arXiv 1308.3432)."""

    mask_every = 1


class SRSTE(STE):
    """STE whose gradient also decays the masked weights (Zhou et al. 2021, arXiv 2102.04010, Eq. 9)."""

    def before_update(self, step: int) -> None:
        self.add_decay_(self.options.srste_lam)

    @torch.no_grad()
    def add_decay_(self, coefficient: float) -> None:
        """Adds `coefficient * weight` to the gradient of every masked weight."""
        for weight, mask in self.masks().items():
            if weight.grad is not None:
                weight.grad.add_(weight * ~mask, alpha=coefficient)  # g + lam (~M * W), Eq. 9; (1536, 576)
