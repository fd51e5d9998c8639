"""Packed experts of a transformer block: loads their matrices from a packed folder, and computes their forward.

A packed folder stores the experts' matrices as the plain one does: separately, such as `experts.7.up_proj`, or stacked
for a whole block. After loading, each expert consists of packed linear layers, which multiply the tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, activate, projections_of
from castlm.models.stored_layout import StoredLayout
from castlm.packed.layers import PackedLinear, PackedModule
from castlm.packed.tensor import unpack
from castlm_runtime.packed import PackedSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedStack(PackedModule):
    """The stored tensors of one projection of all experts, (experts * out, in), before they are split."""

    def apart(self, of_expert: int) -> list[PackedLinear]:
        """Splits the stack into packed layers, `of_expert` for each expert, which read their rows from the file."""
        spec, source = self.spec, self.source
        count = spec.experts * of_expert
        one = replace(spec, rows=spec.rows // count, experts=0, transposed=False)
        layers = [PackedLinear(one) for _ in range(count)]
        for number, layer in enumerate(layers):
            first, end = number * one.rows, (number + 1) * one.rows
            layer.read_from_({suffix: tensor.rows(first, end) for suffix, tensor in source.items()})
        return layers


@dataclass(frozen=True)
class _Projection:
    """One projection of a module of experts whose weight is packed."""

    name: str
    num_experts: int
    transposed: bool
    pieces: tuple[tuple[str, ...], ...]
    """For each expert, the paths of the matrices whose rows follow each other in this projection; empty if stacked."""


class PackedExperts(nn.Module):
    """Takes the place of a module of experts in transformers' model; its weights are packed layers.

    Biases and a norm keep their names. The `dense` module is no part of the model meanwhile: it has the gate between
    the projections, and takes its place again in `unpack_experts_`.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self._dense = (dense,)  # in a tuple, so that its parameters are not the model's
        self.projections: list[_Projection] = []
        for name, parameter in dense.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in dense.named_children():
            self.add_module(name, child)

    @property
    def dense(self) -> Any:
        return self._dense[0]

    def layers_of(self, name: str) -> list[list[PackedModule]]:
        """The packed layers of each expert in the projection `name`, in the order of its rows."""
        pieces = next((of.pieces for of in self.projections if of.name == name), ())
        return [[self._layer(path) for path in of_expert] for of_expert in pieces]

    def pack_(self, model: PreTrainedModel, fqn: str, name: str, specs: Mapping[str, PackedSpec]) -> dict[str, str]:
        """Replaces the 3-D weight `name` of these experts, which stand at `fqn`, by packed layers without values.

        Returns:
            The place of each stored name.

        Raises:
            InputError: `specs` lack a part of it.
        """
        path = f"{fqn}.{name}"
        weight = torch.empty(self.get_parameter(name).shape, device="meta")
        with torch.device("meta"):
            like = ExpertLinear(weight, self.dense.is_transposed)
        layout = StoredLayout(model)
        stack = next((stem for stem, spec in specs.items() if spec.experts and layout.loaded_name(stem) == path), None)
        delattr(self, name)
        if stack is not None:
            shape = like.num_experts * like.out_features, like.in_features, like.num_experts
            self.add_module(name, PackedStack(_spec_of_shape(specs, stack, shape, path)))
            self.projections.append(_Projection(name, like.num_experts, like.transposed, ()))
            return {stack: path}
        parts = layout.parts(path, like)
        if parts[0].expert is None:
            raise InputError(f"only some of the experts {fqn} are packed: load the model after castlm unpack")
        pieces: list[list[str]] = [[] for _ in range(like.num_experts)]
        places = {}
        for part in parts:  # in the order of rows
            below = layout.loaded_name(part.stem).removeprefix(f"{fqn}.")
            rows, columns = part.shape
            _add(self, below, PackedLinear(_spec_of_shape(specs, part.stem, (rows, columns, 0), path)))
            pieces[part.expert or 0].append(below)
            places[part.stem] = f"{fqn}.{below}"
        self.projections.append(_Projection(name, like.num_experts, like.transposed, tuple(map(tuple, pieces))))
        return places

    def take_stacks_apart_(self) -> None:
        """Gives each expert its own packed layers, once the file of a stack is known; gate and up are two, as in the
        engine.
        """
        for index, projection in enumerate(self.projections):
            if not projection.pieces:
                stack = self.get_submodule(projection.name)
                assert isinstance(stack, PackedStack)
                delattr(self, projection.name)
                of_expert = 2 if projection.name == "gate_up_proj" else 1
                layers = stack.apart(of_expert)
                paths = [f"{projection.name}.{number}" for number in range(len(layers))]
                for path, layer in zip(paths, layers):
                    _add(self, path, layer)
                pieces = tuple(tuple(paths[i : i + of_expert]) for i in range(0, len(paths), of_expert))
                self.projections[index] = replace(projection, pieces=pieces)

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The module of transformers, with its 3-D weights in `dtype`, and biases as loaded."""
        for name, parameter in self.named_parameters(recurse=False):
            self.dense.register_parameter(name, parameter)
        for projection in self.projections:
            self.dense.register_parameter(projection.name, nn.Parameter(self._unpacked(projection, dtype)))
        return self.dense  # type: ignore[no-any-return]

    def _unpacked(self, projection: _Projection, dtype: torch.dtype) -> Tensor:
        """The 3-D weight in the layout of the module of experts."""
        if projection.pieces:
            pieces = [[unpack(self._layer(path).stored, dtype) for path in paths] for paths in projection.pieces]
            weight = torch.stack([torch.cat(of_expert) for of_expert in pieces])
        else:
            stack = unpack(self._layer(projection.name).stored, dtype)
            weight = stack.view(projection.num_experts, -1, stack.shape[1])
        return weight.mT.contiguous() if projection.transposed else weight

    def _layer(self, path: str) -> PackedModule:
        layer = self.get_submodule(path)
        assert isinstance(layer, PackedModule)
        return layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The forward of transformers' experts, one expert at a time.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, top_k), the experts of each token; top_k_weights: of the same shape.
        """
        dense = self.dense
        up, down = self.projections
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            x = self._multiply(up, expert, hidden_states[token])
            x = activate(dense, x)
            x = self._multiply(down, expert, x)
            if getattr(dense, "has_post_expert_norm", False):
                x = self.get_submodule("post_expert_norm")(x)
            out.index_add_(0, token, (x * top_k_weights[token, slot, None]).to(out.dtype))
        return out

    def _multiply(self, projection: _Projection, expert: int, x: Tensor) -> Tensor:
        pieces = [self.get_submodule(path)(x) for path in projection.pieces[expert]]
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        bias = getattr(self, f"{projection.name}_bias", None)
        return out if bias is None else out + bias[expert]


def replace_experts_(model: PreTrainedModel, specs: Mapping[str, PackedSpec]) -> dict[str, str]:
    """Replaces the experts whose 3-D weights `specs` hold packed by `PackedExperts` without values.

    Returns:
        The place of each name in `specs` that was placed.

    Raises:
        InputError: only some of the experts are packed.
    """
    placed: dict[str, str] = {}
    stored_at = set(map(StoredLayout(model).loaded_name, specs))
    for fqn, module in list(model.named_modules()):
        names = projections_of(module)
        if not names or not any(path.startswith(f"{fqn}.") for path in stored_at):
            continue
        packed = PackedExperts(module)
        for name in names:
            placed |= packed.pack_(model, fqn, name, specs)
        model.set_submodule(fqn, packed)
    return placed


def _spec_of_shape(specs: Mapping[str, PackedSpec], stem: str, shape: tuple[int, int, int], path: str) -> PackedSpec:
    """The spec of a stored matrix, which must have these rows, columns and experts for the weight at `path`."""
    spec = specs.get(stem)
    if spec is None or (spec.rows, spec.columns, spec.experts) != shape:
        raise InputError(f"{stem} is not packed as {path} needs it: load the model after castlm unpack")
    return spec


def _add(module: nn.Module, path: str, leaf: nn.Module) -> None:
    """Adds `leaf` at `path` below `module`, with plain modules in between."""
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.add_module(last, leaf)


def take_stacks_apart_(model: nn.Module) -> None:
    """Gives each expert its own packed layers, once the files of the stacks are known."""
    for module in list(model.modules()):
        if isinstance(module, PackedExperts):
            module.take_stacks_apart_()


def unpack_experts_(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts transformers' modules of experts back in their places, with unpacked weights."""
    for fqn, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(fqn, module.to_dense(dtype))
