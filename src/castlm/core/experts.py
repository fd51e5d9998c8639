"""Experts whose weights are one 3-D parameter, as modules that look like linear layers to the rest of castlm.

transformers 5 keeps the experts of a block in parameters such as `experts.gate_up_proj`, (experts, out, in), or
(experts, in, out) where the class says `is_transposed`. The trained weight is always held here as (experts, out, in),
so that masks, moments, scales and solvers have one orientation: groups run along the last axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.blocks import in_block
from castlm.core.errors import check_type

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""The names that transformers gives the 3-D weights of a module of experts."""


class ExpertLinear(nn.Module):
    """The weight of one projection of all experts of a block: (experts, out, in).

    Calling it gives the tensor as the module of experts reads it: with `transposed`, (experts, in, out). Weight scaling
    and masks in the forward pass are parametrizations of `weight`, as for `nn.Linear`, and are computed once for each
    forward pass of the experts.
    """

    def __init__(self, weight: Tensor, transposed: bool = False) -> None:
        super().__init__()
        # gpt-oss stores (experts, in, out): (32, 2880, 5760) becomes (32, 5760, 2880), with groups of m along the last
        # axis.
        data = weight.detach().mT.contiguous() if transposed else weight.detach()
        self.weight = nn.Parameter(data, requires_grad=weight.requires_grad)
        self.transposed = transposed
        self.num_experts, self.out_features, self.in_features = data.shape

    def forward(self) -> Tensor:
        return self.weight.mT if self.transposed else self.weight

    def extra_repr(self) -> str:
        stored = ", read as (experts, in, out)" if self.transposed else ""
        return f"experts={self.num_experts}, out_features={self.out_features}, in_features={self.in_features}{stored}"


@torch.no_grad()
def linearize_experts_(model: nn.Module) -> list[str]:
    """Holds every 3-D expert weight inside the transformer blocks as an `ExpertLinear`, in place.

    The forward pass, the names in `state_dict()` and what `save_pretrained` writes stay as they were; the new parameter
    is named `...experts.gate_up_proj.weight`. Call it before the optimizer is built and before `fully_shard`.

    Changes only modules that state their orientation in `is_transposed`, as transformers' decorator
    `use_experts_implementation` does: a shape such as (8, 64, 64) does not tell it. Other experts stay dense.

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
    made = []
    for fqn, module in list(model.named_modules()):
        transposed = getattr(module, "is_transposed", None)
        weights = {name: module._parameters.get(name) for name in PROJECTIONS}
        names = [name for name, weight in weights.items() if weight is not None and weight.dim() == 3]
        if not names or not isinstance(transposed, bool) or not in_block(fqn):
            continue
        for name in names:
            weight = module.get_parameter(name)
            delattr(module, name)
            module.add_module(name, ExpertLinear(weight, transposed))
            made.append(f"{fqn}.{name}")
        module.register_forward_pre_hook(_show_weights)
        module.register_forward_hook(_hide_weights, always_call=True)
        module.register_state_dict_post_hook(_to_stored_names)
        module.register_load_state_dict_pre_hook(_from_stored_names)
    return made


def expert_layers(experts: nn.Module) -> dict[str, ExpertLinear]:
    """The projections of a module of experts by name; empty for any other module."""
    return {name: child for name, child in experts._modules.items() if isinstance(child, ExpertLinear)}


def _show_weights(experts: nn.Module, args: Any) -> None:
    """During a forward pass, makes `experts.gate_up_proj` the tensor that the code of the model expects."""
    # An instance attribute wins over `nn.Module.__getattr__`, which would return the `ExpertLinear`.
    vars(experts).update({name: layer() for name, layer in expert_layers(experts).items()})


def _hide_weights(experts: nn.Module, args: Any, output: Any) -> None:
    for name in expert_layers(experts):
        vars(experts).pop(name, None)


def _to_stored_names(experts: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, layer in expert_layers(experts).items():
        # The names of a checkpoint stay those of the dense model, whichever module holds the weight meanwhile.
        weight = state_dict.pop(f"{prefix}{name}.weight", None)  # None under weight scaling
        if weight is not None:
            state_dict[f"{prefix}{name}"] = weight.mT.contiguous() if layer.transposed else weight


def _from_stored_names(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, layer in expert_layers(experts).items():
        weight = state_dict.pop(f"{prefix}{name}", None)
        if weight is not None:
            state_dict[f"{prefix}{name}.weight"] = weight.mT if layer.transposed else weight
