"""Gradual magnitude pruning at n:m granularity."""

from __future__ import annotations

import torch
from torch import nn

from castlm.core.masks import nm_mask
from castlm.core.sparsify import weight_parameter
from castlm.methods.base import Retraining


class GradualMagnitude(Retraining):
    """Magnitude pruning whose sparsity follows the cubic schedule of Zhu & Gupta 2017 (arXiv 1710.01878) over the first
    half of the run, at n:m granularity: at a sparsity s, the share s / (1 - n/m) of the groups that lose the least
    magnitude are n:m and the others still whole."""

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self._set_share(0.0)

    def before_forward(self, step: int) -> None:
        if step % self.config.mask_interval == 0:
            progress = min(1.0, step / (0.5 * self.config.max_steps))
            self._set_share(1 - (1 - progress) ** 3)

    @torch.no_grad()
    def _set_share(self, share: float) -> None:
        _, m = self.pattern
        new = {}
        for layer in self.layers.values():
            weight = weight_parameter(layer)
            mask = nm_mask(weight, *self.pattern)
            lost = (weight.abs() * ~mask).view(-1, m).sum(dim=1)
            whole = lost.argsort(stable=True)[round(share * len(lost)) :]
            mask.view(-1, m)[whole] = True
            new[layer] = mask
        self._set_masks(new)
