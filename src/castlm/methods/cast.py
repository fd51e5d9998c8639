"""CAST, continuous adaptive sparse training (arXiv 2509.25996): the method of this package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.scaling import add_weight_scaling
from castlm.core.shards import local
from castlm.core.sparsify import SparseLayer, weight_parameter
from castlm.methods.base import Retraining
from castlm.methods.options import MethodOptions, OptimizerOptions


class Cast(Retraining):
    """Dense forward pass, AdamS, weight scaling (arXiv 2509.25996)."""

    masks_forward = False

    @classmethod
    def check(cls, method: MethodOptions, optimizer: OptimizerOptions) -> None:
        if not method.row.decays:
            raise InputError(
                f"method {method.method}: its class is a Cast, whose masked weights AdamS decays, but its row of "
                "METHODS lacks the option 'decay': give the row options=METHODS['cast'].options"
            )

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

    def set_masks(self, new: Mapping[SparseLayer, Tensor]) -> None:
        weights = {weight_parameter(layer): mask for layer, mask in new.items()}
        self.set_flips(sum(int((local(self.optimizer.mask(p)) != mask).sum()) for p, mask in weights.items()))
        for p, mask in weights.items():
            self.optimizer.set_mask(p, mask)

    def flips(self) -> int:
        return self.optimizer.flips()

    def set_flips(self, flips: int) -> None:
        self.optimizer.set_flips(flips)

    def tensors(self) -> dict[str, Tensor]:
        return {}
