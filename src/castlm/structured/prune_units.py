"""Chooses the channels or KV heads to keep, sets the others to zero, and lets the kept weights compensate.

In each transformer block, the inputs of the layer that writes to the residual stream are collected while the block is
still dense; then its units are ranked by a row of `SCORES`, and the lowest are set to zero. The kept columns of that
layer are solved for by least squares on the calibration text. `castlm.structured.cut` removes what is zero.
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
from castlm.oneshot.report import LayerResult, OneshotReport
from castlm.oneshot.solvers import damped, row_energies
from castlm.oneshot.source import Source, block_stack
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import BACKWARD_TOKENS, Visit
from castlm.structured.scores import SCORES
from castlm.structured.units import Units, expand, number_in, sizes_of, sums

GRADIENT_SEQUENCES = 32
"""Calibration sequences on which the gradient of the loss is computed, for scores that need it."""
DAMPING = 0.01
"""The ridge of the least squares, as a share of the mean diagonal."""


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

    def zeros(self, x: Tensor) -> InputStatistic:
        width = x.shape[-1]
        total = x.new_zeros(width, dtype=torch.float64)
        num_tokens = x.new_zeros((), dtype=torch.int64)
        return InputStatistic(x.new_zeros(width, width, dtype=torch.float32), total, total.clone(), num_tokens)

    def tensors(self, statistic: InputStatistic) -> list[Tensor]:
        return [statistic.gram, statistic.total, statistic.squares, statistic.num_tokens]

    def add(self, statistic: InputStatistic, x: Tensor, num_sequences: int) -> None:
        x = x.float()
        statistic.gram.addmm_(x.T, x)  # (4096, 1536) -> (1536, 1536)
        statistic.total += x.sum(0, dtype=torch.float64)
        statistic.squares += x.double().square().sum(0)
        statistic.num_tokens += len(x)


class PruneUnits(Step):
    """Sets the lowest units of each transformer block to zero.

    Args:
        score: a name in `SCORES`.
        refits: solve for the kept columns of the output layer by least squares. Without a text, nothing is refitted.
    """

    def __init__(self, score: str, units: Units, refits: bool = True) -> None:
        self.score, self.units, self.refits = score, units, refits
        self.row = SCORES[score]
        self.needs_text = self.row.needs_text
        self.num_units = 0
        """Units of a transformer block of the dense model."""
        self.gradient_scores: dict[tuple[str, ...], Tensor] = {}
        """Scores (units,) by gradients, which are computed before the walk, by the names of the layers."""

    def __str__(self) -> str:
        return f"score {self.score}"

    def options(self) -> dict[str, Any]:
        return {"score": self.score, "units": str(self.units), "refits": self.refits}

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        _, self.num_units = number_in(sizes_of(self.units, source.model.config.to_dict()))
        if self.row.needs_gradients:
            assert text is not None
            gradients = loss_gradients(source.model, source.layers, text.first(GRADIENT_SEQUENCES))
            for names in self.units.layers(source.layers):
                weights = [source.layers[name].weight.float() for name in names]
                values = self.row.values(weights, None, [gradients[name] for name in names])
                # (units,): 4 bytes a unit, so that the gradients can be freed
                self.gradient_scores[names] = sums(values, self.num_units)

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        for names in self.units.layers(visit.inside):
            layers = {name: visit.inside[name] for name in names}
            dense = [layer.weight.float().clone() for layer in layers.values()]
            for name, weight in zip(names, dense):
                check_finite(f"the weight of {name}", weight)
            statistic = None if visit.inputs is None else self._statistic(names[-1], visit)
            if self.row.needs_gradients:
                scores = self.gradient_scores.pop(names)
            else:
                values = self.row.values(dense, None if statistic is None else statistic.variance, None)
                scores = sums(values, self.num_units)
            masks = expand(self.units.best(scores), dense)
            pruned = [weight.masked_fill(~mask, 0) for weight, mask in zip(dense, masks)]
            error = None
            if statistic is not None:
                if self.refits:  # all rows of this mask are equal: the kept columns, (1536,)
                    kept = masks[-1][0]
                    pruned[-1][:, kept] = solve_columns(dense[-1], kept, statistic.gram, DAMPING)
                # |X old^T - X new^T|^2 / |X old^T|^2 of the layer that writes
                lost, whole = (row_energies(w, statistic.gram).sum() for w in (dense[-1] - pruned[-1], dense[-1]))
                error = float(lost / whole) if whole > 0 else 0.0
            for name, new in zip(names, pruned):
                layers[name].weight.copy_(new)
                zeros = int((new == 0).sum())
                report.layers.append(LayerResult(name, tuple(new.shape), zeros, error if name == names[-1] else None))

    def _statistic(self, name: str, visit: Visit) -> InputStatistic:
        """The statistic of the input of the layer `name`."""
        assert visit.inputs is not None
        (seen,) = see_inputs({name: visit.inside[name]}, visit.inputs, UnitAccumulator(), num_sequences=1)  # sums
        (entry,) = seen.entries()
        statistic: InputStatistic = entry.statistic
        check_finite_input(name, statistic.gram)
        return statistic


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
        gradients = {name: weight.grad.detach() for name, weight in weights.items() if weight.grad is not None}
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    check_reached(weights, gradients)
    return gradients


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
