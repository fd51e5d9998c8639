"""CAST, continuous adaptive sparse training (arXiv 2509.25996): the method of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castlm.core.scaling import add_weight_scaling
from castlm.core.shards import local
from castlm.core.sparsify import SparseLayer, weight_parameter
from castlm.methods.base import Retraining


class Cast(Retraining):
    """Dense forward pass, AdamS, weight scaling (arXiv 2509.25996)."""

    masks_forward = False

    @property
    def mask_interval(self) -> int:  # type: ignore[override]
        # A refresh keeps a mask by magnitude, and a given mask whose masked weights are zero. It would lose a given
        # mask over dense values, which rank otherwise.
        refreshes = self.start == "magnitude" or self.step0 == "from zero"
        return self.options.mask_interval if refreshes else 0

    def prepare(self, model: nn.Module) -> None:
        if self.options.scale_groups:
            add_weight_scaling(model, self.options.scale_groups, pattern=self.pattern, filter_fn=self.filter_fn)

    def start_layer_(self, layer: SparseLayer, weight: Tensor, mask: Tensor) -> None:
        """Sets the mask and the kept weights. Masked weights start at zero, or keep their dense values and decay."""
        parameter = weight_parameter(layer)
        self.optimizer.set_mask(parameter, mask)
        masked = local(parameter) if self.step0 == "dense" else torch.zeros_like(weight)
        local(parameter).copy_(torch.where(mask, weight, masked))

    def masks(self) -> dict[Tensor, Tensor]:
        return self.optimizer.masks()

    def flips(self) -> int:
        return self.optimizer.flips()

    def restore_flips(self, flips: int) -> None:
        self.optimizer.restore_flips(flips)

    def tensors(self) -> dict[str, Tensor]:
        return {}
