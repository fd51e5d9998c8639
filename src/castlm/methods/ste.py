"""STE, SR-STE and AST: the forward pass uses the masked weights, and the gradient reaches every weight.

AST, adaptive sparse trainer (arXiv 2407.20584), is the method before CAST by the same authors; here it is its equation.
The authors' own optimizer is not here: it adds the decay after the momentum, squares both together for the second
moment, and takes masks by Wanda's metric, which needs the norms of all inputs as further state of every checkpoint and
rank. After 12 steps at 1e-3 its masks differ in 12 % of their entries.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from castlm.methods.base import Retraining


class STE(Retraining):
    """Straight-through estimator: a new mask by magnitude at every step (Bengio et al. 2013, arXiv 1308.3432)."""

    mask_interval = 1


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


class AST(SRSTE):
    """The equation of AST under plain Adam: SR-STE with an annealed decay, without the extra weights of that paper.

    The decay enters the gradient and grows linearly to `lam` over the first quarter of the run. The mask is the
    one by magnitude, refreshed every `mask_interval` steps.
    """

    @property
    def mask_interval(self) -> int:  # type: ignore[override]
        return self.options.mask_interval

    def before_update(self, step: int, parameters: Iterable[Tensor]) -> None:
        ramp = min(1.0, step / (0.25 * self.optimizer_options.max_steps))  # t / T0 with T0 = T / 4, then 1
        self.add_decay_(parameters, self.lam * ramp)
