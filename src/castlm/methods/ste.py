"""STE and SR-STE: the forward pass is masked, the gradient reaches every weight."""

from __future__ import annotations

import torch

from castlm.methods.base import Retraining


class STE(Retraining):
    """Masked forward, the gradient straight through to the dense weight, a new mask every step."""

    mask_every = 1


class SRSTE(STE):
    """STE with a decay of the masked weights in the gradient (Zhou et al. 2021, arXiv 2102.04010, Eq. 9)."""

    def before_update(self, step: int) -> None:
        self.add_decay_(self.config.srste_lam)

    @torch.no_grad()
    def add_decay_(self, coefficient: float) -> None:
        for weight, mask in self.masks().items():
            if weight.grad is not None:
                weight.grad.add_(weight * ~mask, alpha=coefficient)
