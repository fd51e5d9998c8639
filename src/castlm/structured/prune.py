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

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.hardware import autocast
from castlm.models.architecture import eval_mode
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.folder import StartFolder
from castlm.oneshot.inputs import (
    LayerInput,
    check_finite_input,
    check_finite_weight,
    check_plain_weights,
    check_reached,
    see_inputs,
)
from castlm.oneshot.options import check_damping
from castlm.oneshot.report import LayerResult, OneshotReport
from castlm.oneshot.solvers import MIN_DAMPING, damped, refit, row_energies
from castlm.oneshot.source import MemoryModel, block_stack
from castlm.oneshot.sparsegpt import sparsegpt
from castlm.oneshot.walk import BACKWARD_TOKENS, BlockInputs, Extras, walk
from castlm.structured.pattern import SCORED_BY, Units

TAYLOR_SEQUENCES = 32
"""Calibration sequences on which the Taylor score computes the gradient of the loss."""
_BLOCK_COLUMNS = 128  # of SparseGPT


@dataclass
class InputStatistic:
    """Sums over the inputs of a layer: tokens, columns, and products of two columns."""

    gram: Tensor
    """X^T X, (in, in)."""
    total: Tensor
    """The sum of each column, fp64, (in,)."""
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


def see_statistics(layers: Mapping[str, nn.Linear], inputs: BlockInputs) -> dict[str, InputStatistic]:
    """The statistics of the inputs of the current block's `layers`, by name; layers with the same input share one.

    Raises:
        InputError: a layer that no calibration token reaches, or an input that is not finite.
    """
    found: dict[str, InputStatistic] = {}
    for seen in see_inputs(layers, inputs, UnitAccumulator(), num_sequences=1):  # sums, not means over sequences
        assert isinstance(seen, LayerInput), "structured patterns leave experts dense"
        found |= dict.fromkeys(seen.names, seen.statistic)
    for name in layers:
        check_finite_input(name, found[name].gram)
    return found


@torch.no_grad()
def prune_units_(
    model: PreTrainedModel,
    score: str,
    pattern: Pattern,
    *,
    calibration: Tensor | None = None,
    extras: Extras = None,
    damping: float = 0.01,
    refit_iterations: int = 0,
    filter_fn: FilterFn = is_sparse_linear,
    folder: StartFolder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    precision: str = "fp32",
) -> OneshotReport:
    """Sets the masked units of a structured pattern to zero, in place; `castlm.structured.cut` removes them.

    Combined with n:m, SparseGPT prunes the kept units further, or magnitude if there is no calibration text. The report
    has the error of each layer on the whole calibration text.

    Args:
        score: a name in `SCORED_BY`.
        calibration: int64, (num_sequences, seq_len). Without it, only scores that need none work, and nothing is
            refitted.
        extras, precision: as for `prune_oneshot_`.
        damping: share of the mean diagonal of X^T X that is added to the diagonal, for the least squares.
        refit_iterations: steps of conjugate gradients on n:m weights; 0 leaves the kept weights as they are, as
            published. Above 0, the kept columns of an output layer are solved for exactly.

    Raises:
        InputError: an unknown score, a score that needs calibration text without one, a pattern that does not fit,
            weights that are not finite, or a model that cannot be followed block by block.
    """
    started = time.perf_counter()
    pattern = pattern.for_model(model)
    found, left_dense = sparse_linears(model, pattern, filter_fn)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}  # experts stay dense
    if score not in SCORED_BY:
        raise InputError(f"{score!r} does not rank the units of {pattern}: choose one of {', '.join(SCORED_BY)}")
    check_damping(damping)
    check_plain_weights(layers, "pruning")
    if calibration is not None:
        check_calibration(model, calibration)
    elif score in Units.calibrated:
        raise InputError(f"score {score} needs a calibration text: pass calibration")
    num_sequences, seq_len = (0, 0) if calibration is None else calibration.shape
    report = OneshotReport(score, str(pattern), num_sequences, seq_len, damping, left_dense=left_dense)
    with eval_mode(model):
        assert isinstance(pattern, Units)
        work = _Pruning(score, pattern, damping, refit_iterations, report)
        scored = {name: layers[name] for names in work.pattern.unit_layers(layers) for name in names}
        if score == "taylor" and scored:
            assert calibration is not None
            of_taylor = None if extras is None else extras[:TAYLOR_SEQUENCES]
            work.rank(scored, loss_gradients(model, scored, calibration[:TAYLOR_SEQUENCES], of_taylor, precision))
        if calibration is None:
            work.prune_(layers, {})
        else:
            if folder is not None and folder.done:
                report.restore_(folder.results)
            options: dict[str, Any] = {"extras": extras, "precision": precision, "progress": progress}
            steps = walk(
                MemoryModel(model, layers), layers, calibration, folder=folder, results=report.saved, **options
            )
            for step in steps:
                inside = {name: layers[name] for name in step.inside}
                if inside:
                    assert step.inputs is not None
                    work.prune_(inside, see_statistics(inside, step.inputs))
    report.seconds = time.perf_counter() - started
    return report


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
    they are summed over several passes; activations take more memory and are recomputed block by block.
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
    own = [vars(block).get("forward") for block in blocks]  # some libraries replace the method of the class
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own):
            del block.forward
            if forward is not None:
                block.forward = forward


@dataclass
class _Pruning:
    """The state of one pruning while it moves from block to block."""

    score: str
    pattern: Units
    damping: float
    refit_iterations: int
    report: OneshotReport
    scores: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """The scores (units,) that were computed before the walk, by the names of the layers."""

    def rank(self, layers: Mapping[str, nn.Linear], gradients: Mapping[str, Tensor]) -> None:
        """Scores the units of all `layers` by the gradients of their weights, which can be freed afterwards."""
        for names in self.pattern.unit_layers(layers):
            weights = {name: layers[name].weight.float() for name in names}
            self.scores[names] = self._score(weights, {}, gradients)

    def prune_(self, layers: Mapping[str, nn.Linear], inputs: Mapping[str, InputStatistic]) -> None:
        """Prunes the units of `layers`; `inputs` holds the statistics of their inputs, or is empty."""
        for names in self.pattern.joint_layers(layers):
            dense = {name: layers[name].weight.float().clone() for name in names}
            for name, weight in dense.items():
                check_finite_weight(name, weight)
            for name, (new, damping) in self._solved(names, dense, inputs).items():
                layers[name].weight.copy_(new)
                error = _relative_error(dense[name], new, inputs[name].gram) if name in inputs else None
                shape, zeros = tuple(new.shape), int((new == 0).sum())
                self.report.layers.append(LayerResult(name, shape, zeros, error, damping=damping))

    def _solved(
        self, names: tuple[str, ...], dense: dict[str, Tensor], inputs: Mapping[str, InputStatistic]
    ) -> dict[str, tuple[Tensor, float]]:
        """The new weights of layers that are masked together, each with its damping."""
        weights = list(dense.values())
        if len(names) == 1:  # n:m alone
            whole = torch.ones_like(weights[0], dtype=torch.bool)
            return {name: self._groups_in(dense[name], whole, inputs.get(name)) for name in names}
        kept = self.pattern.best(self.scores.pop(names) if names in self.scores else self._score(dense, inputs, {}))
        damping, solved = max(self.damping, MIN_DAMPING), {}
        for name, weight, mask in zip(names, weights, self.pattern.expand(kept, weights)):
            new = weight.masked_fill(~mask, 0)
            if self.refit_iterations and name in inputs and name == names[-1]:
                new[:, mask[0]] = solve_columns(weight, mask[0], inputs[name].gram, damping)
            solved[name] = self._groups_in(new, mask, inputs.get(name)) if self.pattern.inner else (new, self.damping)
        return solved

    def _score(
        self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistic], gradients: Mapping[str, Tensor]
    ) -> Tensor:
        """The scores (units,) of the units in `weights`, whose last entry writes to the residual stream."""
        if self.score == "magnitude":
            return self.pattern.sums([weight.square() for weight in weights.values()])
        if self.score == "taylor":
            return self.pattern.sums([(weight * gradients[name]).abs() for name, weight in weights.items()])
        *inner, (name, last) = weights.items()
        # W_ij^2 times the variance of input column j, in the layer that writes: (576, 1536) * (1536,)
        values = [torch.zeros_like(weight) for _, weight in inner]
        return self.pattern.sums([*values, last.square() * inputs[name].variance])

    def _groups_in(self, weight: Tensor, mask: Tensor, statistic: InputStatistic | None) -> tuple[Tensor, float]:
        """Prunes the kept rows and columns of a weight to n:m; returns the new weight and SparseGPT's damping.

        Groups of m are counted as they lie after the cut.
        """
        inner, damping = self.pattern.inner, self.damping
        assert inner is not None
        rows, columns = mask.any(1), mask.any(0)
        small = weight[rows][:, columns].contiguous()  # (576, 1536) -> (576, 768)
        if statistic is None:
            new = small.masked_fill(~inner.mask(small), 0)
        else:
            gram = statistic.gram[columns][:, columns]
            inner.check_shape(small.shape)
            new, damping = sparsegpt(small, gram.clone(), inner.n, inner.m, damping, _BLOCK_COLUMNS)
            if self.refit_iterations:
                new = refit(new, small, damped(gram, max(self.damping, MIN_DAMPING)), self.refit_iterations)
        return torch.zeros_like(weight).masked_scatter_(mask, new), damping


def solve_columns(weight: Tensor, kept: Tensor, gram: Tensor, damping: float) -> Tensor:
    """New values for the columns `kept` (in,) of `weight` (out, in) that best replace the whole weight.

    They minimize |X weight^T - X_kept new^T|^2, with `damping` times the mean diagonal as a ridge around the old
    columns.

    Args:
        gram: X^T X, (in, in).

    Returns:
        (out, kept columns).

    Examples:
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> solve_columns(torch.tensor([[1.0, 3.0]]), torch.tensor([True, False]), x.T @ x, damping=0.0)
        tensor([[4.]])
    """
    inside = damped(gram[kept][:, kept], damping)  # (768, 768)
    lost = weight[:, ~kept] @ gram[~kept][:, kept]  # the outputs of the lost columns, seen by the kept ones: (576, 768)
    new: Tensor = weight[:, kept] + torch.linalg.solve(inside, lost.T).T
    return new


def _relative_error(old: Tensor, new: Tensor, gram: Tensor) -> float:
    """|X old^T - X new^T|^2 / |X old^T|^2."""
    whole = row_energies(old, gram).sum()
    return float(row_energies(old - new, gram).sum() / whole) if whole > 0 else 0.0
