"""The interface of a training method: what it does to the model, the gradient and the masks.

The loop is the same for every method: data, teacher, token budget, seeds and schedule. A method owns its optimizer
and the two hooks that the loop calls in each step.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.adams import AdamS
from castlm.core.masks import nm_mask
from castlm.core.sparsify import FilterFn, sparse_linears, sparse_param_groups, weight_parameter


class MethodConfig(Protocol):
    """The fields of `TrainConfig` that methods read."""

    max_steps: int
    learning_rate: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    moments: str
    second_moment: str | None
    decay: str
    decay_end: float
    lam: Any
    mask_interval: int
    initial_mask: Any
    srste_lam: float
    scale_groups: int


class _StraightThrough(torch.autograd.Function):
    """`weight * mask` whose gradient reaches every weight (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class ForwardMask(nn.Module):
    """A parametrization that hides the masked weights of (out, in) from the forward pass, not from the gradient."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.mask)


class Retraining:
    """How a method trains a model. `optimizer` steps it; the loop sets the rate and calls the two hooks of each step.

    Attributes:
        optimizer: over all parameters; AdamS whose dense groups are plain Adam. From `build_optimizer` on.
        layers: the sparse layers by name; none for the dense control.
        left_dense: what stays dense, with the reason.
    """

    decays = False  # whether AdamS decays the masked weights
    mask_every: int | None = None  # steps between refreshes of the forward mask
    mask_interval = 0  # steps between refreshes of AdamS's masks; 0: never

    def __init__(self, model: nn.Module, config: MethodConfig, pattern: tuple[int, int], filter_fn: FilterFn) -> None:
        self.config, self.pattern, self.filter_fn = config, pattern, filter_fn
        self.layers, self.left_dense = sparse_linears(model, *pattern, filter_fn)
        self._flips: Tensor | int = 0
        self.prepare(model)

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        """The optimizer over all parameters of the model, prepared and sharded by now."""
        groups = sparse_param_groups(model, *self.pattern, self.filter_fn)
        if not self.decays:
            groups = [{**group, "sparse": False} for group in groups]
        config = self.config
        self.optimizer = AdamS(
            groups,
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            lam=config.lam,
            total_steps=config.max_steps,
            mask_interval=self.mask_interval,
            decay=config.decay,
            decay_end=config.decay_end,
            second_moment=config.second_moment,
            moments=config.moments,
            fused=fused,
        )
        return self.optimizer

    def prepare(self, model: nn.Module) -> None:
        """Changes the model before its optimizer exists: scaling, or a mask in the forward pass."""
        for layer in self.layers.values():
            mask = nm_mask(layer.weight, *self.pattern)
            parametrize.register_parametrization(layer, "weight", ForwardMask(mask), unsafe=True)

    def start_layer_(self, layer: nn.Linear, weight: Tensor, mask: Tensor) -> None:
        """Starts a layer from another's `weight` and `mask` (rows on this rank, in): masked weights at zero."""
        weight_parameter(layer).copy_(weight)
        forward_mask(layer).copy_(mask)

    def before_forward(self, step: int) -> None:
        """Refreshes the masks of the forward pass."""
        if self.mask_every and step % self.mask_every == 0:
            new = {layer: nm_mask(weight_parameter(layer), *self.pattern) for layer in self.layers.values()}
            self._set_masks(new)

    @torch.no_grad()
    def _set_masks(self, new: dict[nn.Linear, Tensor]) -> None:
        flips = [(mask != forward_mask(layer)).sum() for layer, mask in new.items()]
        self._flips = torch.stack(flips).sum() if flips else 0
        for layer, mask in new.items():
            forward_mask(layer).copy_(mask)

    def flips(self) -> int:
        """Mask entries on this rank that the newest refresh changed."""
        return int(self._flips)

    def restore_flips(self, flips: int) -> None:
        """Sets what `flips` says until the next refresh, after a resume."""
        self._flips = flips

    def before_update(self, step: int) -> None:
        """Changes the gradients after the backward pass and the clipping."""

    def masks(self) -> dict[Tensor, Tensor]:
        """The mask of every sparse parameter, True = kept."""
        return {weight_parameter(layer): forward_mask(layer) for layer in self.layers.values()}

    def tensors(self) -> dict[str, Tensor]:
        """State beside parameters and optimizer that a checkpoint has to hold."""
        return {f"mask.{name}": forward_mask(layer) for name, layer in self.layers.items()}


def forward_mask(layer: nn.Linear) -> Tensor:
    return layer.get_buffer("parametrizations.weight.0.mask")
