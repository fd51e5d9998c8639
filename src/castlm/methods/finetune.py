"""Plain training of the kept weights: the simplest rival, which every other method must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castlm.core.adams import AdamS
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import SparseLayer, weight_parameter
from castlm.methods.base import Retraining


class Finetune(Retraining):
    """Fine-tuning with a fixed mask: masked weights are zero from step 0 on, and their gradients are removed.

    The common way to recover a model after one-shot pruning, as in Kurtic et al. 2023 (arXiv 2310.06927). Masked
    entries of the gradient are removed as it is accumulated, so that clipping by norm sees the gradient of the kept
    weights only. Adam then has zero moments there, and a masked weight stays exactly zero.
    """

    masks_forward = False

    def prepare(self, model: nn.Module) -> None:
        """Does nothing: masked weights are zero, so the forward pass needs no mask."""

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        self._masks: dict[Tensor, Tensor] = {}
        for layer, mask in self.magnitude_masks().items():
            parameter = weight_parameter(layer)
            self._masks[parameter] = mask
            # It runs after each micro-batch; under FSDP2 after the reduction, on this rank's rows.
            parameter.register_post_accumulate_grad_hook(self._mask_gradient_)
        return super().build_optimizer(model, fused)

    def _mask_gradient_(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        local(parameter.grad).masked_fill_(~self._masks[parameter], 0.0)  # 0 times inf would be NaN

    @torch.no_grad()
    def start_from_magnitude_(self) -> None:
        for parameter, mask in self._masks.items():
            local(parameter).masked_fill_(~mask, 0.0)

    def start_layer_(self, layer: SparseLayer, weight: Tensor, mask: Tensor) -> None:
        parameter = weight_parameter(layer)
        self._masks[parameter].copy_(mask & (weight != 0))  # a group may have more zeros than it needs: all stay zero
        local(parameter).copy_(weight * mask)

    def masks(self) -> dict[Tensor, Tensor]:
        return {parameter: like_rows(mask, parameter) for parameter, mask in self._masks.items()}

    def tensors(self) -> dict[str, Tensor]:
        named = {name: weight_parameter(layer) for name, layer in self.layers.items()}
        return {f"mask.{name}": like_rows(self._masks[p], p) for name, p in named.items()}

    @property
    def fixed_figures(self) -> frozenset[str]:
        return super().fixed_figures | {"prune_now_ppl", "sparse_weight_ratio", "largest_masked"}
