"""Trained rounding: the forward pass computes with weights of few bits, whose scales are trained with the rest.

A weight is a whole code times the scale of its group, some consecutive columns of a row: learned step size quantization
(LSQ, arXiv 1902.08153). It is a parametrization above weight scaling or a mask, so every forward pass, also of an
evaluation, computes with the weights that will be stored. A masked weight decays to zero, and so rounds to zero.

- The codes go one further on the side of the group's largest weight: -4 to 3, or -3 to 4. Scales stay positive, so no
  sign is trained. In a file, `castlm.formats.rounding.on_grid` gives the scale a sign instead.
- The gradient passes straight through the rounding, and is zero where the rounding clips.
- The logarithm of a scale is trained, so that one learning rate serves scales of every size. The forward pass rounds
  the scale to bf16, as it is stored.
- The first scales have the least squared error of each group, without a calibration text: after 100 steps this is as
  good as starting from GPTQ (docs/results/bits.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError, naming
from castlm.core.shards import local
from castlm.core.sparsify import FilterFn, SparseLayer, computed_weight, filter_for, is_sparse_linear, weight_parameter

SCALE_RATE = 3e-3
"""Peak learning rate of the logarithm of a scale. It is a ratio, so its rate does not fall with the size of a model."""
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of the largest magnitude: clipping it may cost less than a coarse grid


def best_scale(
    groups: Tensor, ends: tuple[int, int], at: tuple[int, ...], importance: Tensor | None = None, dim: int = -1
) -> Tensor:
    """The scales, exact in bf16, that round each group with the least squared error.

    Args:
        groups: weights whose axis `dim` runs over the members of a group.
        ends: the smallest and the largest code.
        at: the codes among `ends` that the largest magnitude of a group may get; smaller scales clip it there.
        importance: factors of the squared errors, broadcast to `groups`.

    Returns:
        Like `groups` without the axis `dim`. A scale may be negative. A group of zeros has the scale 1.
    """
    index = groups.abs().argmax(dim, keepdim=True)  # (1536, 9, 64) -> (1536, 9, 1)
    extreme = groups.gather(dim, index)
    # Six candidates a group for each of `at`, each tried on the whole weight at once: (1536, 9, 1) are 13,824 choices.
    best, least = torch.ones_like(extreme), torch.full_like(extreme, float("inf"))
    for end in at:
        for shrink in _SHRINK:
            scale = (extreme * (shrink / end)).bfloat16().float()  # (1536, 9, 1), negative where extreme / end is
            # A group of zeros, or one so small that bf16 has no scale for it: its codes are 0 with any scale.
            scale = torch.where(scale == 0, 1.0, scale)
            # (s clamp(round(w / s)) - w)^2, in place, as a weight of 8B models is large: (1536, 9, 64)
            error = (groups / scale).round_().clamp_(*ends).mul_(scale).sub_(groups).square_()
            lost = (error if importance is None else error.mul_(importance)).sum(dim, keepdim=True)
            better = lost < least
            best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return best.squeeze(dim)


def in_groups(weight: Tensor, group: int) -> Tensor:
    """`weight` (..., columns) as (..., ceil(columns / group), group), padded with zeros."""
    padded = F.pad(weight, (0, -weight.shape[-1] % group))
    return padded.view(*padded.shape[:-1], padded.shape[-1] // group, group)  # (1536, 576) -> (1536, 9, 64)


class _Round(torch.autograd.Function):
    """`clamp(round(W / s)) s`; see `round_weight`. Nothing is kept for the backward pass but W and the scales."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(weight, log_scale)
        ctx.bits, ctx.group = bits, group
        scale, steps, low, high = _steps(weight, log_scale, bits, group)
        codes = torch.minimum(torch.maximum(steps.round_(), low), high)
        return codes.mul_(scale).flatten(-2)[..., : weight.shape[-1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, log_scale = ctx.saved_tensors
        scale, steps, low, high = _steps(weight, log_scale, ctx.bits, ctx.group)
        codes = torch.minimum(torch.maximum(steps.round(), low), high)
        # Within half a step of the ends nothing is clipped: the rounding itself would land on the last code.
        inside = (steps >= low - 0.5) & (steps <= high + 0.5)
        grads = in_groups(grad, ctx.group)
        # LSQ, Eq. 3: dw'/ds = code - w/s inside the range, and the code where w is clipped; dw'/d log s = s dw'/ds
        of_scale = (grads * scale * torch.where(inside, codes - steps, codes)).sum(-1)
        return (grads * inside).flatten(-2)[..., : grad.shape[-1]], of_scale, None, None


def _steps(weight: Tensor, log_scale: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales (..., groups, 1), the weights in units of them (..., groups, group), and the ends of each group."""
    groups = in_groups(weight, group)
    # Rounded as it will be stored, so that training sees the error of the scale too.
    scale = log_scale.exp().bfloat16().to(weight.dtype).unsqueeze(-1)
    low, high = groups.aminmax(dim=-1, keepdim=True)  # (1536, 9, 1)
    # int4 has codes -8 to 7. The side with the larger weight gets the longer end: -7 to 8 where that is the positive
    # one.
    is_above = high >= -low  # the largest magnitude is positive
    end = 2 ** (bits - 1)
    return scale, groups / scale, torch.where(is_above, 1.0 - end, -end), torch.where(is_above, end, end - 1.0)


def round_weight(weight: Tensor, log_scale: Tensor, bits: int, group: int) -> Tensor:
    """Rounds a weight (..., out, in) to codes of `bits` bits times scales, with gradients for both.

    Rows are independent, so this also works on any subset of rows of both.

    Args:
        log_scale: logarithms of the scales, (..., out, ceil(in / group)).

    Examples:
        >>> round_weight(torch.tensor([[0.9, -0.1, 5.0, -2.6]]), torch.zeros(1, 1), bits=3, group=64)
        tensor([[ 1., -0.,  4., -3.]])
    """
    rounded: Tensor = _Round.apply(weight, log_scale, bits, group)
    return rounded


class WeightRounding(nn.Module):
    """A parametrization by `round_weight`. It passes weights unchanged until `fit_rounding_` switches it on."""

    def __init__(self, weight: Tensor, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group, self.on = bits, group, False
        shape = (*weight.shape[:-1], -(-weight.shape[-1] // group))
        self.log_scale = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return round_weight(weight, self.log_scale, self.bits, self.group) if self.on else weight

    def fit_(self, weight: Tensor, keep_scales: bool) -> None:
        """Switches the rounding on; see `fit_rounding_`."""
        if not keep_scales:
            end = 2 ** (self.bits - 1)
            scales = best_scale(in_groups(weight, self.group), (-end, end - 1), at=(-end,)).abs()
            local(self.log_scale).copy_(scales.log())
        self.on = True


class _Scale(torch.autograd.Function):
    """The codes of a rounded weight times trained scales; see `ScaledCodes`. The weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, first: Tensor, log_scale: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(weight, first, log_scale)
        ctx.group = group
        codes, scale = _codes(weight, first, log_scale, group)
        return codes.mul_(scale).flatten(-2)[..., : weight.shape[-1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        weight, first, log_scale = ctx.saved_tensors
        codes, scale = _codes(weight, first, log_scale, ctx.group)
        # w' = code s, so dw'/d log s = w'; the rounding of s to bf16 passes the gradient through
        return None, None, (in_groups(grad, ctx.group) * codes.mul_(scale)).sum(-1), None


def _codes(weight: Tensor, first: Tensor, log_scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The codes (..., groups, group) of a weight with the scales `first`, and its scales now (..., groups, 1)."""
    codes = (in_groups(weight, group) / first.unsqueeze(-1)).round_()
    # as it will be stored, with the sign that it began with
    return codes, (log_scale.exp().bfloat16().to(weight.dtype) * first.sign()).unsqueeze(-1)


class ScaledCodes(WeightRounding):
    """A parametrization of a weight that is rounded already: its codes stay, and its scales are trained."""

    def __init__(self, weight: Tensor, bits: int, group: int) -> None:
        super().__init__(weight, bits, group)
        self.register_buffer("first", torch.ones_like(self.log_scale), persistent=False)
        self.first: Tensor
        """The scales that the weight was rounded with."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        scaled: Tensor = _Scale.apply(weight, self.first, self.log_scale, self.group)
        return scaled

    def fit_(self, weight: Tensor, keep_scales: bool) -> None:
        end = 2 ** (self.bits - 1)
        self.first.copy_(grid_scale(weight, (-end, end - 1), self.group))
        if not keep_scales:
            self.log_scale.copy_(self.first.abs().log())
        self.on = True

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., columns) and scales (..., groups) of the weight, both fp32."""
        codes, scale = _codes(weight, self.first, self.log_scale, self.group)
        return codes.flatten(-2)[..., : weight.shape[-1]], scale.squeeze(-1)


def grid_scale(weight: Tensor, ends: tuple[int, int], group: int) -> Tensor:
    """The scales (..., groups), exact in bf16, of a weight that was rounded in groups of columns.

    The scale of a group is its largest magnitude divided by a code, up to the rounding of the stored weights.

    Args:
        weight: (..., columns), whose values are codes times scales in this dtype.
        ends: the smallest and the largest code.

    Raises:
        InputError: a group that is no whole multiple of a scale.
    """
    groups = in_groups(weight, group)  # (rows, groups, 64)
    exact, (low, high) = groups.float(), ends
    extreme = exact.gather(-1, exact.abs().argmax(-1, keepdim=True))
    scales, found = torch.ones_like(extreme), extreme == 0
    for end in range(1, -low + 1):
        nearest = (extreme / -end).bfloat16()  # negative for the code -8 or -4, whose opposite does not exist
        for step in (0, -1, 1):  # the stored end is rounded too
            scale = (nearest.view(torch.int16) + step).view(torch.bfloat16).float()
            codes = (exact / scale).round_()
            fits = (codes * scale).to(weight.dtype) == groups
            fits &= (codes >= low) & (codes <= high)
            is_new = fits.all(-1, keepdim=True) & ~found
            scales, found = torch.where(is_new, scale, scales), found | is_new
    if not bool(found.all()):
        raise InputError("its weights are not codes times scales")
    return scales.squeeze(-1)


def add_weight_rounding(
    model: nn.Module,
    bits: int,
    group: int = 64,
    *,
    filter_fn: FilterFn = is_sparse_linear,
    rounding: type[WeightRounding] = WeightRounding,
) -> list[str]:
    """Adds trained rounding to the layers that `filter_fn` selects, in place; returns their names.

    Call it after `add_weight_scaling` and before `fully_shard` and the optimizer, then `fit_rounding_` once the weights
    have the values of step 0. `fold_weight_scaling` leaves plain layers with the rounded weights.

    Args:
        rounding: `WeightRounding`, or `ScaledCodes` for a model that is rounded already.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    chooses = filter_for(model, filter_fn)
    chosen = {name: layer for name, layer in layers.items() if chooses(layer, name)}
    for layer in chosen.values():
        added = rounding(weight_parameter(layer), bits, group)
        parametrize.register_parametrization(layer, "weight", added, unsafe=True)
    return list(chosen)


def rounded_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer, WeightRounding]]:
    """The layers with trained rounding, by name, each with its parametrization."""
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer) and parametrize.is_parametrized(layer, "weight"):
            last = layer.get_submodule("parametrizations.weight")[-1]  # type: ignore[index]
            if isinstance(last, WeightRounding):
                yield name, layer, last


@torch.no_grad()
def fit_rounding_(model: nn.Module, *, keep_scales: bool = False) -> None:
    """Switches the rounding on, with the scales of least squared error for the rows that this rank holds.

    Args:
        keep_scales: leave the scales as they are, because a checkpoint holds trained ones.
    """
    for name, layer, rounding in rounded_layers(model):
        with naming(name):
            rounding.fit_(computed_weight(layer, local), keep_scales)
