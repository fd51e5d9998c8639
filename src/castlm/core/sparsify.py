"""Which parameters of a model become sparse, the optimizer's groups for them, and the prune itself.

The scope is CAST's and every rival's: the linear layers inside the transformer blocks; embeddings and output head stay
dense. What is left dense inside a block is listed with its reason, never passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError
from castlm.core.masks import nm_mask
from castlm.core.pattern import check_pattern

FilterFn = Callable[[nn.Module, str], bool]


def is_sparse_linear(module: nn.Module, fqn: str) -> bool:
    """The default `filter_fn`: an `nn.Linear` inside a numbered block, as `model.layers.3.mlp.up_proj` is."""
    return isinstance(module, nn.Linear) and any(part.isdigit() for part in fqn.split("."))


def sparse_linears(
    model: nn.Module, n: int = 2, m: int = 4, filter_fn: FilterFn = is_sparse_linear
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers of `model` that are made n:m sparse, and what is left dense with the reason.

    Args:
        filter_fn: `filter_fn(module, fqn)` says whether a module is meant to be sparse; it is asked for every module
            except those inside a parametrization.

    Returns:
        Sparse layers by name, and a reason by the name of each weight of two or more dimensions left dense.

    Raises:
        InputError: a bad pattern, or no layer to make sparse.
    """
    check_pattern(n, m)
    sparse: dict[str, nn.Linear] = {}
    dense: dict[str, str] = {}
    for fqn, module in model.named_modules(remove_duplicate=True):
        if "parametrizations" in fqn:
            continue
        if isinstance(module, nn.Linear) and filter_fn(module, fqn):
            if module.in_features % m:
                dense[fqn] = f"its width {module.in_features} does not divide by m = {m}"
            else:
                sparse[fqn] = module
            continue
        for name, param in module.named_parameters(recurse=False):
            full = f"{fqn}.{name}".lstrip(".")
            if param.dim() == 3:
                dense[full] = f"fused experts of shape {tuple(param.shape)}"
            elif isinstance(module, nn.Embedding):
                dense[full] = "embedding"
            elif isinstance(module, nn.Linear) and name == "weight":
                dense[full] = "left out by the filter" if is_sparse_linear(module, fqn) else "outside the blocks"
            elif param.dim() >= 2:
                dense[full] = f"a parameter of {type(module).__name__}, not of a linear layer"
    if not sparse:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
        raise InputError(f"no linear layer to make {n}:{m} sparse in {type(model).__name__} ({reasons})")
    return sparse, dense


def weight_parameter(layer: nn.Linear) -> Tensor:
    """The trained weight (out, in) of a layer, under its weight scaling where it has one."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.get_parameter("parametrizations.weight.original")
    return layer.weight


def dense_name(name: str) -> str:
    """The name in the dense model of a parameter that may be under weight scaling or a mask in the forward pass."""
    return re.sub(r"\.parametrizations\.weight\.original$", ".weight", name)


def sparse_param_groups(
    model: nn.Module, n: int = 2, m: int = 4, filter_fn: FilterFn = is_sparse_linear
) -> list[dict[str, Any]]:
    """The two parameter groups of a model for `AdamS`: sparse weights with `sparse, n, m`, and all other trained ones.

    Each group carries `param_names` beside `params`.

    Raises:
        InputError: a bad pattern, or no layer to make sparse.
    """
    layers, _ = sparse_linears(model, n, m, filter_fn)
    sparse = {id(weight_parameter(layer)) for layer in layers.values()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for is_sparse in (True, False):
        chosen = [(name, p) for name, p in named if (id(p) in sparse) == is_sparse]
        groups.append({"params": [p for _, p in chosen], "param_names": [name for name, _ in chosen]})
    return [{**groups[0], "sparse": True, "n": n, "m": m}, {**groups[1], "sparse": False}]


@torch.no_grad()
def prune_(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    masks: Mapping[Tensor, Tensor] | None = None,
    filter_fn: FilterFn = is_sparse_linear,
) -> list[str]:
    """Zeroes what the masks leave out, in place.

    Args:
        masks: bool mask by sparse parameter, as `AdamS.masks()` gives; None prunes by magnitude.

    Returns:
        The names of the pruned layers.

    Raises:
        InputError: a bad pattern, no sparse layer, NaN in a weight, or a sparse layer without a mask in `masks`.
    """
    layers, _ = sparse_linears(model, n, m, filter_fn)
    for name, layer in layers.items():
        weight = weight_parameter(layer)
        if masks is not None and weight not in masks:
            raise InputError(f"there is no mask for {name}: pass the masks of the optimizer that trained this model")
        # masked_fill and not a product: 0 * -1 is -0, and a zero that compares unequal in bits is a needless surprise
        weight.masked_fill_(~(nm_mask(weight, n, m) if masks is None else masks[weight]), 0.0)
    return list(layers)
