"""One-shot pruning of whole units: chooses the channels or KV heads to keep, and lets the kept weights compensate.

For each transformer block in turn, the inputs of its layers are collected while it is still dense; then its units are
ranked by a row of `SCORES`, and the lowest are set to zero. With `refit_iterations`, the kept columns of the output
layer are solved for by least squares on the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from castlm.core.errors import check_finite
from castlm.core.sparsify import SparseLayer
from castlm.data.calibration import CalibrationText
from castlm.hardware import autocast
from castlm.models.architecture import replaced_forward
from castlm.oneshot.inputs import check_finite_input, check_reached, see_inputs
from castlm.oneshot.refit import refit
from castlm.oneshot.report import LayerResult, OneshotReport
from castlm.oneshot.solvers import MIN_DAMPING, damped, row_energies
from castlm.oneshot.source import Source, block_stack
from castlm.oneshot.sparsegpt import sparsegpt
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import BACKWARD_TOKENS, Visit
from castlm.structured.pattern import Units
from castlm.structured.scores import SCORES

GRADIENT_SEQUENCES = 32
"""Calibration sequences on which the gradient of the loss is computed, for scores that need it."""


@dataclass
class InputStatistic:
    """Sums over the inputs of a layer: tokens, columns, and products of two columns."""

    gram: Tensor  # X^T X, (in, in)
    total: Tensor  # the sum of each column, fp64, (in,)
    squares: Tensor
    """The sum of squares of each column, fp64, (in,): with a large mean, the variance is a small difference of sums."""
    num_tokens: Tensor
    """int64, ()."""

    @property
    def variance(self) -> Tensor:
        """The variance of each column over the tokens."""
        num_tokens = self.num_tokens.clamp(min=1)
        return (self.squares / num_tokens - (self.total / num_tokens).square()).clamp(min=0).float()


class UnitAccumulator:
    """Sums up an `InputStatistic`, for `see_inputs`."""

    takes_bf16 = False

    def zeros(self, x: Tensor) -> InputStatistic:
        width = x.shape[-1]
        sums = x.new_zeros(width, dtype=torch.float64)
        num_tokens = x.new_zeros((), dtype=torch.int64)
        return InputStatistic(x.new_zeros(width, width, dtype=torch.float32), sums, sums.clone(), num_tokens)

    def tensors(self, statistic: InputStatistic) -> list[Tensor]:
        return [statistic.gram, statistic.total, statistic.squares, statistic.num_tokens]

    def add(self, statistic: InputStatistic, x: Tensor, num_sequences: int) -> None:
        statistic.gram.addmm_(x.T, x)  # (4096, 1536) -> (1536, 1536)
        statistic.total += x.sum(0, dtype=torch.float64)
        statistic.squares += x.double().square().sum(0)
        statistic.num_tokens += len(x)


class PruneUnits(Step):
    """Sets the masked units of a structured pattern to zero, block by block; `castlm.structured.cut` removes them.

    Combined with n:m, SparseGPT prunes the kept units further, or magnitude if there is no calibration text.

    Args:
        score: a name in `SCORES`.
        refit_iterations: with 0 the kept weights stay as they are, as published. Above 0, the kept columns of an output
            layer are solved for exactly, and it counts the steps of conjugate gradients on n:m weights. Without a
            text, nothing is refitted.
        damping: is added for the least squares, as a share of the mean diagonal.
    """

    def __init__(self, score: str, pattern: Units, refit_iterations: int, damping: float) -> None:
        self.score, self.pattern = score, pattern
        self.refit_iterations, self.damping = refit_iterations, damping
        self.row = SCORES[score]
        self.needs_text = self.row.needs_text
        self.gradient_scores: dict[tuple[str, ...], Tensor] = {}
        """Scores (units,) by gradients, which are computed before the walk, by the names of the layers."""

    def __str__(self) -> str:
        return f"method {self.score}"

    def options(self) -> dict[str, Any]:
        read = {"refit_iterations": self.refit_iterations, "damping": self.damping}
        return {"method": self.score, "pattern": str(self.pattern), **read}

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        assert isinstance(source.pattern, Units)
        self.pattern = source.pattern
        report.damping = self.damping
        layers = source.layers
        scored = {name: layers[name] for names in self.pattern.unit_layers(layers) for name in names}
        if self.row.needs_gradients and scored:
            assert text is not None
            gradients = loss_gradients(source.model, scored, text.first(GRADIENT_SEQUENCES))
            for names in self.pattern.unit_layers(scored):
                weights = [scored[name].weight.float() for name in names]
                values = self.row.values(weights, None, [gradients[name] for name in names])
                # (units,): 4 bytes a unit, so that the gradients can be freed
                self.gradient_scores[names] = self.pattern.sums(values)

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        """Prunes the units of the block. The errors are on the whole calibration text."""
        layers = visit.inside
        statistics: dict[str, InputStatistic] = {}
        if visit.inputs is not None and layers:
            for seen in see_inputs(layers, visit.inputs, UnitAccumulator(), num_sequences=1):  # sums, not means
                for entry in seen.entries():
                    statistics |= dict.fromkeys(entry.names, entry.statistic)
            for name in layers:
                check_finite_input(name, statistics[name].gram)
        for names in self.pattern.joint_layers(layers):
            dense = {name: layers[name].weight.float().clone() for name in names}
            for name, weight in dense.items():
                check_finite(f"the weight of {name}", weight)
            for name, (new, damping) in self._solved(names, dense, statistics).items():
                layers[name].weight.copy_(new)
                error = None
                if name in statistics:  # |X old^T - X new^T|^2 / |X old^T|^2
                    gram = statistics[name].gram
                    lost, whole = (row_energies(weight, gram).sum() for weight in (dense[name] - new, dense[name]))
                    error = float(lost / whole) if whole > 0 else 0.0
                zeros = int((new == 0).sum())
                report.layers.append(LayerResult(name, tuple(new.shape), zeros, error, damping=damping))

    def _solved(
        self, names: tuple[str, ...], dense: dict[str, Tensor], inputs: Mapping[str, InputStatistic]
    ) -> dict[str, tuple[Tensor, float]]:
        """The new weights of layers that are masked together, each with its damping."""
        weights = list(dense.values())
        if len(names) == 1:  # n:m alone
            whole = torch.ones_like(weights[0], dtype=torch.bool)
            return {name: self._groups_in(dense[name], whole, inputs.get(name)) for name in names}
        if self.row.needs_gradients:
            scores = self.gradient_scores.pop(names)
        else:
            variance = inputs[names[-1]].variance if names[-1] in inputs else None
            scores = self.pattern.sums(self.row.values(weights, variance, None))
        kept = self.pattern.best(scores)
        damping = max(self.damping, MIN_DAMPING)
        solved = {}
        for name, weight, mask in zip(names, weights, self.pattern.expand(kept, weights)):
            new = weight.masked_fill(~mask, 0)
            if self.refit_iterations and name in inputs and name == names[-1]:
                # Of the output layer alone: all rows of its mask are equal, (1536,) kept channels.
                new[:, mask[0]] = solve_columns(weight, mask[0], inputs[name].gram, damping)
            solved[name] = self._groups_in(new, mask, inputs.get(name)) if self.pattern.inner else (new, self.damping)
        return solved

    def _groups_in(self, weight: Tensor, mask: Tensor, statistic: InputStatistic | None) -> tuple[Tensor, float]:
        """Prunes the kept rows and columns of a weight to n:m; returns the new weight and SparseGPT's damping.

        Groups of m are counted as they lie after the cut.
        """
        inner = self.pattern.inner
        damping = self.damping
        assert inner is not None
        rows, columns = mask.any(1), mask.any(0)
        small = weight[rows][:, columns].contiguous()  # (576, 1536) -> (576, 768)
        if statistic is None:
            new = small.masked_fill(~inner.mask(small), 0)
        else:
            gram = statistic.gram[columns][:, columns]
            inner.check_shape(small.shape)
            new, damping = sparsegpt(small, gram.clone(), inner.n, inner.m, damping)
            if self.refit_iterations:
                new = refit(new, small, damped(gram, max(self.damping, MIN_DAMPING)), self.refit_iterations)
        # back in its place: (576, 768) -> (576, 1536)
        return torch.zeros_like(weight).masked_scatter_(mask, new), damping


def prune_units_holds(sizes: Sequence[int], columns: int) -> int:
    """Elements that `PruneUnits` holds at its peak, beside weights and statistics.

    Args:
        sizes: the weights of the layers of one block.
        columns: of the widest layer.
    """
    # the layers as they were, their masks and new values; the damped Hessian, its factor and the right-hand side
    return 3 * sum(sizes) + 3 * columns**2


@torch.enable_grad()
def loss_gradients(
    model: PreTrainedModel, layers: Mapping[str, SparseLayer], text: CalibrationText
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the sequences of `text` for the weight of each layer.

    Image tokens do not count in the loss. The gradients of all layers are held at the same time, because they are
    summed over several passes; activations are recomputed block by block.
    """
    sequences, extras = text.sequences, text.extras
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    weights = {name: layer.weight.requires_grad_(True) for name, layer in layers.items()}
    size = 1 if extras is not None else max(1, BACKWARD_TOKENS // sequences.shape[1])
    batches: Any = sequences.to(model.device).split(size)
    image_token = getattr(model.config, "image_token_id", -1)
    _, blocks = block_stack(model, layers)
    try:
        with _recomputed(blocks):
            for ids, beside in zip(batches, extras or [{}] * len(batches), strict=True):
                labels = ids if extras is None else ids.masked_fill(ids == image_token, -100)
                given = {name: tensor.to(model.device) for name, tensor in beside.items()}
                with autocast(model.device, text.precision):
                    output: Any = model(input_ids=ids, labels=labels, use_cache=False, **given)
                (output.loss * (len(ids) / len(sequences))).backward()  # batches add up to the mean over sequences
        found = {name: weight.grad.detach() for name, weight in weights.items() if weight.grad is not None}
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    check_reached(weights, found)
    return found


@contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the context, the backward pass runs each of `blocks` again instead of keeping its activations."""
    with ExitStack() as stack:
        for block in blocks:
            recomputing = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(replaced_forward(block, recomputing))
        yield


def solve_columns(weight: Tensor, kept: Tensor, gram: Tensor, damping: float) -> Tensor:
    """New values (out, kept columns) for the columns `kept` (in,) of `weight` (out, in) that best replace all of it.

    They minimize |X weight^T - X_kept new^T|^2, where `gram` (in, in) is X^T X, with `damping` times its mean diagonal
    as a ridge around the old columns.

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> solve_columns(torch.tensor([[1.0, 3.0]]), torch.tensor([True, False]), x.T @ x, damping=0.0)
        tensor([[4.]])
    """
    inside = damped(gram[kept][:, kept], damping)  # (768, 768)
    lost = weight[:, ~kept] @ gram[~kept][:, kept]  # the outputs of the lost columns, seen by the kept ones: (576, 768)
    new: Tensor = weight[:, kept] + torch.linalg.solve(inside, lost.T).T
    return new
