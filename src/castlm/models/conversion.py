"""Maps weights in memory to files as transformers does: other names, and one matrix for each expert.

`from_pretrained` stacks the experts of most families and `save_pretrained` takes them apart again. Both follow
transformers' table of conversions, and so does this module, which names no family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from castlm.core.experts import ExpertLinear
from castlm.core.sparsify import weight_parameter
from castlm.models.layout import stored_transposed

if TYPE_CHECKING:  # the loader of packed folders is imported while transformers is
    from transformers import PreTrainedModel


class StoredRows(NamedTuple):
    """A stored matrix with rows of one expert."""

    name: str
    expert: int
    rows: slice


def as_stored(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes for the entry `name` of the state dict, by their names on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    return {key: found.contiguous() for key, found in revert_weight_conversion(model, {name: tensor}).items()}


def state_dict_name(module: nn.Module, fqn: str) -> str:
    """The name of a layer's weight in the state dict; names of experts have no `.weight`."""
    return fqn if isinstance(module, ExpertLinear) else f"{fqn}.weight"


def state_dict_key(model: nn.Module, parameter_name: str) -> str:
    """The name of a parameter in the state dict; names of experts have no `.weight`."""
    module, _, leaf = parameter_name.rpartition(".")
    return state_dict_name(model.get_submodule(module), module) if leaf == "weight" else parameter_name


def is_stored_transposed(model: PreTrainedModel, parameter_name: str) -> bool:
    """Whether files hold a weight as (in, out) or (experts, in, out): of Conv1D layers, and of some experts."""
    layer = model.get_submodule(parameter_name.rpartition(".")[0])
    of_experts = isinstance(layer, ExpertLinear) and layer.transposed
    return of_experts or stored_transposed(model.config.model_type, parameter_name)


def stored_shapes(model: PreTrainedModel, fqn: str, layer: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the stored tensors that hold the weight of layer `fqn`, by name."""
    weight = weight_parameter(layer)  # not `layer.weight`, which gathers a scaled weight from all ranks
    shape = weight.mT.shape if isinstance(layer, ExpertLinear) and layer.transposed else weight.shape
    stored = as_stored(model, state_dict_name(layer, fqn), torch.empty(shape, device="meta"))
    return {name: tensor.shape for name, tensor in stored.items()}


def stored_rows(model: PreTrainedModel, fqn: str, layer: ExpertLinear) -> list[StoredRows] | None:
    """The place of each expert's rows in the files; None if the files do not store experts one by one.

    Sends a column of row numbers through the conversion; the result shows the place of each row.
    """
    if layer.transposed:
        return None
    numbers = torch.arange(layer.num_experts * layer.out_features, device="cpu")
    numbers = numbers.view(layer.num_experts, layer.out_features, 1)
    found = []
    for name, piece in as_stored(model, fqn, numbers).items():
        flat = piece.flatten()
        first, count = int(flat[0]), len(flat)
        expert, row = divmod(first, layer.out_features)
        together = torch.equal(flat, torch.arange(first, first + count, device="cpu"))
        if piece.shape != (count, 1) or not together or row + count > layer.out_features:
            return None
        found.append(StoredRows(name, expert, slice(row, row + count)))
    return found


def loaded_name(model: PreTrainedModel, name: str) -> str:
    """The module or tensor that `from_pretrained` fills from the stored `name`; that may lack the backbone's prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return apply_renamings(f"{name}.", renamings).removesuffix(".")


def possible_names(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """The names that a module or tensor may have in a file or a model: with and without the backbone's prefix."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)
