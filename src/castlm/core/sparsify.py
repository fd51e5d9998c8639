"""Which parameters of a model become sparse, the optimizer's groups for them, and the prune.

The scope is the same as in CAST and the methods it is compared with: linear layers inside the transformer blocks.
Embeddings and the output head stay dense. Every weight that stays dense is listed with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from castlm.core.blocks import block_name, in_block, is_tower, owners_of_experts, why_dense
from castlm.core.errors import InputError, check_type
from castlm.core.experts import ExpertLinear
from castlm.core.nm import NM, Pattern, pack_mask, parse_pattern, unpack_mask
from castlm.core.shards import local


class LinearOfConv1D(nn.Linear):
    """A linear layer whose weight (out, in) transformers stores as (in, out), in a `Conv1D` as GPT-2 has them."""


SparseLayer = nn.Linear | ExpertLinear
"""A layer that may become sparse: a module with `weight` (..., out, in), `in_features` and `out_features`."""

FilterFn = Callable[[nn.Module, str], bool]


def check_model(model: object) -> None:
    """Raises `InputError` for anything but a model in memory, such as the name of one, or what `load_model` returns."""
    check_type(model, nn.Module, "model must be an nn.Module", "pass castlm.load_model(NAME).model")


def num_weights(layer: SparseLayer) -> int:
    """The number of weights of a layer, over all experts and ranks."""
    return weight_parameter(layer).numel()


def matrices(layers: Mapping[str, SparseLayer]) -> dict[str, Tensor]:
    """The weights (out, in) of layers by name; of experts one for each, named by the layer and the number."""
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.weight.dim() == 2:
            weights[name] = layer.weight
        else:
            weights |= {f"{name}.{expert}": weight for expert, weight in enumerate(layer.weight)}
    return weights


def is_sparse_linear(module: nn.Module, fqn: str) -> bool:
    """The default `filter_fn`: an `nn.Linear` inside a numbered transformer block, as `model.layers.3.mlp.up_proj`.

    It also takes the `ExpertLinear` that `linearize_experts_` makes of 3-D experts. Routers of experts, and the vision
    tower and the projector of a vision-language model, stay dense.

    Examples:
        >>> is_sparse_linear(nn.Linear(8, 8), "model.layers.3.mlp.up_proj")
        True
        >>> is_sparse_linear(nn.Linear(8, 8), "lm_head")
        False
    """
    return isinstance(module, SparseLayer) and why_dense(fqn) is None


def filter_for(model: nn.Module, filter_fn: FilterFn = is_sparse_linear) -> FilterFn:
    """`filter_fn`; for the default, the same rule once it knows which modules of `model` hold experts.

    A layer named `gate` outside them is a layer like any other.
    """
    if filter_fn is not is_sparse_linear:
        return filter_fn
    owners = owners_of_experts(name for name, _ in model.named_modules())
    return lambda module, fqn: isinstance(module, SparseLayer) and why_dense(fqn, owners) is None


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model by name, in order: the numbered modules that are not inside another."""
    return {fqn: module for fqn, module in model.named_modules() if fqn and block_name(fqn) == fqn}


@dataclass(frozen=True)
class Scope:
    """The layers of a model that become sparse, and their pattern."""

    pattern: Pattern
    layers: dict[str, SparseLayer]
    left_dense: dict[str, str]
    """The reason for each weight with two or more dimensions that stays dense, by name."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weight of each layer, see `weight_parameter`."""
        return {name: weight_parameter(layer) for name, layer in self.layers.items()}


def sparse_linears(
    model: nn.Module, pattern: Pattern | str = "2:4", filter_fn: FilterFn = is_sparse_linear
) -> tuple[dict[str, SparseLayer], dict[str, str]]:
    """The layers of `model` that become sparse, and what stays dense with the reason.

    Args:
        pattern: a `Pattern` or its text.
        filter_fn: `filter_fn(module, fqn)` says whether a module is meant to be sparse. It is called for every linear
            layer and every `ExpertLinear`.

    Returns:
        Sparse layers by name, and a reason by the name of each weight with two or more dimensions that stays dense.

    Raises:
        InputError: a bad pattern, or no layer to make sparse.

    Examples:
        >>> layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])
        >>> model = nn.ModuleDict({"layers": layers, "head": nn.Linear(8, 9)})
        >>> sparse, dense = sparse_linears(model, "2:4")
        >>> list(sparse)
        ['layers.0']
        >>> dense
        {'layers.1': 'its width 6 does not divide by m = 4', 'head.weight': 'outside the transformer blocks'}
    """
    scope = scope_of(model, pattern, filter_fn)
    return scope.layers, scope.left_dense


def scope_of(model: nn.Module, pattern: Pattern | str = "2:4", filter_fn: FilterFn = is_sparse_linear) -> Scope:
    """The layers of `model` that become sparse, as `sparse_linears` finds them, and their pattern."""
    check_model(model)
    pattern = parse_pattern(pattern)
    sparse: dict[str, SparseLayer] = {}
    dense: dict[str, str] = {}
    chooses = filter_for(model, filter_fn)
    owners = owners_of_experts(name for name, _ in model.named_modules())
    for fqn, module in model.named_modules(remove_duplicate=True):
        # The inside of a parametrized layer, such as its scales; the layer itself is met under its own name.
        if "parametrizations" in fqn.split("."):
            continue
        if isinstance(module, SparseLayer) and chooses(module, fqn):
            own = pattern.at(fqn)
            misfit = own.misfit((module.out_features, module.in_features))
            if isinstance(module, ExpertLinear) and not isinstance(own, NM):
                misfit = "only n:m patterns are defined for experts"
            if misfit:
                dense[fqn] = misfit
            else:
                sparse[fqn] = module
            continue
        for name, param in module.named_parameters(recurse=False):
            reason = _why_dense(module, fqn, name, param, owners)
            if reason:
                dense[f"{fqn}.{name}".lstrip(".")] = reason
    if not sparse:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
        remedy = ": filter_fn=lambda module, name: True takes the linear layers of any module"
        if filter_fn is not is_sparse_linear:
            remedy = ": filter_fn(module, name) chose none that fits"
        if any(type(module).__name__ == "Conv1D" for module in model.modules()):
            remedy = ": load it with castlm.load_model, which makes linear layers of its Conv1D"
        raise InputError(f"no linear layer to make {pattern} sparse in {type(model).__name__} ({reasons}){remedy}")
    return Scope(pattern, sparse, dense)


def _why_dense(module: nn.Module, fqn: str, name: str, param: Tensor, owners: Collection[str]) -> str | None:
    why = why_dense(fqn, owners)
    if isinstance(module, SparseLayer) and name == "weight":
        return why or "excluded by the filter"
    if param.dim() >= 2 and why and (in_block(fqn) or is_tower(fqn)):
        return why
    if param.dim() == 2 and name.endswith("proj_bias"):
        return "a bias of experts"
    if param.dim() == 3:
        shape = tuple(param.shape)
        return f"experts of shape {shape} in a {type(module).__name__}: linearize_experts_ must have made them layers"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return f"a parameter of {type(module).__name__}, not of a linear layer" if param.dim() >= 2 else None


def weight_parameter(layer: SparseLayer) -> Tensor:
    """The trained weight of a layer, (out, in) or (experts, out, in): the parameter beneath weight scaling, if any.

    Masks belong to this parameter. `layer.weight` of a layer with weight scaling is the product `W * A`, a new tensor
    at each access.
    """
    if parametrize.is_parametrized(layer, "weight"):
        return layer.get_parameter("parametrizations.weight.original")
    return layer.weight


class _WithoutHooks(nn.Module):
    """Calls a module without its hooks, because FSDP's would gather all rows of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, weight: Tensor) -> Tensor:
        computed: Tensor = self.module.forward(weight)
        return computed


def computed_weight(layer: SparseLayer, take: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight that a layer computes with; `take` gives all rows of a parameter, or this rank's rows."""
    weight = take(weight_parameter(layer))
    if parametrize.is_parametrized(layer, "weight"):
        for part in layer.get_submodule("parametrizations.weight").children():
            own = {f"module.{name}": take(parameter) for name, parameter in part.named_parameters()}
            weight = functional_call(_WithoutHooks(part), own, (weight,))
    return weight


def dense_name(name: str) -> str:
    """The name in the dense model of a parameter such as `layers.0.parametrizations.weight.original`."""
    return re.sub(r"\.parametrizations\.weight\.original$", ".weight", name)


def sparse_param_groups(
    model: nn.Module, pattern: Pattern | str = "2:4", filter_fn: FilterFn = is_sparse_linear
) -> list[dict[str, Any]]:
    """The parameter groups of a model for `AdamS`: sparse weights, and all other trainable parameters.

    There is one group of sparse weights, unless the pattern differs from layer to layer. Each group has `param_names`
    beside `params`. A sparse group has `"sparse": True` and `"pattern"`. Arguments and errors are as for
    `sparse_linears`.

    Examples:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
        >>> [(group["param_names"], group["sparse"]) for group in sparse_param_groups(model)]
        [(['layers.0.weight'], True), (['layers.0.bias'], False)]
    """
    scope = scope_of(model, pattern, filter_fn)
    # By identity, because a tensor compares element by element.
    name_of = {id(weight): name for name, weight in scope.weights.items()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers_of: dict[Pattern, set[str]] = {}  # one entry unless the pattern differs from layer to layer
    for name in scope.layers:
        layers_of.setdefault(scope.pattern.at(name), set()).add(name)
    groups: list[dict[str, Any]] = []
    for part, layers in layers_of.items():
        chosen = [(name, p) for name, p in named if name_of.get(id(p)) in layers]  # frozen weights are in no group
        groups.append(
            {
                "params": [p for _, p in chosen],
                "param_names": [name for name, _ in chosen],
                "sparse": True,
                "pattern": part,
            }
        )
    others = [(name, p) for name, p in named if id(p) not in name_of]
    groups.append({"params": [p for _, p in others], "param_names": [name for name, _ in others], "sparse": False})
    return groups


def _is_masked(masks: Mapping[Tensor, Tensor], module: nn.Module, fqn: str) -> bool:
    """A `filter_fn` that takes the layers whose weight has a mask."""
    return isinstance(module, SparseLayer) and weight_parameter(module) in masks


@torch.no_grad()
def prune_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    masks: Mapping[Tensor, Tensor] | None = None,
    filter_fn: FilterFn | None = None,
) -> list[str]:
    """Sets masked weights to zero, in place.

    Args:
        pattern: a `Pattern` or its text.
        masks: the bool mask of each sparse parameter (..., out, in), True = kept, as `AdamS.masks()` returns or from a
            rule of your own; None prunes by magnitude.
        filter_fn: as in `sparse_linears`. By default the layers that have a mask, and without `masks` those that
            `is_sparse_linear` takes.

    Returns:
        The names of the pruned layers.

    Raises:
        InputError: a bad pattern, no sparse layer, NaN in a weight, or a mask that is missing, of a tensor that is no
            weight of these layers, of another shape or dtype, or keeps more than the pattern does. No weight has been
            changed then.

    Examples:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 1)])})
        >>> _ = model["layers"][0].weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
        >>> prune_(model, "2:4")
        ['layers.0']
        >>> model["layers"][0].weight.tolist()
        [[0.0, -3.0, 2.0, 0.0]]
    """
    check_model(model)
    check_type(masks, (Mapping, NoneType), "masks must map each weight to its mask", "pass AdamS.masks()")
    if filter_fn is None:
        filter_fn = is_sparse_linear if masks is None else partial(_is_masked, masks)
    scope = scope_of(model, pattern, filter_fn)
    weights = scope.weights
    if masks is not None and (unknown := len(masks.keys() - set(weights.values()))):
        raise InputError(
            f"{unknown} of {len(masks)} masks are of tensors that are no weight of these layers of the model: pass the "
            "masks of the optimizer that trained this model"
        )
    for name, weight in weights.items():
        scope.pattern.check_placement(weight)
        if masks is not None and weight not in masks:
            raise InputError(f"there is no mask for {name}: pass the masks of the optimizer that trained this model")
        if masks is not None:
            # All masks are checked before the first weight changes: an error leaves the model as it was.
            scope.pattern.at(name).check_mask(local(masks[weight]), weight)
    chosen: Iterable[tuple[str, Tensor]] = magnitude_masks(weights, scope.pattern)
    if masks is not None:
        chosen = ((name, local(masks[weight])) for name, weight in weights.items())
    # All masks before any weight changes, as a NaN is only found while its mask is made; in bits, to save memory.
    packed = {name: pack_mask(mask) for name, mask in chosen}
    for name, weight in weights.items():
        mask = unpack_mask(packed[name], weight.shape[-1])
        # masked_fill and not a product, because 0 * -1 is -0, which has other bits than 0
        local(weight).masked_fill_(~mask.to(weight.device), 0.0)
    return list(weights)


def magnitude_masks(weights: Mapping[str, Tensor], pattern: Pattern) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each weight (out, in) and its mask by magnitude, for the rows that this rank holds."""
    for name, weight in weights.items():
        yield name, pattern.at(name).mask(local(weight.detach()))
