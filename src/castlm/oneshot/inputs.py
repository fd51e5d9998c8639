"""Collects statistics of the inputs of a transformer block's layers, for one-shot solvers."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer
from castlm.oneshot.routed import Routed, Take, check_neurons, experts_of
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.walk import BlockInputs, StopForward

ERROR_TOKENS = 256
"""Calibration tokens on which the reconstruction error of a layer is measured."""


def check_plain_weights(layers: Mapping[str, SparseLayer], work: str) -> None:
    """Checks that the weights of `layers` can be replaced.

    Args:
        work: the work on them, such as "pruning", for the message.

    Raises:
        InputError: a layer under weight scaling, or one with a quantized weight.
    """
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"{name} carries weight scaling: call fold_weight_scaling before {work} it")
        if not layer.weight.is_floating_point():
            raise InputError(f"{name} stores its weight as {layer.weight.dtype}: load the model unquantized")


def check_reached(wanted: Iterable[str], reached: Container[str]) -> None:
    """Raises `InputError` if the calibration text did not reach a layer of `wanted`."""
    if missing := next((name for name in wanted if name not in reached), None):
        raise InputError(f"no calibration token reaches {missing}: leave it out with filter_fn, or pass more text")


def check_finite_weight(names: str, weight: Tensor) -> None:
    """Raises `InputError` if a weight holds NaN or infinity, by which its weights cannot be ranked."""
    if not weight.isfinite().all():
        raise InputError(f"cannot prune {names}: its weight has NaN or infinity")


def check_finite_input(names: str, statistic: Tensor) -> None:
    """Raises `InputError` if the statistic of a layer's input is not finite."""
    if not statistic.isfinite().all():
        raise InputError(f"the calibration text makes NaN or infinity at the input of {names}: load the model in fp32")


class Accumulator(Protocol):
    """Sums a statistic over the inputs of a layer: a `Solver`, or a `castlm.structured.prune.UnitAccumulator`."""

    @property
    def add(self) -> Callable[[Any, Tensor, int], None] | None:
        """`add(statistic, x, num_sequences)` adds x (tokens, in) fp32; None if there is no statistic."""

    def zeros(self, x: Tensor) -> Any:
        """An empty statistic for inputs like `x` (..., in)."""


class LayerInput:
    """One input of a block's layers, which one or more layers read, with its statistic over all passes."""

    def __init__(self, x: Tensor, accumulator: Accumulator) -> None:
        self.names: list[str] = []
        self.current: Tensor | None = None  # in this pass; held, so that no new tensor can have its identity
        self.sample = x.reshape(-1, x.shape[-1])[:ERROR_TOKENS].to(torch.float32, copy=True)
        self.statistic = accumulator.zeros(x)

    def add(self, x: Tensor, accumulator: Accumulator, num_sequences: int) -> None:
        """Adds x (..., in) to the statistic, in fp32 even if the block runs under autocast."""
        if accumulator.add is not None:
            with torch.autocast(x.device.type, enabled=False):
                accumulator.add(self.statistic, x.reshape(-1, x.shape[-1]).float(), num_sequences)


class ExpertInputs:
    """The inputs of one projection of a block's experts, each as a `LayerInput`.

    Attributes:
        names: the name of the layer.
        experts: inputs by the number of the expert; their `names` are the layer's name and that number.
        few: the experts with too few routed tokens, which have seen all tokens instead.
    """

    def __init__(self, name: str) -> None:
        self.names = [name]
        self.experts: dict[int, LayerInput] = {}
        self.few: list[int] = []

    def add(self, expert: int, x: Tensor, accumulator: Accumulator, num_sequences: int) -> None:
        """Adds x (tokens, in) to the statistic of an expert."""
        if expert not in self.experts:
            self.experts[expert] = LayerInput(x, accumulator)
            self.experts[expert].names.append(f"{self.names[0]}.{expert}")
        self.experts[expert].add(x, accumulator, num_sequences)


Seen = list[LayerInput | ExpertInputs]
"""The inputs of some layers of a block, in the order of the calls."""


def entries_of(seen: Seen) -> list[LayerInput]:
    """The inputs with a statistic of their own: one for each expert."""
    nested = (entry.experts.values() if isinstance(entry, ExpertInputs) else [entry] for entry in seen)
    return [entry for entries in nested for entry in entries]


def see_inputs(
    layers: Mapping[str, SparseLayer],
    inputs: BlockInputs,
    accumulator: Accumulator,
    num_sequences: int,
) -> Seen:
    """Runs the current block on all batches, and returns the inputs of `layers` in the order of the calls.

    After the first pass, stops each pass once these layers have run: the rest of the block changes no statistic.
    Experts with few tokens need a second round over all batches.
    """
    watch = _Watch(layers, inputs, accumulator, num_sequences)
    watch.round(watch.see_routed)
    few = {experts: routed.few for experts, routed in watch.routed.items() if routed.few}
    for experts, chosen in few.items():
        for name in watch.routed[experts].wanted.values():
            entry = watch.experts[name]
            entry.few = chosen
            for expert in chosen:
                entry.experts.pop(expert, None)
    if few:
        watch.linear = False
        watch.round(lambda routed, args, kwargs, take: routed.see_all(args, kwargs, few.get(routed.experts, []), take))
    check_reached(layers, watch.found)
    return list(dict.fromkeys(watch.found.values()))


def inputs_in_order(layers: Mapping[str, SparseLayer], inputs: BlockInputs) -> Seen:
    """`see_inputs` without statistics: finds the layers that read the same input, and their order.

    Runs only as many batches as are needed to reach all layers: one, unless experts are linear layers.
    """
    watch = _Watch(layers, inputs, SOLVERS["magnitude"], 0)
    watch.round(lambda *_: None, until_reached=True)
    check_reached(layers, watch.found)
    return list(dict.fromkeys(watch.found.values()))


def grouped(seen: Seen) -> list[Seen]:
    """Groups the inputs of a block by the layers that are pruned together.

    Layers whose names differ only in the number of a module, such as parallel experts, are in one group.
    """
    groups: dict[tuple[str, ...], Seen] = {}
    for entry in seen:
        alike = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in entry.names)
        groups.setdefault(alike, []).append(entry)
    return list(groups.values())


class _Watch:
    """Hooks on the layers of the current block, for a round over all batches."""

    def __init__(
        self, layers: Mapping[str, SparseLayer], inputs: BlockInputs, accumulator: Accumulator, num_sequences: int
    ) -> None:
        self.inputs, self.accumulator, self.num_sequences = inputs, accumulator, num_sequences
        self.wanted = layers.keys()
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        block = inputs.blocks[inputs.index]
        self.routed = {experts: Routed(experts, wanted) for experts, wanted in experts_of(block, layers).items()}
        for routed in self.routed.values():
            check_neurons(routed)
        self.linear = True  # whether inputs of linear layers are collected
        self.found: dict[str, LayerInput | ExpertInputs] = {}
        self.experts: dict[str, ExpertInputs] = {}
        self.num_calls, self.last_call = 0, 0

    def round(
        self,
        see: Callable[[Routed, tuple[Any, ...], dict[str, Any], Take], None],
        until_reached: bool = False,
    ) -> None:
        """Runs the block on all batches, or until all layers are reached.

        Args:
            see: called with each call of a module of experts.
        """
        self.last_call = 0

        def before_experts(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routed = self.routed[experts]
            for name in routed.wanted.values():
                self.experts.setdefault(name, ExpertInputs(name))
                self.found.setdefault(name, self.experts[name])
            see(routed, args, kwargs, lambda projection, expert, x: self._add(routed.wanted[projection], expert, x))
            self._count(len(routed.wanted))

        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.enter_context(
                    layer.register_forward_pre_hook(lambda _, args, name=name: self._before(name, args[0]))
                )
            for experts in self.routed:
                hooks.enter_context(experts.register_forward_pre_hook(before_experts, with_kwargs=True))
            for number, hidden in enumerate(self.inputs):
                self.num_calls = 0
                with suppress(StopForward):
                    self.inputs.run(hidden, number)
                if self.last_call == 0:  # set once; -1 if experts are not all called in every pass: none ends early
                    num_layers = len(self.layers) + len(self.experts)
                    all_called = self.num_calls == len(self.found) == num_layers
                    self.last_call = self.num_calls if all_called else -1
                for seen in self.found.values():
                    if isinstance(seen, LayerInput):
                        seen.current = None
                if until_reached and self.wanted <= self.found.keys():
                    break

    def see_routed(self, routed: Routed, args: tuple[Any, ...], kwargs: dict[str, Any], take: Take) -> None:
        routed.see(args, kwargs, take)

    def _add(self, name: str, expert: int, x: Tensor) -> None:
        self.experts[name].add(expert, x, self.accumulator, self.num_sequences)

    def _before(self, name: str, x: Tensor) -> None:
        if self.linear:
            seen = self.found.get(name)
            if seen is None:
                others = [entry for entry in self.found.values() if isinstance(entry, LayerInput)]
                shared = next((entry for entry in others if entry.current is x), None)
                seen = shared or LayerInput(x, self.accumulator)
                self.found[name] = seen
                seen.names.append(name)
            assert isinstance(seen, LayerInput)
            if seen.current is not x:
                seen.current = x
                seen.add(x, self.accumulator, self.num_sequences)
        self._count(1)

    def _count(self, calls: int) -> None:
        self.num_calls += calls
        if self.num_calls == self.last_call:
            raise StopForward
