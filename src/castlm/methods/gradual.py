"""Gradual magnitude pruning at n:m granularity."""

from __future__ import annotations

import torch
from torch import nn

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import weight_parameter
from castlm.methods.base import Retraining
from castlm.methods.options import MethodOptions, OptimizerOptions


class GradualMagnitude(Retraining):
    """Gradual magnitude pruning of whole groups of m weights.

    The sparsity s follows the cubic schedule of Zhu & Gupta 2017 (arXiv 1710.01878) over the first half of the run. At
    sparsity s, the share s / (1 - n/m) of the groups is n:m: the groups that lose the least magnitude. The others are
    still dense. As in that paper, masked weights get no gradient, and the masks stay once every group is n:m.
    """

    passes_gradient = False

    @classmethod
    def check(cls, method: MethodOptions, optimizer: OptimizerOptions) -> None:
        interval, steps = method.mask_interval, optimizer.max_steps
        if (steps - 1) // interval * interval < steps / 2:
            raise InputError(
                f"mask_interval {interval} leaves no mask refresh in the second half of {steps} "
                "steps, from when gradual_magnitude is n:m: lower mask_interval or raise max_steps"
            )

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self._set_share(0.0)  # all groups dense, though masks are there

    def before_forward(self, step: int) -> None:
        if step % self.options.mask_interval:
            return
        half = 0.5 * self.optimizer_options.max_steps
        if step - self.options.mask_interval >= half:  # the last refresh made every group n:m
            self._flips = 0
        else:
            self._set_share(1 - (1 - min(1.0, step / half)) ** 3)  # Zhu & Gupta, Eq. 1

    @torch.no_grad()
    def _set_share(self, share: float) -> None:
        assert isinstance(self.pattern, NM), f"gradual_magnitude prunes to n:m, not to {self.pattern}"
        m = self.pattern.m
        new = {}
        for layer in self.layers.values():
            weight = weight_parameter(layer)
            mask = self.pattern.mask(weight)  # (1536, 576), n:m in every group
            lost = (weight.abs() * ~mask).view(-1, m).sum(dim=1)  # (1536, 576) -> (221184, 4) -> (221184,)
            # the groups that lose most, of all (221184,)
            still_dense = lost.argsort(stable=True)[round(share * len(lost)) :]
            mask.view(-1, m)[still_dense] = True
            new[layer] = mask
        self.set_masks(new)
