"""What AdamS refuses: options out of range, and parameters, gradients or saved state that it cannot step correctly.

Each check raises `InputError` before anything has changed. A wrong dtype or layout would otherwise train a wrong model
without an error, or have the C++ kernels read memory that is not theirs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.masks import unpack_mask
from castlm.core.moments import MOMENTS
from castlm.core.pattern import Pattern
from castlm.core.shards import local
from castlm.core.unit_masks import gathers
from castlm.core.update import SECOND_MOMENTS

_TRAINED = (torch.float32, torch.float64, torch.bfloat16)  # float16 rounds eps and small squared gradients to 0
_LARGEST = torch.finfo(torch.float32).max
_OUTSIDE = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
"""Keys of a parameter group that torch, its schedulers and users add, beside the options of AdamS."""
EXACT_ON_RESUME = (
    *("sparse", "pattern", "total_steps", "mask_interval"),
    *("decay", "decay_end", "second_moment", "moments"),
)
"""The options that may not change between saving and loading, because the method depends on them."""


def _is_number(value: object) -> bool:
    """Whether `value` is a finite real number that float32 can hold, and not a bool or a text."""
    if isinstance(value, bool | str | bytes | Tensor) or not hasattr(type(value), "__float__"):
        return False
    return math.isfinite(value) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _is_rate(value: object) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return _is_number(value) and value >= 0  # type: ignore[operator]


def _is_count(value: object, least: int) -> bool:
    return not isinstance(value, bool | Tensor) and hasattr(type(value), "__index__") and operator.index(value) >= least  # type: ignore[arg-type]


def _are_betas(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)


def _one_of(names: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_rate, "a finite number >= 0"),
    "betas": (_are_betas, "two numbers in [0, 1)"),
    "eps": (lambda v: _is_number(v) and v >= 0, "a finite number >= 0"),
    "lam": (lambda v: _is_number(v) and v >= 0, "a finite number >= 0"),
    "weight_decay": (lambda v: _is_number(v) and v >= 0, "a finite number >= 0"),
    "total_steps": (lambda v: _is_count(v, 1), "an integer >= 1"),
    "mask_interval": (lambda v: _is_count(v, 0), "an integer >= 0"),
    "decay": _one_of(DECAYS),
    "decay_end": (lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "second_moment": _one_of(SECOND_MOMENTS),
    "moments": _one_of(MOMENTS),
    "sparse": (lambda v: isinstance(v, bool), "True or False"),
    "pattern": (lambda v: isinstance(v, Pattern), "a pattern such as 2:4"),
    "units": (lambda v: v is None or isinstance(v, list | tuple), "None, or lists of positions in params"),
}
"""Per option of a parameter group: whether a value is allowed, and what is."""


def check_keys(group: Mapping[str, Any]) -> None:
    """Raises `InputError` if a parameter group has an option that AdamS does not know and would ignore."""
    unknown = [key for key in group if key not in _OPTIONS and key not in _OUTSIDE]
    if unknown:
        raise InputError(f"AdamS has no option {unknown[0]!r} for a parameter group, only {', '.join(_OPTIONS)}")


def check_options(group: Mapping[str, Any]) -> None:
    """Raises `InputError` if an option of a parameter group is of the wrong type or out of range."""
    for name, (is_allowed, wanted) in _OPTIONS.items():
        if not is_allowed(group[name]):
            raise InputError(f"AdamS: {name} = {group[name]!r} is not allowed: it must be {wanted}")
    if group["second_moment"] == "gradient" and DECAYS[group["decay"]].needs_lam:
        raise InputError(
            f"AdamS: second_moment = 'gradient' is not allowed with decay {group['decay']!r}, whose lam would be lost "
            "beside the gradient: use mix"
        )
    units = group["units"]
    if units is not None and sorted(i for unit in units for i in unit) != list(range(len(group["params"]))):
        raise InputError("AdamS: units must name every position in the params of the group once")


def check_parameter(param: Tensor) -> None:
    """Raises `InputError` if AdamS cannot train `param`: its dtype, or it is not dense or not contiguous."""
    shape = tuple(param.shape)
    if param.dtype not in _TRAINED:
        raise InputError(f"a parameter of shape {shape} is {param.dtype}: AdamS trains float32, float64 and bfloat16")
    if param.layout != torch.strided:
        raise InputError(f"a parameter of shape {shape} has layout {param.layout}: AdamS takes dense tensors")
    if not local(param).is_contiguous():
        raise InputError(
            f"a parameter of shape {shape} has strides {param.stride()}: make it contiguous before it is given to AdamS"
        )


def check_sparse_parameter(param: Tensor, pattern: Pattern) -> None:
    """Raises `InputError` if AdamS cannot keep masks of `pattern` on `param`.

    The parameter must be (out, in) or (experts, out, in), in float32 or float64 because bfloat16 rounds the decay away,
    fit the pattern, and not be sharded across what the pattern ties together.
    """
    shape = tuple(param.shape)
    if param.dim() not in (2, 3):
        raise InputError(
            f"a sparse parameter has shape {shape}, not (out, in) or (experts, out, in): sharding that flattens "
            "parameters (FSDP1, DeepSpeed ZeRO) cuts groups apart; use FSDP2 fully_shard"
        )
    if param.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"a sparse parameter of shape {shape} is {param.dtype}, which rounds the decay away: keep fp32 master "
            "weights and use autocast or FSDP mixed precision"
        )
    pattern.check_shape(shape)
    check_placement(param, pattern)


def check_placement(param: Tensor, pattern: Pattern) -> None:
    """Raises `InputError` if a DTensor is sharded across what the pattern ties together."""
    for placement in param.placements if isinstance(param, DTensor) else ():
        if not (placement.is_replicate() or placement == Shard(0)):
            raise InputError(
                f"a sparse parameter of shape {tuple(param.shape)} is placed as {placement}, which splits "
                f"groups of {pattern}: shard sparse weights by rows, Shard(0)"
            )


def check_gradient(param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raises `InputError` if a parameter has changed since AdamS was built, or its gradient does not belong to it.

    Args:
        param: a parameter with a gradient.
        state: its optimizer state, whose tensors have kept their shape, device and dtype.
    """
    grad = param.grad
    assert grad is not None
    shape, moment, second = tuple(param.shape), state["exp_avg"], state["exp_avg_sq"]
    same_dtype = param.dtype == second.dtype if second.dtype != torch.uint8 else param.dtype in _TRAINED
    if param.shape != moment.shape or param.device != moment.device or not same_dtype:
        raise InputError(
            f"a parameter is {param.dtype} {shape} on {param.device}, but was {second.dtype} {tuple(moment.shape)} on "
            f"{moment.device} when AdamS was built: convert or move the model before building the optimizer"
        )
    if not local(param).is_contiguous():
        raise InputError(
            f"a parameter of shape {shape} has strides {param.stride()} since AdamS was built: make it contiguous"
        )
    if grad.layout != torch.strided:
        raise InputError(
            f"a parameter of shape {shape} has a gradient of layout {grad.layout}: AdamS takes dense gradients, "
            "as from nn.Embedding(sparse=False)"
        )
    placed_alike = getattr(grad, "placements", None) == getattr(param, "placements", None)
    if grad.shape != param.shape or grad.device != param.device or not placed_alike:
        raise InputError(
            f"a parameter of shape {shape} on {param.device} has a gradient of shape {tuple(grad.shape)} on "
            f"{grad.device}: a gradient must have the parameter's shape and placement"
        )
    if not grad.dtype.is_floating_point:
        raise InputError(f"a parameter of shape {shape} has a gradient of {grad.dtype}: AdamS takes real gradients")


def _check_saved_state(saved: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Raises `InputError` unless the saved state of a parameter has the names, shapes and dtypes of its `state`."""
    if set(saved) != set(state):
        raise InputError(
            f"the saved state of {where} holds {', '.join(sorted(map(str, saved)))}, not {', '.join(sorted(state))}: "
            "load the state of the same model and options"
        )
    for name, tensor in state.items():
        value = saved[name]
        if name == "step":
            if not (_is_rate(value) and float(value).is_integer()):
                raise InputError(f"the saved step of {where} is {value!r}, not a number of steps: the state is damaged")
        elif not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"the saved {name} of {where} is {given}, not {tensor.dtype} {tuple(tensor.shape)}: load the state of "
                "the same model and options"
            )


def check_saved(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[Tensor, Mapping[str, Any]]:
    """The saved state of each parameter, after checking that all of it fits an optimizer with `groups` and `state`.

    Raises:
        InputError: other parameters, an option in `EXACT_ON_RESUME` that differs, an option out of range, tensors of
            another shape or dtype, or a mask that is not of the pattern.
    """
    sizes = [[len(group["params"]) for group in of] for of in (state_dict["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the saved optimizer state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: load the "
            "state of the same model"
        )
    saved_state: dict[Tensor, Mapping[str, Any]] = {}
    for saved, group in zip(state_dict["param_groups"], groups):
        own = {**group, "pattern": str(group["pattern"])}
        changed = [f"{k} {saved.get(k)} -> {own[k]}" for k in EXACT_ON_RESUME if saved.get(k) != own[k]]
        if changed:
            raise InputError(
                f"the saved optimizer state is of another run ({', '.join(changed)}): use the options of that run"
            )
        fixed = {key: group[key] for key in ("params", "pattern", "units")}
        check_options({**group, **saved, **fixed})
        for i, param in zip(saved["params"], group["params"]):
            found = state_dict["state"].get(i, {})
            _check_saved_state(found, state[param], f"parameter {i}")
            if group["sparse"]:
                mask = unpack_mask(local(found["mask"]), param.shape[-1])
                counts = not gathers(group["pattern"], [param])
                group["pattern"].check_mask(mask, local(param).shape, count=counts)
            saved_state[param] = found
        for unit in group["units"] or () if group["sparse"] else ():
            params = [group["params"][i] for i in unit]
            if gathers(group["pattern"], params):  # no collective where one rank alone may have been refused
                continue
            masks = [unpack_mask(local(saved_state[p]["mask"]), p.shape[1]) for p in params]
            group["pattern"].check_unit_masks(masks)
    return saved_state
