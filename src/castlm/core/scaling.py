"""Learnable weight scaling: a parametrization `W -> W * A` with one factor per row and block of columns.

It gives back some of the freedom that pruning takes and costs nothing at the end: `A` is folded into `W`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """`W * A`: (out, in) by (out, groups), each factor over its block of columns. Row by row: of any rows of both."""
    groups = scale.shape[1]  # the width is divided by hand: a rank may hold no row, and -1 then stands for anything
    blocks = weight.view(weight.shape[0], groups, weight.shape[1] // groups)  # (1536, 576) -> (1536, 2, 288)
    return (blocks * scale.unsqueeze(-1)).flatten(1)


class WeightScaling(nn.Module):
    """`forward(W) = W * A` (CAST, arXiv 2509.25996, Eq. 11-12).

    `scale` is `A`, (out, groups), ones at the start; the columns of `W` (out, in) are cut into `groups` contiguous
    blocks of `in / groups`, and `A[i, k]` multiplies row `i` of block `k`.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(weight.shape[0], groups, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return scale_weight(weight, self.scale)


def add_weight_scaling(
    model: nn.Module, groups: int = 2, *, n: int = 2, m: int = 4, filter_fn: FilterFn = is_sparse_linear
) -> list[str]:
    """Scales the weight of every layer that is made n:m sparse, in place. Do it before `fully_shard` and the optimizer.

    Args:
        groups: blocks of columns per row, at least 1; has to divide the width of every sparse layer.

    Returns:
        The names of the scaled layers.

    Raises:
        InputError: a width that does not divide by `groups`, a layer that is scaled already, or no sparse layer.
    """
    layers, _ = sparse_linears(model, n, m, filter_fn)
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"{name} is scaled already: fold it first")
        if groups < 1 or layer.in_features % groups:
            raise InputError(f"the width {layer.in_features} of {name} does not divide into {groups} scale groups")
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", WeightScaling(layer.weight, groups))
    return list(layers)


@torch.no_grad()
def fold_weight_scaling(model: nn.Module) -> list[str]:
    """Multiplies every scale into its weight and drops it, in place: plain `nn.Linear`s remain, equal to fp32 rounding.

    Zeros stay zeros, so prune first and fold afterwards. Returns the names of the folded layers.
    """
    folded = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            folded.append(name)
    return folded
