"""The dense block beside the pruned one: what its layers read and what the stream carried, in the dense model.

SparseGPT sees the inputs that the blocks pruned before leave, but aims at the outputs of the dense layer on those same
inputs, so that errors add up from block to block. With both streams at hand a layer can aim part of the way at the
output that the dense model has there (asymmetric target), and the layers that write the residual stream at what it has
lost as well (stream correction). Both only shift the weight that is solved for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import SparseLayer
from castlm.oneshot.families import describe
from castlm.oneshot.hidden_states import HiddenStates
from castlm.oneshot.options import Refinements
from castlm.oneshot.reconstruct import Reconstruction, reconstruct_
from castlm.oneshot.walk import BlockInputs, StopForward

_MOST_GROWTH = 10
"""Of the norm of a target relative to that of the dense weight. It was at most 1.07 with factors of 0.5 and 1.35 with
factors of 1 on stories260K, from 16 and 128 sequences of 256 tokens."""


class DenseTwin:
    """A copy of the current block as it was before it is pruned, with the hidden states of the dense model.

    Args:
        inputs: of the model that is being pruned.
        stack: the name of its list of blocks, as `model.layers`.
        num_sequences: of the calibration text.
        probes: by the names of the layers that write the residual stream: the module of their block whose input is the
            stream that they are added to; "" is the block itself.
        states: what enters the current block in the dense model, on disk; if not given, the first block is the current
            one, where that is what enters in the pruned model, and the hidden states are in memory.
    """

    def __init__(
        self,
        inputs: BlockInputs,
        stack: str,
        num_sequences: int,
        probes: Mapping[str, str],
        states: HiddenStates | None = None,
    ) -> None:
        self.inputs, self.stack, self.probes = inputs, stack, probes
        self.states = states
        self.batches: Sequence[Tensor] = list(inputs.batches) if states is None else states
        self.scale = 2 / num_sequences  # as that of the Hessian
        self.block: nn.Module = nn.Identity()

    def enter(self) -> None:
        """Copies the current block; to be called before it is changed."""
        self.block = copy.deepcopy(self.inputs.blocks[self.inputs.index])

    def outputs(self) -> Sequence[Tensor]:
        """What the dense block gives for each batch of the dense model."""
        given = (self.inputs.run(hidden, i, self.block) for i, hidden in enumerate(self.batches))
        if self.states is None:
            return list(given)
        for i, output in enumerate(given):
            self.states[i] = output
        return self.states.entering_next()

    def advance(self, outputs: Sequence[Tensor]) -> None:
        """Goes on to the next block with the `outputs` of this one; to be called before the inputs go on.

        On disk, `states` hold them already, and are moved on by the caller.
        """
        self.block = nn.Identity()
        if self.states is None:
            self.batches = [self.inputs.entering_next(output, i) for i, output in enumerate(outputs)]

    def shift(self, name: str) -> Shift:
        """What the two models differ by at the input of the named layer of the current block."""
        shift, probe = Shift(), self.probes.get(name)
        modules = [name.removeprefix(f"{self.stack}.{self.inputs.index}.")] + ([] if probe is None else [probe])
        sparse_block = self.inputs.blocks[self.inputs.index]
        for number, (sparse, dense) in enumerate(zip(self.inputs.batches, self.batches)):
            ours = _captured(sparse_block, lambda block, h=sparse, i=number: self.inputs.run(h, i, block), modules)
            theirs = _captured(self.block, lambda block, h=dense, i=number: self.inputs.run(h, i, block), modules)
            x = ours[0] * self.scale
            shift.input = shift.input + (theirs[0] - ours[0]).T @ x
            if probe is not None:
                shift.stream = shift.stream + (theirs[1] - ours[1]).T @ x
        return shift


class Shift:
    """Cross products of the differences between the dense and the pruned model's stream with a layer's input."""

    def __init__(self) -> None:
        self.input = torch.zeros(())
        """(X_dense - X)^T X: (in, in)."""
        self.stream = torch.zeros(())
        """(R_dense - R)^T X: (out, in), of the residual stream that the layer's output is added to; else 0."""

    def target(self, weight: Tensor, hessian: Tensor, asymmetric: float, correction: float) -> Tensor:
        """The weight (out, in) whose output on the pruned model's inputs is nearest to the target.

        Args:
            hessian: X^T X, damped.
            asymmetric: how far the target goes from the dense layer on the pruned model's inputs, 0, to its output in
                the dense model, 1.
            correction: the share of the stream's loss that the layer makes up for.

        Raises:
            InputError: a target that is so much larger than `weight` that no sparse weight comes near it.
        """
        right = asymmetric * (weight @ self.input) + correction * self.stream
        target = weight + torch.linalg.solve(hessian, right.T).T
        if not target.norm() <= _MOST_GROWTH * weight.norm():  # nor for NaN
            raise InputError(
                f"the target is more than {_MOST_GROWTH} times as large as the dense weight, as the layers before it "
                "lost too much: use a smaller target_asymmetry and stream_correction, or more calibration text"
            )
        return target


def _captured(block: nn.Module, run: Callable[[nn.Module], Tensor], paths: list[str]) -> list[Tensor]:
    """The inputs (tokens, columns) of modules of a block in one pass, fp32; the pass ends where it has them all."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in paths:

            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                found[path] = hidden.reshape(-1, hidden.shape[-1]).float()
                if len(found) == len(paths):
                    raise StopForward

            hooks.enter_context(block.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True))
        with suppress(StopForward):
            run(block)
    return [found[path] for path in paths]


def dense_twin(
    model: PreTrainedModel,
    inputs: BlockInputs,
    stack: str,
    num_sequences: int,
    refinements: Refinements,
    states: HiddenStates | None = None,
) -> DenseTwin | None:
    """The dense model beside the one that is pruned, if the refinements need it; `states` as those of `DenseTwin`."""
    if not refinements.needs_dense_twin:
        return None
    probes = _stream_probes(model, stack) if refinements.stream_correction else {}
    return DenseTwin(inputs, stack, num_sequences, probes, states)


def follow_dense(
    inside: Mapping[str, SparseLayer], twin: DenseTwin, refinements: Refinements, is_last: bool
) -> list[Reconstruction]:
    """Reconstructs the current block, which is pruned, if that is asked for, and takes the twin to the next one.

    Returns:
        What the reconstruction did, one or none.
    """
    if is_last and not refinements.reconstruct_epochs:
        return []
    outputs = twin.outputs()
    reconstructs = refinements.reconstruct_epochs and inside
    done = [_reconstruct(inside, twin.inputs, outputs, refinements)] if reconstructs else []
    twin.advance(outputs)
    return done


def _reconstruct(
    inside: Mapping[str, SparseLayer], inputs: BlockInputs, outputs: Sequence[Tensor], refinements: Refinements
) -> Reconstruction:
    """Reconstructs the current block."""
    return reconstruct_(
        inputs.blocks[inputs.index],
        lambda block, hidden, batch: inputs.run(hidden, batch, block),
        inputs.batches,
        outputs,
        {layer.weight: layer.weight != 0 for layer in inside.values()},
        epochs=refinements.reconstruct_epochs,
        learning_rate=refinements.reconstruct_rate,
    )


def _stream_probes(model: PreTrainedModel, stack: str) -> dict[str, str]:
    """By the layers that write the residual stream: the module of their block whose input it is; "" is the block."""
    wiring, probes = describe(model), {}
    for index, block in enumerate(wiring.blocks):
        modules = {module: path for path, module in model.get_submodule(f"{stack}.{index}").named_modules()}
        _, (norm_of_mlp, _) = block.reads
        assert norm_of_mlp is not None, "check_prune refuses families without it"
        probes[block.attention.output.layer] = ""
        probes |= {mlp.down.layer: modules[norm_of_mlp.module] for mlp in block.mlps}
    return probes
