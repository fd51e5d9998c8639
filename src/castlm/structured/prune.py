"""One-shot pruning of whole units: chooses the channels or KV heads to keep, and lets the kept weights compensate.

Every score is a sum over the weights of a unit. For each transformer block in turn, the inputs of its layers are
collected while it is still dense; then its units are ranked, and the lowest are set to zero. With `refit_iterations`,
the kept columns of the output layer are solved for by least squares on the calibration text.

| score | of a unit | reads |
|---|---|---|
| `magnitude` | the squared L2 norm of its weights | nothing |
| `flap` | the variance of its contribution to the stream (An et al. 2023, arXiv 2312.11983) | inputs |
| `taylor` | the sum of `|w dL/dw|` over its weights, as in LLM-Pruner (Ma et al. 2023, arXiv 2305.11627) | gradients |
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
from castlm.hardware import autocast
from castlm.models.architecture import replaced_forward
from castlm.oneshot.inputs import check_finite_input, check_reached, see_inputs
from castlm.oneshot.report import LayerResult
from castlm.oneshot.solvers import MIN_DAMPING, damped, refit, row_energies
from castlm.oneshot.source import block_stack
from castlm.oneshot.sparsegpt import sparsegpt
from castlm.oneshot.start import Start
from castlm.oneshot.walk import BACKWARD_TOKENS, BlockInputs, Extras
from castlm.structured.pattern import Units

TAYLOR_SEQUENCES = 32
"""Calibration sequences on which the Taylor score computes the gradient of the loss."""


@dataclass
class InputStatistic:
    """Sums over the inputs of a layer: tokens, columns, and products of two columns."""

    gram: Tensor  # X^T X, (in, in)
    total: Tensor  # the sum of each column, fp64, (in,)
    squares: Tensor
    """The sum of squares of each column, fp64, (in,): with a large mean, the variance is a small difference of sums."""
    num_tokens: int = 0

    @property
    def variance(self) -> Tensor:
        """The variance of each column over the tokens."""
        num_tokens = max(1, self.num_tokens)
        return (self.squares / num_tokens - (self.total / num_tokens).square()).clamp(min=0).float()


class UnitAccumulator:
    """Sums up an `InputStatistic`, for `see_inputs`."""

    def zeros(self, x: Tensor) -> InputStatistic:
        width = x.shape[-1]
        sums = x.new_zeros(width, dtype=torch.float64)
        return InputStatistic(x.new_zeros(width, width, dtype=torch.float32), sums, sums.clone())

    def add(self, statistic: InputStatistic, x: Tensor, num_sequences: int) -> None:
        statistic.gram.addmm_(x.T, x)  # (4096, 1536) -> (1536, 1536)
        statistic.total += x.sum(0, dtype=torch.float64)
        statistic.squares += x.double().square().sum(0)
        statistic.num_tokens += len(x)


class UnitSolver:
    """Sets the masked units of a structured pattern to zero, block by block; `castlm.structured.cut` removes them.

    Combined with n:m, SparseGPT prunes the kept units further, or magnitude if there is no calibration text. With
    `refit_iterations` 0 the kept weights stay as they are, as published. Above 0, the kept columns of an output layer
    are solved for exactly, and it counts the steps of conjugate gradients on n:m weights.

    Args:
        start: its `method` is a name in `SCORED_BY`; the `damping` of its refinements is added for the least squares.
        layers: all layers to prune, by name.
        calibration: int64, (num_sequences, seq_len). Without it, nothing is refitted.
        extras: for each sequence, the further arguments of the model's forward.
    """

    def __init__(
        self,
        start: Start,
        model: PreTrainedModel,
        layers: Mapping[str, nn.Linear],
        calibration: Tensor | None,
        extras: Extras,
    ) -> None:
        pattern = start.pattern.for_model(model)
        assert isinstance(pattern, Units)
        self.score, self.pattern = start.method, pattern
        self.damping, self.refit_iterations = start.refinements.damping, start.refinements.num_refits(pattern)
        self.taylor_scores: dict[tuple[str, ...], Tensor] = {}
        """The Taylor scores (units,), which are computed before the walk, by the names of the layers."""
        scored = {name: layers[name] for names in pattern.unit_layers(layers) for name in names}
        if self.score == "taylor" and scored:
            assert calibration is not None
            text = calibration[:TAYLOR_SEQUENCES]
            beside = None if extras is None else extras[:TAYLOR_SEQUENCES]
            gradients = loss_gradients(model, scored, text, beside, start.precision)
            for names in pattern.unit_layers(scored):
                changes = [(scored[name].weight.float() * gradients[name]).abs() for name in names]  # |w dL/dw|
                self.taylor_scores[names] = pattern.sums(changes)

    def __call__(self, layers: Mapping[str, nn.Linear], inputs: BlockInputs | None) -> list[LayerResult]:
        """Prunes the units of the current block's `layers`, in place. The errors are on the whole calibration text."""
        statistics: dict[str, InputStatistic] = {}
        if inputs is not None:
            for seen in see_inputs(layers, inputs, UnitAccumulator(), num_sequences=1):  # sums, not means
                for entry in seen.entries():
                    statistics |= dict.fromkeys(entry.names, entry.statistic)
            for name in layers:
                check_finite_input(name, statistics[name].gram)
        results = []
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
                results.append(LayerResult(name, tuple(new.shape), int((new == 0).sum()), error, damping=damping))
        return results

    def _solved(
        self, names: tuple[str, ...], dense: dict[str, Tensor], inputs: Mapping[str, InputStatistic]
    ) -> dict[str, tuple[Tensor, float]]:
        """The new weights of layers that are masked together, each with its damping."""
        weights = list(dense.values())
        if len(names) == 1:  # n:m alone
            whole = torch.ones_like(weights[0], dtype=torch.bool)
            return {name: self._groups_in(dense[name], whole, inputs.get(name)) for name in names}
        kept = self.pattern.best(self._scores(names, weights, inputs))
        damping = max(self.damping, MIN_DAMPING)
        solved = {}
        for name, weight, mask in zip(names, weights, self.pattern.expand(kept, weights)):
            new = weight.masked_fill(~mask, 0)
            if self.refit_iterations and name in inputs and name == names[-1]:
                new[:, mask[0]] = solve_columns(weight, mask[0], inputs[name].gram, damping)
            solved[name] = self._groups_in(new, mask, inputs.get(name)) if self.pattern.inner else (new, self.damping)
        return solved

    def _scores(
        self, names: tuple[str, ...], weights: Sequence[Tensor], inputs: Mapping[str, InputStatistic]
    ) -> Tensor:
        """The scores (units,) of the units in `weights`, whose last entry writes to the residual stream."""
        if self.score == "taylor":
            return self.taylor_scores.pop(names)
        if self.score == "magnitude":
            return self.pattern.sums([weight.square() for weight in weights])
        *inner, last = weights
        # W_ij^2 times the variance of input column j, in the layer that writes: (576, 1536) * (1536,)
        contribution = last.square() * inputs[names[-1]].variance
        return self.pattern.sums([*(torch.zeros_like(weight) for weight in inner), contribution])

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
        return torch.zeros_like(weight).masked_scatter_(mask, new), damping


def unit_solver_holds(sizes: Sequence[int], columns: int) -> int:
    """Elements that a `UnitSolver` holds at its peak, beside weights and statistics.

    Args:
        sizes: the weights of the layers of one block.
        columns: of the widest layer.
    """
    # the layers as they were, their masks and new values; the damped Hessian, its factor and the right-hand side
    return 3 * sum(sizes) + 3 * columns**2


@torch.enable_grad()
def loss_gradients(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    sequences: Tensor,
    extras: Extras = None,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """The gradient of the mean loss over `sequences` (num_sequences, seq_len) for the weight of each layer.

    With `extras`, image tokens do not count in the loss. The gradients of all layers are held at the same time, because
    they are summed over several passes; activations are recomputed block by block.
    """
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    weights = {name: layer.weight.requires_grad_(True) for name, layer in layers.items()}
    size = 1 if extras is not None else max(1, BACKWARD_TOKENS // sequences.shape[1])
    batches: Any = sequences.to(model.device).split(size)  # type: ignore[no-untyped-call]
    image_token = getattr(model.config, "image_token_id", -1)
    _, blocks = block_stack(model, layers)
    try:
        with _recomputed(blocks):
            for ids, beside in zip(batches, extras or [{}] * len(batches), strict=True):
                labels = ids if extras is None else ids.masked_fill(ids == image_token, -100)
                given = {name: tensor.to(model.device) for name, tensor in beside.items()}
                with autocast(model.device, precision):
                    output: Any = model(input_ids=ids, labels=labels, use_cache=False, **given)
                (output.loss * (len(ids) / len(sequences))).backward()
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
