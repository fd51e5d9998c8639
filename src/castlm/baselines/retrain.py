"""CAST and its rivals as ways to train: what each does to the model, the gradient and the mask, behind one interface.

The loop is the same for all: data, teacher, budget, seeds, schedule. Rivals mask the forward pass; CAST does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.adams import AdamS
from castlm.core.masks import nm_mask
from castlm.core.scaling import add_weight_scaling
from castlm.core.shards import local
from castlm.core.sparsify import FilterFn, sparse_linears, sparse_param_groups, weight_parameter

if TYPE_CHECKING:
    from castlm.training.config import TrainConfig


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

    def __init__(self, model: nn.Module, config: TrainConfig, pattern: tuple[int, int], filter_fn: FilterFn) -> None:
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
        _forward_mask(layer).copy_(mask)

    def before_forward(self, step: int) -> None:
        """Refreshes the masks of the forward pass."""
        if self.mask_every and step % self.mask_every == 0:
            new = {layer: nm_mask(weight_parameter(layer), *self.pattern) for layer in self.layers.values()}
            self._set_masks(new)

    @torch.no_grad()
    def _set_masks(self, new: dict[nn.Linear, Tensor]) -> None:
        flips = [(mask != _forward_mask(layer)).sum() for layer, mask in new.items()]
        self._flips = torch.stack(flips).sum() if flips else 0
        for layer, mask in new.items():
            _forward_mask(layer).copy_(mask)

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
        return {weight_parameter(layer): _forward_mask(layer) for layer in self.layers.values()}

    def tensors(self) -> dict[str, Tensor]:
        """State beside parameters and optimizer that a checkpoint has to hold."""
        return {f"mask.{name}": _forward_mask(layer) for name, layer in self.layers.items()}


def _forward_mask(layer: nn.Linear) -> Tensor:
    return layer.get_buffer("parametrizations.weight.0.mask")


class Cast(Retraining):
    """Dense forward pass, AdamS, weight scaling (arXiv 2509.25996)."""

    decays = True

    @property
    def mask_interval(self) -> int:  # type: ignore[override]
        return self.config.mask_interval if self.config.initial_mask == "magnitude" else 0

    def prepare(self, model: nn.Module) -> None:
        if self.config.scale_groups:
            n, m = self.pattern
            add_weight_scaling(model, self.config.scale_groups, n=n, m=m, filter_fn=self.filter_fn)

    def start_layer_(self, layer: nn.Linear, weight: Tensor, mask: Tensor) -> None:
        """Masked weights decay from their dense values."""
        parameter = weight_parameter(layer)
        self.optimizer.set_mask(parameter, mask)
        local(parameter).copy_(torch.where(mask, weight, local(parameter)))

    def masks(self) -> dict[Tensor, Tensor]:
        return self.optimizer.masks()

    def flips(self) -> int:
        return self.optimizer.flips()

    def restore_flips(self, flips: int) -> None:
        self.optimizer.restore_flips(flips)

    def tensors(self) -> dict[str, Tensor]:
        return {}


class Dense(Retraining):
    """The control: the same continued training with no sparsity at all."""

    def prepare(self, model: nn.Module) -> None:
        self.layers = {}


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


class AST(SRSTE):
    """Annealed sparse training without extra weights (arXiv 2407.20584): SR-STE whose decay grows linearly to its full
    value over the first quarter of the run, and a mask that is refreshed every `mask_interval` steps."""

    @property
    def mask_every(self) -> int:  # type: ignore[override]
        return self.config.mask_interval

    def before_update(self, step: int) -> None:
        ramp = min(1.0, step / (0.25 * self.config.max_steps))
        self.add_decay_(self.config.srste_lam * ramp)


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


METHODS: dict[str, type[Retraining]] = {
    "cast": Cast,
    "dense": Dense,
    "ste": STE,
    "srste": SRSTE,
    "ast": AST,
    "gradual_magnitude": GradualMagnitude,
}
