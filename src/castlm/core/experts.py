"""Experts whose weights are one parameter, as modules that look like linear layers to the rest of castlm.

transformers 5 keeps the experts of a block in parameters such as `experts.gate_up_proj`, (experts, out, in), or
(experts, in, out) where the class says `is_transposed`. Other classes do not say it, or keep the matrices end to end:
(experts * out, in). A `Stack` tells how they lie. The trained weight is always held here as (experts, out, in), so that
masks, moments, scales and solvers have one orientation: groups run along the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.blocks import in_block
from castlm.core.errors import check_type

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""The names that transformers gives the 3-D weights of a module of experts."""


def projections_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D weights of a module of experts by name; empty for a module that states no orientation."""
    if not isinstance(getattr(module, "is_transposed", None), bool):
        return {}
    weights = dict(module.named_parameters(recurse=False))
    return {name: weights[name] for name in _PROJECTIONS if name in weights and weights[name].dim() == 3}


@dataclass(frozen=True)
class Stack:
    """How the matrices of several experts lie in one parameter, and who reads it."""

    num_experts: int
    transposed: bool
    """Whether each matrix is (in, out)."""
    is_flat: bool
    """Whether they lie end to end in one matrix, (experts * rows, columns)."""
    reader: str
    """The module whose forward pass reads the parameter; the owner, or one around it."""


class ExpertLinear(nn.Module):
    """The weight of one projection of all experts of a block: (experts, out, in).

    Calling it gives the tensor as the module of experts reads it: with `transposed`, (experts, in, out), and with
    `is_flat` all of them end to end. Weight scaling and masks in the forward pass are parametrizations of `weight`, as
    for `nn.Linear`, and are computed once for each forward pass of the experts.

    Args:
        weight: the parameter of the model.
        transposed: see `Stack`.
        num_experts: of a parameter with all matrices end to end.
    """

    def __init__(self, weight: Tensor, transposed: bool = False, num_experts: int | None = None) -> None:
        super().__init__()
        self.transposed, self.is_flat = transposed, num_experts is not None
        self.num_experts = len(weight) if num_experts is None else num_experts
        # gpt-oss stores (experts, in, out): (32, 2880, 5760) becomes (32, 5760, 2880), with groups of m along the last
        # axis. DBRX has (16 * 10752, 6144).
        data = self.held(weight.detach()).contiguous()
        self.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
        _, self.out_features, self.in_features = data.shape

    def held(self, stored: Tensor) -> Tensor:
        """(experts, out, in) of a tensor in the form of the model's parameter."""
        apart = stored.unflatten(0, (self.num_experts, -1)) if self.is_flat else stored
        return apart.mT if self.transposed else apart

    def stored(self, weight: Tensor) -> Tensor:
        """The opposite of `held`."""
        laid_out = weight.mT if self.transposed else weight
        return laid_out.flatten(0, 1) if self.is_flat else laid_out

    def forward(self) -> Tensor:
        return self.stored(self.weight)

    def extra_repr(self) -> str:
        stored = ", read as (experts, in, out)" if self.transposed else ""
        return f"experts={self.num_experts}, out_features={self.out_features}, in_features={self.in_features}{stored}"


@torch.no_grad()
def linearize_experts_(model: nn.Module, stacks: Mapping[str, Stack] | None = None) -> list[str]:
    """Holds every 3-D expert weight inside the transformer blocks as an `ExpertLinear`, in place.

    The forward pass, the names in `state_dict()` and what `save_pretrained` writes stay as they were; the new parameter
    is named `...experts.gate_up_proj.weight`. Call it before the optimizer is built and before `fully_shard`.

    Changes modules that state their orientation in `is_transposed`, as transformers' decorator
    `use_experts_implementation` does, and the parameters of `stacks`: a shape such as (8, 64, 64) does not tell it.
    Other experts stay dense.

    Args:
        stacks: further parameters, by name, such as `castlm.models.products.stacks_of` finds.

    Returns:
        The names of the new modules.

    Examples:
        >>> class Experts(nn.Module):
        ...     is_transposed = False
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up_proj = nn.Parameter(torch.ones(2, 8, 4))
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([Experts()])})
        >>> linearize_experts_(model)
        ['layers.0.up_proj']
        >>> list(model.state_dict())
        ['layers.0.up_proj']
    """
    check_type(model, nn.Module, "model must be an nn.Module", "pass castlm.load_model(NAME).model")
    found = dict(stacks or {})
    for fqn, module in model.named_modules():
        for name, weight in projections_of(module).items() if in_block(fqn) else ():
            experts: Any = module
            found[f"{fqn}.{name}"] = Stack(len(weight), experts.is_transposed, False, fqn)
    for path, stack in found.items():
        fqn, _, name = path.rpartition(".")
        owner = model.get_submodule(fqn)
        layer = ExpertLinear(owner.get_parameter(name), stack.transposed, stack.num_experts if stack.is_flat else None)
        if not expert_layers(owner):
            owner.register_state_dict_post_hook(_to_stored_names)
            owner.register_load_state_dict_pre_hook(_from_stored_names)
        delattr(owner, name)
        owner.add_module(name, layer)
    for reader in {stack.reader for stack in found.values()}:
        model.get_submodule(reader).register_forward_pre_hook(_show_weights)
        model.get_submodule(reader).register_forward_hook(_hide_weights, always_call=True)
    return list(found)


def activate(experts: nn.Module, up: Tensor) -> Tensor:
    """The input (..., inner) of the down-projection for the output `up`: gated where the family of models is."""
    module: Any = experts
    inner: Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return inner


def expert_layers(experts: nn.Module) -> dict[str, ExpertLinear]:
    """The projections of a module of experts by name; empty for any other module."""
    return {name: child for name, child in experts.named_children() if isinstance(child, ExpertLinear)}


def _show_weights(reader: nn.Module, args: Any) -> None:
    """During a forward pass, makes `experts.gate_up_proj` the tensor that the code of the model expects."""
    for owner in reader.modules():
        # An instance attribute wins over `nn.Module.__getattr__`, which would return the `ExpertLinear`.
        vars(owner).update({name: layer() for name, layer in expert_layers(owner).items()})


def _hide_weights(reader: nn.Module, args: Any, output: Any) -> None:
    for owner in reader.modules():
        for name in expert_layers(owner):
            vars(owner).pop(name, None)


def _to_stored_names(experts: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, layer in expert_layers(experts).items():
        # The names of a checkpoint stay those of the dense model, whichever module holds the weight meanwhile.
        weight = state_dict.pop(f"{prefix}{name}.weight", None)  # None under weight scaling
        if weight is not None:
            state_dict[f"{prefix}{name}"] = (
                layer.stored(weight).contiguous() if layer.transposed else layer.stored(weight)
            )


def _from_stored_names(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, layer in expert_layers(experts).items():
        weight = state_dict.pop(f"{prefix}{name}", None)
        if weight is not None:
            state_dict[f"{prefix}{name}.weight"] = layer.held(weight)
