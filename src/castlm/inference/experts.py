"""Packed experts of a transformer block: loads their matrices from a packed folder, and computes their forward.

A packed folder stores the experts' matrices as the plain one does: separately, such as `experts.7.up_proj`, or stacked
for a whole block. After loading, each expert consists of packed linear layers, which multiply the tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.experts import PROJECTIONS, ExpertLinear
from castlm.inference.formats import PackedSpec
from castlm.inference.layers import PackedLinear, PackedModule
from castlm.inference.packed import PackedTensor, unpack
from castlm.models.conversion import loaded_name, stored_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedStack(PackedModule):
    """The stored tensors of one projection of all experts, (experts * out, in), before they are split."""

    def apart(self) -> list[PackedLinear]:
        """Splits the stack into one packed layer per expert, which reads its rows from the shared file."""
        spec, source = self.spec, self.source
        one = replace(spec, rows=spec.rows // spec.experts, experts=0, transposed=False)
        layers = [PackedLinear(one) for _ in range(spec.experts)]
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


def replace_experts_(model: PreTrainedModel, specs: Mapping[str, PackedSpec]) -> dict[str, str]:
    """Replaces the 3-D weights that `specs` hold packed by packed layers without values.

    Returns:
        The place of each name in `specs` that was placed.

    Raises:
        InputError: only some of the experts are packed.
    """
    placed: dict[str, str] = {}
    for fqn, module in list(model.named_modules()):
        transposed = getattr(module, "is_transposed", None)
        weights = {name: module._parameters.get(name) for name in PROJECTIONS}
        three = {name: weight for name, weight in weights.items() if weight is not None and weight.dim() == 3}
        if not three or not isinstance(transposed, bool):
            continue
        found = [_place_(model, f"{fqn}.{name}", transposed, specs) for name in three]
        if not any(found):
            continue
        projections = []
        for of_name in found:
            if of_name is None:
                raise InputError(f"only some of the experts {fqn} are packed: load the model after castlm unpack")
            projection, places = of_name
            projections.append(projection)
            placed |= places
        module.castlm_projections = projections  # type: ignore[assignment]
        module.forward = MethodType(packed_experts_forward, module)
        vars(module)["_is_hf_initialized"] = True  # transformers would fill the removed weights
    return placed


def _place_(
    model: PreTrainedModel, path: str, transposed: bool, specs: Mapping[str, PackedSpec]
) -> tuple[_Projection, dict[str, str]] | None:
    """Replaces the 3-D weight at `path` by packed layers.

    Returns:
        Its projection, and the place of each stored name; None if `specs` hold no part of it.
    """
    fqn, _, name = path.rpartition(".")
    module = model.get_submodule(fqn)
    weight = torch.empty(module.get_parameter(name).shape, device="meta")
    with torch.device("meta"):
        like = ExpertLinear(weight, transposed)
    stack = next((stem for stem, spec in specs.items() if spec.experts and loaded_name(model, stem) == path), None)
    if stack is not None:
        shape = like.num_experts * like.out_features, like.in_features, like.num_experts
        layer = PackedStack(_spec_of_shape(specs, stack, shape, path))
        delattr(module, name)
        module.add_module(name, layer)
        return _Projection(name, like.num_experts, transposed, ()), {stack: path}
    rows_of = stored_rows(model, path, like) or []
    if not rows_of or rows_of[0].name.removesuffix(".weight") not in specs:
        return None
    pieces: list[list[tuple[int, str]]] = [[] for _ in range(like.num_experts)]
    places = {}
    for stored in rows_of:
        stem = stored.name.removesuffix(".weight")
        below = loaded_name(model, stem).removeprefix(f"{fqn}.")
        shape = stored.rows.stop - stored.rows.start, like.in_features, 0
        _add(module, below, PackedLinear(_spec_of_shape(specs, stem, shape, path)))
        pieces[stored.expert].append((stored.rows.start, below))
        places[stem] = f"{fqn}.{below}"
    delattr(module, name)
    paths = tuple(tuple(below for _, below in sorted(of_expert)) for of_expert in pieces)
    return _Projection(name, like.num_experts, transposed, paths), places


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
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.add_module(last, leaf)


def packed_experts(model: nn.Module) -> list[nn.Module]:
    """The modules of experts that `replace_experts_` packed."""
    return [module for module in model.modules() if "castlm_projections" in vars(module)]


def take_stacks_apart_(model: nn.Module) -> None:
    """Gives each expert its own packed layers, once the file of a stack is known."""
    for module in packed_experts(model):
        projections = []
        for projection in vars(module)["castlm_projections"]:
            if not projection.pieces:
                stack = module.get_submodule(projection.name)
                assert isinstance(stack, PackedStack)
                delattr(module, projection.name)
                paths = [f"{projection.name}.{expert}" for expert in range(projection.num_experts)]
                for path, layer in zip(paths, stack.apart()):
                    _add(module, path, layer)
                projection = replace(projection, pieces=tuple((path,) for path in paths))
            projections.append(projection)
        vars(module)["castlm_projections"] = projections


def unpack_experts_(model: nn.Module, dtype: torch.dtype) -> None:
    """Restores the 3-D weights of packed experts, and drops the packed layers."""
    for module in packed_experts(model):
        projections = vars(module).pop("castlm_projections")
        weights = {projection.name: _unpacked(module, projection, dtype) for projection in projections}
        for projection in projections:
            for path in [projection.name, *(path for paths in projection.pieces for path in paths)]:
                module._modules.pop(path.split(".")[0], None)
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight))
        del module.forward  # restores the forward of its class


def _unpacked(module: nn.Module, projection: _Projection, dtype: torch.dtype) -> Tensor:
    """The 3-D weight in the layout of the module of experts."""
    if projection.pieces:
        pieces = [[unpack(_stored(module, path), dtype) for path in paths] for paths in projection.pieces]
        weight = torch.stack([torch.cat(of_expert) for of_expert in pieces])
    else:
        stack = unpack(_stored(module, projection.name), dtype)
        weight = stack.view(projection.num_experts, -1, stack.shape[1])
    return weight.mT.contiguous() if projection.transposed else weight


def _stored(module: nn.Module, path: str) -> PackedTensor:
    layer = module.get_submodule(path)
    assert isinstance(layer, PackedModule)
    return layer.stored


def packed_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' experts with packed weights, one expert at a time.

    Args:
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, top_k), the experts of each token; top_k_weights: of the same shape.
    """
    up, down = experts.castlm_projections
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        x = _multiply(experts, up, expert, hidden_states[token])
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = _multiply(experts, down, expert, x)
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        out.index_add_(0, token, (x * top_k_weights[token, slot, None]).to(out.dtype))
    return out


def _multiply(experts: nn.Module, projection: _Projection, expert: int, x: Tensor) -> Tensor:
    pieces = [experts.get_submodule(path)(x) for path in projection.pieces[expert]]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
    bias = experts._parameters.get(f"{projection.name}_bias")
    return out if bias is None else out + bias[expert]
