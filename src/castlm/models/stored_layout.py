"""Where the weights of a model in memory lie in its files: the one answer for loading, sharding, packing and export.

`from_pretrained` renames weights, stacks the experts of most families, and reads Conv1D weights as (in, out);
`save_pretrained` takes all that back. Both follow transformers' table of conversions. So does this module, which names
no family: it sends tensors without memory through the conversion and looks at what comes out.

    memory                                   files                                     parts
    model.layers.0.mlp.up_proj.weight        model.layers.0.mlp.up_proj.weight         one: all rows, axis 1
    transformer.h.0.attn.c_attn (96, 32)     transformer.h.0.attn.c_attn (32, 96)      one: all rows, axis 0
    ...experts.gate_up_proj (4, 96, 32)      ...experts.0.gate_proj (48, 32)           8: expert 0, rows 0 to 48, axis 1
                                             ...experts.0.up_proj   (48, 32) ...          expert 0, rows 48 to 96 ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from castlm.core.blocks import block_name
from castlm.core.experts import ExpertLinear
from castlm.core.sparsify import LinearOfConv1D, SparseLayer, weight_parameter

if TYPE_CHECKING:  # the loader of packed folders is imported while transformers is
    from transformers import PreTrainedModel


class Part(NamedTuple):
    """A stored tensor that holds weights of one layer."""

    name: str
    """Its name in the files."""
    shape: tuple[int, ...]
    """Its shape there."""
    expert: int | None
    """The expert whose matrix it is a part of; None if it holds all experts of the layer, or the layer has none."""
    rows: slice
    """The rows of the layer's weight (out, in), or of the expert's, that it holds."""
    axis: int
    """Its axis along which n:m groups run: the input features."""

    @property
    def stem(self) -> str:
        """Its name in a packed file: without `.weight`, or the whole name of a tensor that holds all experts."""
        return self.name if len(self.shape) == 3 else self.name.removesuffix(".weight")

    @property
    def is_transposed(self) -> bool:
        """Whether it is stored as (in, out)."""
        return self.axis == len(self.shape) - 2


class StoredLayout:
    """The place of each weight of a model in its files.

    Args:
        model: in memory, or on the meta device; Conv1D and experts are layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    # ---- layers

    def parts(self, fqn: str, layer: SparseLayer | None = None) -> list[Part]:
        """The stored tensors that hold the weight of a layer, in the order of experts and rows.

        Args:
            fqn: the name of the layer in the model.
            layer: the layer, if it does not stand in the model yet.
        """
        module = layer or self.model.get_submodule(fqn)
        assert isinstance(module, SparseLayer)
        shape = weight_parameter(module).shape  # not `layer.weight`, which gathers a scaled weight from all ranks
        if isinstance(module, ExpertLinear) and not module.transposed and (each := self._parts_of_experts(fqn, module)):
            return each
        form = _in_files(module, torch.empty(shape, device="meta"))
        stored = self._converted({_state_dict_name(module, fqn): form})
        whole = slice(0, module.out_features)
        return [
            Part(name, tuple(tensor.shape), None, whole, tensor.dim() - (2 if _is_transposed(module) else 1))
            for name, tensor in stored.items()
        ]

    def _parts_of_experts(self, fqn: str, layer: ExpertLinear) -> list[Part] | None:
        """The parts of experts that are stored one by one; None if they are stored otherwise.

        Sends a column of row numbers through the conversion; the result shows the place of each row.
        """
        numbers = torch.arange(layer.num_experts * layer.out_features, device="cpu")
        numbers = numbers.view(layer.num_experts, layer.out_features, 1)  # (4, 96, 1) of 4 experts with 96 rows
        parts = []
        for name, piece in self._converted({fqn: numbers}).items():
            flat = piece.flatten()
            first, count = int(flat[0]), len(flat)
            expert, row = divmod(first, layer.out_features)
            together = torch.equal(flat, torch.arange(first, first + count, device="cpu"))
            if piece.shape != (count, 1) or not together or row + count > layer.out_features:
                return None
            parts.append(Part(name, (count, layer.in_features), expert, slice(row, row + count), 1))
        return sorted(parts, key=lambda part: (part.expert or 0, part.rows.start))

    # ---- all weights

    def key(self, parameter_name: str) -> str:
        """The name of a parameter in the state dict; names of experts have no `.weight`."""
        module, _, leaf = parameter_name.rpartition(".")
        return _state_dict_name(self.model.get_submodule(module), module) if leaf == "weight" else parameter_name

    def is_transposed(self, parameter_name: str) -> bool:
        """Whether files hold a parameter as (in, out) or (experts, in, out): of Conv1D layers, and of some experts."""
        fqn, _, leaf = parameter_name.rpartition(".")
        return leaf == "weight" and _is_transposed(self.model.get_submodule(fqn))

    def in_files(self, parameter_name: str, value: Tensor) -> Tensor:
        """The value of a parameter in the form that the files hold, before transformers splits or renames it."""
        fqn, _, leaf = parameter_name.rpartition(".")
        return _in_files(self.model.get_submodule(fqn), value) if leaf == "weight" else value

    def to_stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors for values of parameters and buffers, by their names on disk; contiguous copies or views.

        Args:
            values: by name in the model. transformers makes one stored tensor of several values in some families, all
                of one transformer block, so pass whole blocks (`by_block`).
        """
        laid_out = {self.key(name): self.in_files(name, value) for name, value in values.items()}
        return {name: tensor.contiguous() for name, tensor in self._converted(laid_out).items()}

    def _converted(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self.model, dict(values))
        return found

    def loaded_name(self, name: str) -> str:
        """The module or tensor that `from_pretrained` fills from the stored `name`.

        That may lack the backbone's prefix.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [step for step in get_model_conversion_mapping(self.model) if isinstance(step, WeightRenaming)]
        return apply_renamings(f"{name}.", renamings).removesuffix(".")

    def possible_names(self, name: str) -> tuple[str, str, str]:
        """The names that a module or tensor may have in a file or a model: with and without the backbone's prefix."""
        prefix = f"{self.model.base_model_prefix}."
        return name, prefix + name, name.removeprefix(prefix)


def by_block(names: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Groups values of a model by transformer block, in the order of the first name of each; the others are one group.

    Examples:
        >>> [list(group) for group in by_block(dict.fromkeys(["wte", "h.0.a", "h.1.a", "h.0.b", "ln"]))]
        [['wte', 'ln'], ['h.0.a', 'h.0.b'], ['h.1.a']]
    """
    groups: dict[str | None, dict[str, Tensor]] = {}
    for name, value in names.items():
        groups.setdefault(block_name(name), {})[name] = value
    yield from groups.values()


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, LinearOfConv1D) or (isinstance(layer, ExpertLinear) and layer.transposed)


def _in_files(layer: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(layer, ExpertLinear):
        return layer.stored(weight).contiguous() if layer.transposed else layer.stored(weight)
    return weight.mT.contiguous() if isinstance(layer, LinearOfConv1D) else weight


def _state_dict_name(module: nn.Module, fqn: str) -> str:
    return fqn if isinstance(module, ExpertLinear) else f"{fqn}.weight"
