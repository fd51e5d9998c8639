"""The step that trains the kept weights of a pruned transformer block to restore the output of the dense block.

It works block by block on hidden states, as arXiv 2406.15524: only the weights, gradients and moments of one block are
in memory, whatever the size of the model. Some sequences are held out; the state with the lowest error on them is kept,
so that more epochs cost time but do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.data.calibration import CalibrationText
from castlm.facts import Reconstructed
from castlm.oneshot.ranks import Division
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.source import Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit
from castlm.world import ALONE

_HELD_OUT = 8  # one batch in 8 is held out; with a single batch, one sequence in 8
_BETAS = (0.9, 0.99)
_RATE = 1e-3
_FINAL_RATE = 0.05  # share of the learning rate that the cosine ends at


class Reconstruct(Step):
    """Trains the kept weights and the norms of each pruned block with `reconstruct_`.

    Args:
        epochs: the largest number of epochs over the calibration text.
    """

    follows_dense = is_divided = True

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __str__(self) -> str:
        return "reconstruct_epochs"

    def options(self) -> dict[str, Any]:
        return {"reconstruct_epochs": self.epochs}

    def check(self, source: Source, text: CalibrationText | None) -> None:
        if text is not None and len(text) < 2:
            raise InputError("reconstruct_epochs needs at least 2 calibration sequences, one of them held out")

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        inputs = visit.inputs
        if inputs is None or not visit.inside:
            return
        inputs.forget_outputs()  # every module of the block changes in training
        result = reconstruct_(
            inputs.blocks[inputs.block_index],
            inputs.run,
            inputs,
            visit.dense_outputs,
            {layer.get_parameter("weight"): layer.weight != 0 for layer in visit.inside.values()},
            epochs=self.epochs,
            learning_rate=_RATE,
            division=inputs.division,
        )
        report.reconstructions.append(result)


def reconstruct_(
    block: nn.Module,
    run: Callable[[Tensor, int], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Mapping[nn.Parameter, Tensor],
    *,
    epochs: int,
    learning_rate: float,
    division: Division | None = None,
) -> Reconstructed:
    """Trains the kept weights of `masks` and the norms of `block`, in place, with Adam and a cosine schedule.

    An optimizer step is on one batch, so several ranks take turns: the rank with the batch gives its gradient to the
    others. This divides the memory, not the time.

    Args:
        run: `run(hidden, batch)` returns the block's output for the batch with this number.
        inputs: hidden states (batch, seq, hidden) of the pruned model. One batch in 8 is held out, at least one; with a
            single batch of two or more sequences, one sequence in 8, at least one.
        targets: the outputs of the block in the dense model, one for each of `inputs`.
        masks: the mask of each trained weight, True = kept.
        division: the batches of the text, of which this rank has `inputs` and `targets`; by default, it has all.
    """
    division = division or Division(len(inputs), ALONE)
    world, own = division.world, {batch: position for position, batch in enumerate(division.batches)}
    num_batches = sum(map(len, division.parts))
    if num_batches > 1:
        num_held_out = max(1, num_batches // _HELD_OUT)
        held_out, training = range(num_held_out), range(num_held_out, num_batches)
        held_out_rows = trained_rows = slice(None)
    else:
        held_out = training = range(1)
        num_held_out = max(1, world.on_main(lambda: len(inputs[0])) // _HELD_OUT)
        held_out_rows, trained_rows = slice(num_held_out), slice(num_held_out, None)

    @torch.no_grad()
    def sum_over(batches: Iterable[int], value: Callable[[int], Tensor]) -> float:
        found = {batch: float(value(own[batch])) for batch in batches if batch in own}
        everywhere: dict[int, float] = {}
        for of_rank in world.gather(found, patient=True):
            everywhere |= of_rank  # summed below in the order of the batches, whichever rank has them
        return sum(everywhere[batch] for batch in batches)

    # the mean energy of the block's contribution to the residual stream
    # an error of 1 is that of a block that adds nothing
    scale = sum_over(range(num_batches), lambda own: (targets[own] - inputs[own]).square().mean()) / num_batches

    def distance(own: int, rows: slice) -> Tensor:
        return (run(inputs[own], own)[rows] - targets[own][rows]).square().mean() / scale

    def error() -> float:
        return sum_over(held_out, lambda own: distance(own, held_out_rows)) / len(held_out)

    def gradient_of(batch: int) -> None:
        if batch in own:
            distance(own[batch], trained_rows).backward()
        if world.size > 1:
            owner = division.owner(batch)
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                world.share_(parameter.grad, owner)

    # By the name of the class, as families have norms of their own: LlamaRMSNorm, Gemma2RMSNorm, LayerNorm.
    norms = [p for m in block.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)]
    trained = [*masks, *norms]
    best = [p.detach().clone() for p in trained]
    before = lowest = error()
    done = 0
    with _only_trained(block, trained), torch.enable_grad():
        optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=_BETAS)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            for position, index in enumerate(torch.randperm(len(training), generator=generator).tolist()):
                progress = (epoch + position / len(training)) / epochs
                share = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))  # cosine, 1 to 0.05
                optimizer.param_groups[0]["lr"] = learning_rate * share
                optimizer.zero_grad()
                gradient_of(training[index])
                for weight, mask in masks.items():
                    if weight.grad is not None:  # None for experts that no token of the batch reached
                        weight.grad.mul_(mask)
                optimizer.step()
            now, done = error(), epoch + 1
            if not now < lowest:  # NaN ends it too
                break
            lowest, best = now, [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, best):
            parameter.copy_(value)
    return Reconstructed(before, lowest, done)


@contextmanager
def _only_trained(block: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """Inside the context, only `trained` of the block's parameters take gradients."""
    flags = {parameter: parameter.requires_grad for parameter in block.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
