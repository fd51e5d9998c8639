"""Learnable weight scaling: a parametrization `W -> W * A` with one factor per row and block of columns.

It restores some of the freedom that pruning removes and costs nothing in the end, because `A` is folded into `W`.
Autograd would keep `W * A` of every layer for the backward pass, 13 GiB of an 8B model in bf16. A scaled `nn.Linear`
keeps `W` and `A`, which are there anyway, and makes the product again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.distill import matmul_dtype
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import FilterFn, SparseLayer, check_model, is_sparse_linear, sparse_linears


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """`W * A`: (..., out, in) by (..., out, groups), where each factor applies to its block of columns.

    Examples:
        >>> scale_weight(torch.ones(1, 4), torch.tensor([[2.0, 3.0]]))
        tensor([[2., 2., 3., 3.]])
    """
    groups = scale.shape[-1]  # -1 would be ambiguous on a rank that holds no rows
    blocks = weight.view(*weight.shape[:-1], groups, weight.shape[-1] // groups)  # (1536, 576) -> (1536, 2, 288)
    return (blocks * scale.unsqueeze(-1)).flatten(-2)  # Eq. 11-12: (1536, 2, 288) * (1536, 2, 1) -> (1536, 576)


class _ScaledLinear(torch.autograd.Function):
    """`F.linear(x, W * A, bias)`, which keeps x, W and A for the backward pass.

    It repeats the operations of autograd in their order, so output and gradients have the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, scale)  # not the product: (14336, 4096) bf16 is 112 MiB a layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        scaled = scale_weight(weight, scale).to(x.dtype)
        return F.linear(x, scaled, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight, grad_scale, grad_bias = (None,) * 4
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        if ctx.needs_input_grad[0]:
            # dL/dx = dL/dy (W * A): (4096, 1536) @ (1536, 576)
            grad_x = (rows @ scale_weight(weight, scale).to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            blocks = weight.view(*scale.shape, weight.shape[-1] // scale.shape[-1])  # (1536, 576) -> (1536, 2, 288)
            product = torch.promote_types(weight.dtype, scale.dtype)
            # dL/d(W * A) = dL/dy^T x: (1536, 4096) @ (4096, 576) -> (1536, 2, 288)
            grad_blocks = (rows.T @ x.reshape(-1, x.shape[-1])).to(product).view(blocks.shape)
            # the product rule: dL/dW = dL/d(W * A) A, and dL/dA = dL/d(W * A) W, summed over the block of a factor
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_blocks * scale.unsqueeze(-1)).flatten(-2).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                grad_scale = (grad_blocks * blocks).sum(-1).to(scale.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_scale, grad_bias


class WeightScaling(nn.Module):
    """`forward(W) = W * A`, with `scale` = `A` (out, groups), (experts, out, groups) of an `ExpertLinear`.

    `forward(W, x, bias)` is the output of the linear layer with these weights. It runs in this module and not in the
    layer, so that hooks which gather `A`, such as FSDP's, run around it.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*weight.shape[:-1], groups, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor, x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if x is None:
            return scale_weight(weight, self.scale)
        x = x.to(matmul_dtype(x))  # as autocast does, and as it is kept
        output: Tensor = _ScaledLinear.apply(x, weight, self.scale, bias)
        return output


def _forward(layer: Any, x: Tensor) -> Tensor:
    """The forward pass of an `nn.Linear` with weight scaling."""
    scaling, *more = layer.parametrizations.weight
    if more:  # trained rounding keeps W * A
        return F.linear(x, layer.weight, layer.bias)
    output: Tensor = scaling(layer.parametrizations.weight.original, x, layer.bias)
    return output


def add_weight_scaling(
    model: nn.Module, groups: int = 2, *, pattern: Pattern | str = "2:4", filter_fn: FilterFn = is_sparse_linear
) -> list[str]:
    """Adds weight scaling to every layer that becomes sparse, in place. Call it before `fully_shard` and the optimizer.

    A weight `W` (out, in) becomes `W * A`, where `A` (out, groups) is trained and begins at 1. `A[i, k]` multiplies row
    `i` of the k-th of `groups` contiguous blocks of columns (CAST, arXiv 2509.25996, Eq. 11-12). Until
    `fold_weight_scaling`, a plain model cannot load the `state_dict`, which warns when it is made.

    Args:
        groups: blocks of columns per row, at least 1. Must divide the width of every sparse layer.
        pattern: as in `sparse_linears`.
        filter_fn: as in `sparse_linears`.

    Returns:
        The names of the scaled layers.

    Raises:
        InputError: a width that does not divide by `groups`, a layer that is scaled already, or no sparse layer.

    Examples:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> add_weight_scaling(model)
        ['layers.0']
        >>> [name for name, _ in model.named_parameters()][1:]
        ['layers.0.parametrizations.weight.original', 'layers.0.parametrizations.weight.0.scale']
    """
    layers, _ = sparse_linears(model, pattern, filter_fn)
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"{name} is scaled already: fold it first")
        if groups < 1 or layer.in_features % groups:
            raise InputError(f"the width {layer.in_features} of {name} does not divide into {groups} scale groups")
    for layer in layers.values():
        # `register_parametrization` gives the layer a class of its own, so that its forward can be replaced for it
        # alone. A subclass with another forward keeps its own, through the parametrized weight.
        is_plain = type(layer).forward is nn.Linear.forward
        parametrize.register_parametrization(layer, "weight", WeightScaling(layer.weight, groups))
        if is_plain:
            type(layer).forward = _forward  # type: ignore  # a class of this layer alone
    model.register_state_dict_post_hook(_warn_before_fold)
    return list(layers)


class UnfoldedWarning(UserWarning):
    """A state dict was made of a model whose weight scaling is not folded."""


def _scaled(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer) and parametrize.is_parametrized(module, "weight")
    }


def _warn_before_fold(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    name = next(iter(_scaled(model)), None)
    if name is not None:
        warnings.warn(
            f"the state dict of a model with weight scaling holds {prefix}{name}.parametrizations.weight.original and "
            f"no {prefix}{name}.weight, so a plain model cannot load it: call fold_weight_scaling(model) before "
            "save_pretrained",
            UnfoldedWarning,
            stacklevel=3,
        )


@torch.no_grad()
def fold_weight_scaling(model: nn.Module) -> list[str]:
    """Multiplies every scale into its weight and removes it, in place; returns the names of the folded layers.

    The folded model computes the same up to fp32 rounding. Zeros stay zeros, so prune first and fold afterwards.
    """
    check_model(model)
    scaled = _scaled(model)
    for module in scaled.values():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return list(scaled)
