"""Collects statistics of the inputs of a transformer block's layers, for one-shot solvers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from castlm.core.errors import InputError, check_finite
from castlm.core.sparsify import SparseLayer
from castlm.oneshot.layer_input import Accumulator, LayerInput
from castlm.oneshot.routed import RoutedInputs, Seen, routed_in
from castlm.oneshot.walk import BlockInputs, StopForward


def entries_of(seen: Seen) -> list[LayerInput]:
    """The inputs with a statistic of their own: one for each expert."""
    return [entry for each in seen for entry in each.entries()]


def check_plain_weights(layers: Mapping[str, SparseLayer]) -> None:
    """Raises `InputError` for a layer under weight scaling, or with a quantized weight."""
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise InputError(f"{name} carries weight scaling: call fold_weight_scaling first")
        if not layer.weight.is_floating_point():
            raise InputError(f"{name} stores its weight as {layer.weight.dtype}: load the model unquantized")


def check_reached(wanted: Iterable[str], reached: Container[str]) -> None:
    """Raises `InputError` if the calibration text did not reach a layer of `wanted`."""
    if missing := next((name for name in wanted if name not in reached), None):
        raise InputError(f"no calibration token reaches {missing}: leave it out with filter_fn, or pass more text")


def check_finite_input(names: str, statistic: Tensor) -> None:
    """Raises `InputError` if the statistic of a layer's input is not finite."""
    check_finite(f"the input of {names} on the calibration text", statistic, "load the model in fp32")


def see_inputs(
    layers: Mapping[str, SparseLayer], inputs: BlockInputs, accumulator: Accumulator | None, num_sequences: int
) -> Seen:
    """Runs the current block on all batches, and returns the inputs of `layers` in the order of the calls.

    After the first pass, stops each pass once these layers have run: the rest of the block changes no statistic.
    Experts with few tokens need a second round over all batches. Each rank runs its own batches, and all of them return
    the same statistics.

    Args:
        accumulator: a solver, or another object that sums a statistic. None collects none: then the function only
            finds the layers that read the same input, and their order, in as few passes as reach all layers (one,
            unless experts are linear layers). Only a rank with batches can do that.
        num_sequences: number of calibration sequences, by which a solver divides its sums.
    """
    watch = _LayerHooks(layers, inputs, accumulator, num_sequences)
    watch.run_batches()
    if accumulator is not None:
        # An expert that got 1 % of 32,768 tokens has seen 328, fewer than its input has columns: now it sees all.
        have_few = [routed.see_all(inputs.division.world) for routed in watch.routed]
        if any(have_few):
            watch.collects_linear = False  # their sums are complete; a second round would add them twice
            watch.run_batches()
        watch.end(accumulator)
    check_reached(layers, watch.by_layer)
    return watch.seen


class _LayerHooks:
    """Hooks on the layers of the current block, for a round over all batches."""

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        inputs: BlockInputs,
        accumulator: Accumulator | None,
        num_sequences: int,
    ) -> None:
        self.inputs, self.accumulator, self.num_sequences = inputs, accumulator, num_sequences
        self.wanted = layers.keys()
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        self.routed = routed_in(inputs.blocks[inputs.block_index], layers, accumulator, num_sequences)
        self.collects_linear = True  # whether inputs of linear layers are collected
        self.by_layer: dict[str, LayerInput | RoutedInputs] = {}
        self.num_calls = 0
        """Calls of the layers in this pass."""
        self.last_call = 0
        """The number of calls after which a pass can stop; 0 before the first pass has ended, -1 if none can stop."""

    @property
    def seen(self) -> Seen:
        """The inputs that are found, in the order of the calls."""
        return list(dict.fromkeys(self.by_layer.values()))

    def run_batches(self) -> None:
        """Runs the block on all batches, or until all layers are reached if no statistics are collected."""
        self.last_call = 0
        num_layers = len(self.layers) + sum(len(routed.inputs) for routed in self.routed)
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.enter_context(
                    layer.register_forward_pre_hook(lambda _, args, name=name: self._before(name, args[0]))
                )
            for num_ranks, batches in self.inputs.division.turns():
                for number in batches:
                    for turn in range(max((routed.num_turns for routed in self.routed), default=1)):
                        self._run_batch(number, turn, num_layers)
                    if self.accumulator is None and self.wanted <= self.by_layer.keys():
                        return
                if self.accumulator is not None:
                    self._find_as_main()
                    for entry in entries_of(self.seen):
                        entry.end_part(self.inputs.division.world, self.accumulator, num_ranks)

    def _run_batch(self, number: int, turn: int, num_layers: int) -> None:
        self.num_calls = 0
        with suppress(StopForward), ExitStack() as hooks:
            for routed in self.routed:
                hooks.enter_context(routed.hooked(turn, self._find_experts, self._count))
            output = self.inputs.run(self.inputs[number], number)
            if number == 0 and self.collects_linear:
                self.inputs.seen_outputs = output
        if self.last_call == 0:
            # not where a pass leaves experts out, or where their products are watched to the end
            all_called = self.num_calls == len(self.by_layer) == num_layers
            self.last_call = self.num_calls if all_called else -1
        for seen in self.by_layer.values():
            if isinstance(seen, LayerInput):
                seen.current = None  # the tensors of this pass can be freed

    def _find_as_main(self) -> None:
        """Gives a rank without batches the inputs that rank 0 has found, and every rank samples of the same shape."""
        world, found = self.inputs.division.world, self.by_layer
        if world.size == 1:
            return
        own = [(seen.names, seen.sample.shape if isinstance(seen, LayerInput) else None) for seen in self.seen]
        routed = {seen.names[0]: seen for each in self.routed for seen in each.inputs.values()}
        self.by_layer = {}
        for names, shape in world.on_main(lambda: own, patient=True):
            if shape is None:
                self.by_layer[names[0]] = routed[names[0]]
                continue
            entry = found.get(names[0])
            if entry is None:
                entry = LayerInput(torch.zeros(shape, device=self.inputs.device), self.accumulator)
                entry.names = list(names)
            assert isinstance(entry, LayerInput)
            entry.fit_sample(shape)
            self.by_layer |= dict.fromkeys(names, entry)
        for each in self.routed:
            each.share(world, self.inputs.device)

    def end(self, accumulator: Accumulator) -> None:
        """Ends the last round."""
        for entry in entries_of(self.seen):
            entry.end(self.inputs.division.world, accumulator)

    def _find_experts(self, seen: RoutedInputs) -> None:
        self.by_layer[seen.names[0]] = seen

    def _before(self, name: str, x: Tensor) -> None:
        if self.collects_linear:
            seen = self.by_layer.get(name)
            if seen is None:
                # q, k and v are called with one and the same tensor: they share one Hessian, and are solved together.
                others = [entry for entry in self.by_layer.values() if isinstance(entry, LayerInput)]
                shared = next((entry for entry in others if entry.current is x), None)
                seen = shared or LayerInput(x, self.accumulator)
                self.by_layer[name] = seen
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
