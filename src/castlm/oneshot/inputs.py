"""What enters the layers of a transformer block: the statistics that one-shot solvers work with."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError
from castlm.oneshot.solvers import SOLVERS, Solver, whole_hessian
from castlm.oneshot.walk import BlockInputs, StopForward

ERROR_TOKENS = 256
"""Calibration tokens that the reconstruction error of a layer is measured on."""


def check_plain_weights(layers: dict[str, nn.Linear], work: str) -> None:
    """Checks that the weights of `layers` can be replaced.

    Args:
        work: what is done to them, as "pruning", for the message.

    Raises:
        InputError: a layer under weight scaling, or one with a quantized weight.
    """
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"{name} carries weight scaling: call fold_weight_scaling before {work} it")
        if not layer.weight.is_floating_point():
            raise InputError(f"{name} stores its weight as {layer.weight.dtype}: load the model unquantized")


class LayerInput:
    """A tensor that enters layers of a block: the same one in every pass, with the statistic over all passes."""

    def __init__(self, x: Tensor, solver: Solver) -> None:
        columns = x.shape[-1]
        self.names: list[str] = []
        self.current: Tensor | None = None  # in this pass; held, so that no other tensor can be taken for it
        self.sample = x.reshape(-1, columns)[:ERROR_TOKENS].to(torch.float32, copy=True)
        self.statistic = torch.zeros((columns,) * solver.axes, device=x.device)


def see_inputs(
    layers: dict[str, nn.Linear], inputs: BlockInputs, solver: Solver, num_sequences: int
) -> list[LayerInput]:
    """Runs the current block, still dense, on all batches, and gives what enters `layers`, in the order of the calls.

    From the second pass on a block ends where it has called all of them: what comes after changes no statistic.
    """
    found: dict[str, LayerInput] = {}
    num_calls, last_call = 0, 0

    def before(name: str, x: Tensor) -> None:
        nonlocal num_calls
        if name not in found:
            found[name] = next((seen for seen in found.values() if seen.current is x), None) or LayerInput(x, solver)
            found[name].names.append(name)
        seen = found[name]
        if seen.current is not x:
            seen.current = x
            if solver.add is not None:
                solver.add(seen.statistic, x.reshape(-1, x.shape[-1]).float(), num_sequences)
        num_calls += 1
        if num_calls == last_call:
            raise StopForward

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: before(name, args[0])))
        for hidden in inputs:
            num_calls = 0
            with suppress(StopForward):
                inputs.run(hidden)
            if last_call == 0:  # experts are not all called in every pass: then no pass ends early
                last_call = num_calls if num_calls == len(found) == len(layers) else -1
            for seen in found.values():
                seen.current = None
    for name in layers.keys() - found.keys():
        raise InputError(f"no calibration token reaches {name}: leave it out with filter_fn, or pass more text")
    return list(dict.fromkeys(found.values()))


def input_hessians(layers: dict[str, nn.Linear], inputs: BlockInputs, num_sequences: int) -> dict[str, Tensor]:
    """2/num_sequences X^T X (in, in) of what enters each of the current block's `layers`, by name.

    Layers that read the same input share one tensor.
    """
    return {
        name: hessian
        for seen in see_inputs(layers, inputs, SOLVERS["sparsegpt"], num_sequences)
        for hessian in [whole_hessian(seen.statistic)]
        for name in seen.names
    }
