"""`keep_pattern_`: finds the sparse layers of a transformers or PEFT model and guards their zeros.

Which layers were left dense on purpose is read from the castlm.json of the folder that the model was loaded from, so
that a layer which has lost its pattern is never taken for one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from castlm.core.checks import check_placement
from castlm.core.errors import InputError
from castlm.core.experts import SparseLayer
from castlm.core.keep import KeptPattern, summed
from castlm.core.pattern import Pattern, as_pattern
from castlm.core.shards import local
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears, weight_parameter
from castlm.export.verify import left_dense_reason, read_left_dense


def keep_pattern_(model: nn.Module, pattern: Pattern | str = "2:4", filter_fn: FilterFn | None = None) -> KeptPattern:
    """Keeps every zero of the sparse layers of `model` at zero under any optimizer, in place.

    Call it once, before training; where `fully_shard` is used, after it. The masks are the zeros that the weights have
    now. Their gradients, and so their moments, stay zero, and after each optimizer step the zeros are counted. A copy
    of the model is not guarded.

    Args:
        model: n:m sparse; a transformers model, or one with PEFT adapters.
        pattern: what the sparse layers must have now.
        filter_fn: `filter_fn(module, fqn)` says which linear layers are sparse. The default is all of the transformer
            blocks, except those that the castlm.json of the model's folder lists as left dense.

    Returns:
        The guard. `check()` counts the zeros at any other time, and `remove()` ends it.

    Raises:
        InputError: a layer that does not have the pattern, or whose weight is flattened or sharded across its groups;
            sparse experts in a 3-D parameter that `castlm.linearize_experts_` has not made layers;
            a GPT-2 that was not loaded by `castlm.load_model`, which turns its Conv1D into linear layers.
            Later, at the optimizer step that breaks the pattern: the tensor and the number of weights.

    Examples:
        >>> import castlm
        >>> layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        >>> model = nn.ModuleDict({"layers": layers})
        >>> _ = castlm.prune_(model)
        >>> kept = castlm.keep_pattern_(model)
        >>> kept.masks()["layers.0"].float().mean()
        tensor(0.5000)
    """
    pattern = as_pattern(pattern).for_model(model)
    layers = pattern_layers(model, pattern, filter_fn)
    check_pattern(layers, pattern)
    return KeptPattern(layers)


def check_pattern(layers: Mapping[str, SparseLayer], pattern: Pattern) -> None:
    """Raises `InputError` unless all weights of `layers` have the pattern. Under FSDP2 all ranks call it."""
    weights = {name: weight_parameter(layer).detach() for name, layer in layers.items()}
    if any(weight.dim() < 2 for weight in weights.values()):
        return  # `KeptPattern` says why it cannot keep them
    for weight in weights.values():
        check_placement(weight, pattern)
    units = pattern.units(weights)
    firsts = [weights[unit[0]] for unit in units]
    counts = [pattern.unit_violations([local(weights[name]) for name in unit]) for unit in units]
    totals = summed(firsts, [torch.tensor(count, device=weight.device) for weight, count in zip(firsts, counts)])
    found = {unit[0]: (unit, total) for unit, total in zip(units, totals) if total}
    if found:
        name, (_, total) = next(iter(found.items()))
        num_layers = sum(len(unit) for unit, _ in found.values())
        raise InputError(
            f"{num_layers} of {len(weights)} layers are not {pattern}, first {name} with {total:,} places that hold "
            "more non-zeros: prune the model first (castlm prune), or exclude layers that are dense on purpose with "
            "filter_fn"
        )


def pattern_layers(model: nn.Module, pattern: Pattern, filter_fn: FilterFn | None = None) -> dict[str, SparseLayer]:
    """The layers of a model that have, or should have, the pattern; by their name without what PEFT adds to it.

    Raises:
        InputError: there are none.
    """
    adapters = _adapter_parts(model)
    left_dense = _left_dense(model)

    def is_sparse(module: nn.Module, fqn: str) -> bool:
        if fqn in adapters:
            return False
        if filter_fn is not None:
            return filter_fn(module, fqn)
        return is_sparse_linear(module, fqn) and left_dense_reason(f"{plain_name(fqn)}.weight", left_dense) is None

    layers, dense = sparse_linears(model, pattern, is_sparse)
    parameters = dict(model.named_parameters())
    for name in dense:
        weight = parameters.get(name)
        if weight is not None and weight.dim() == 3 and 4 * int(weight.count_nonzero()) < 3 * weight.numel():
            raise InputError(
                f"{name} holds sparse experts in a 3-D parameter: call castlm.linearize_experts_(model) first, before "
                "the optimizer is made, or load the model with castlm.load_model"
            )
    return {plain_name(fqn): layer for fqn, layer in layers.items()}


def plain_name(fqn: str) -> str:
    """The name of a layer in the base model.

    Examples:
        >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer")
        'model.layers.0.mlp.up_proj'
    """
    return fqn.removeprefix("base_model.model.").removesuffix(".base_layer")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has wrapped with an adapter, by their name in `model`; none where PEFT is not in use."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _adapter_parts(model: nn.Module) -> set[str]:
    """The names of the modules that belong to an adapter, and not to the base model."""
    parts = set()
    for name, layer in adapted_layers(model).items():
        base = f"{name}.base_layer"
        for inner, _ in layer.named_modules(prefix=name):
            if inner != name and inner != base and not inner.startswith(f"{base}."):
                parts.add(inner)
    return parts


def _left_dense(model: nn.Module) -> Mapping[str, str]:
    """What the castlm.json of the folder that a transformers model was loaded from lists as left dense."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    return read_left_dense(Path(source) / "castlm.json") if source and Path(source).is_dir() else {}
