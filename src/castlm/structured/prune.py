"""One-shot pruning of whole units: chooses the channels or KV heads to keep, and lets the kept weights compensate.

Every score is a sum over the weights of a unit. For each transformer block in turn, the inputs of its layers are
collected while it is still dense; then its units are ranked, and the lowest are set to zero. With `refit_iterations`,
the kept columns of the output layer are solved for by least squares on the calibration text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
from castlm.oneshot.inputs import check_finite_weight, check_plain_weights, check_reached
from castlm.oneshot.options import check_damping
from castlm.oneshot.report import LayerResult, OneshotReport
from castlm.oneshot.solvers import MIN_DAMPING, damped, refit, row_energies
from castlm.oneshot.source import MemoryModel, block_stack
from castlm.oneshot.sparsegpt import sparsegpt
from castlm.oneshot.walk import Extras, walk
from castlm.structured.inputs import InputStatistic, see_statistics
from castlm.structured.pattern import Channels, Combined, Heads

TAYLOR_SEQUENCES = 32
"""Calibration sequences on which the Taylor score computes the gradient of the loss."""
BACKWARD_TOKENS = 2048
"""Tokens of one of its backward passes; at least one sequence."""
_BLOCK_COLUMNS = 128  # of SparseGPT


class Seen(NamedTuple):
    """The facts about a layer from which its units are scored; a fact that the score does not need is None."""

    weight: Tensor
    writes: bool
    """Whether the layer writes to the residual stream."""
    input: InputStatistic | None
    gradient: Tensor | None
    generator: torch.Generator
    """The random numbers of the score "random", on the CPU."""


class Score(NamedTuple):
    """A row of `SCORES`."""

    values: Callable[[Seen], Tensor]
    """The share of each weight (out, in) of a layer in the score of its unit."""
    needs: str = ""
    """"inputs" or "gradients", both of which need calibration text; "" if the score needs none."""


def _magnitude(seen: Seen) -> Tensor:
    return seen.weight.square()


def _of_columns(seen: Seen, per_column: Callable[[InputStatistic], Tensor]) -> Tensor:
    """`W_ij^2` times a figure of input column j, in the layer that writes to the residual stream; 0 in the others."""
    if not seen.writes:
        return torch.zeros_like(seen.weight)
    assert seen.input is not None
    return seen.weight.square() * per_column(seen.input)


def _taylor(seen: Seen) -> Tensor:
    assert seen.gradient is not None
    return (seen.weight * seen.gradient).abs()


def _random(seen: Seen) -> Tensor:
    if not seen.writes:
        return torch.zeros_like(seen.weight)
    return torch.rand(seen.weight.shape, generator=seen.generator).to(seen.weight.device)


SCORES: dict[str, Score] = {
    "magnitude": Score(_magnitude),
    "wanda": Score(lambda seen: _of_columns(seen, lambda x: x.second_moment), "inputs"),
    "flap": Score(lambda seen: _of_columns(seen, lambda x: x.variance), "inputs"),
    "taylor": Score(_taylor, "gradients"),
    "random": Score(_random),
}
"""The scores of units: the L2 norm of their weights; the energy of their contribution to the stream, as in Wanda (Sun
et al. 2023, arXiv 2306.11695); its variance, as in FLAP (An et al. 2023, arXiv 2312.11983); |w dL/dw|, as in LLM-Pruner
(Ma et al. 2023, arXiv 2305.11627); and random numbers, as the control."""


class UnitSettings(NamedTuple):
    """Options beside the choice of units."""

    damping: float = 0.01
    """Share of the mean diagonal of X^T X that is added to the diagonal, for the least squares."""
    refit_iterations: int = 0
    """Steps of conjugate gradients on n:m weights; 0 leaves the kept weights as they are, as published. Above 0, the
    kept columns of an output layer are solved for exactly."""
    seed: int = 0


@torch.no_grad()
def prune_units_(
    model: PreTrainedModel,
    score: str,
    pattern: Pattern,
    *,
    calibration: Tensor | None = None,
    images: Extras = None,
    to: UnitSettings = UnitSettings(),  # noqa: B008  # it cannot change
    filter_fn: FilterFn = is_sparse_linear,
    folder: StartFolder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    precision: str = "fp32",
) -> OneshotReport:
    """Sets the masked units of a structured pattern to zero, in place; `castlm.structured.cut` removes them.

    Combined with n:m, SparseGPT prunes the kept units further, or magnitude if there is no calibration text. The report
    has the error of each layer on the whole calibration text.

    Args:
        score: a name in `SCORES`.
        calibration: int64, (num_sequences, seq_len). Without it, only scores that need none work, and nothing is
            refitted.
        images, precision: as for `prune_oneshot_`.

    Raises:
        InputError: an unknown score, a score that needs calibration text without one, a pattern that does not fit,
            weights that are not finite, or a model that cannot be followed block by block.
    """
    started = time.perf_counter()
    pattern = pattern.for_model(model)
    found, left_dense = sparse_linears(model, pattern, filter_fn)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}  # experts stay dense
    _check(model, score, pattern, layers, calibration, to)
    num_sequences, seq_len = (0, 0) if calibration is None else calibration.shape
    report = OneshotReport(score, str(pattern), num_sequences, seq_len, to.damping, left_dense=left_dense)
    with eval_mode(model):
        work = _Pruning(score, pattern, to, report, torch.Generator().manual_seed(to.seed))
        scored = {name: layers[name] for names in work.outer.joint_layers(layers) for name in names}
        if SCORES[score].needs == "gradients" and scored:
            assert calibration is not None
            of_taylor = None if images is None else images[:TAYLOR_SEQUENCES]
            work.rank(scored, loss_gradients(model, scored, calibration[:TAYLOR_SEQUENCES], of_taylor, precision))
        if calibration is None:
            work.prune_(layers, {})
        else:
            if folder is not None and folder.done:
                report.restore_(folder.results)
            source = MemoryModel(model, layers)
            for step in walk(
                source,
                layers,
                calibration,
                extras=images,
                precision=precision,
                folder=folder,
                results=report.saved,
                progress=progress,
            ):
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
    images: Extras = None,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """The gradient of the mean loss over `sequences` (num_sequences, seq_len) for the weight of each layer.

    With `images`, image tokens do not count in the loss. The gradients of all layers are held at the same time, because
    they are summed over several passes; activations take more memory and are recomputed block by block.
    """
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    weights = {name: layer.weight.requires_grad_(True) for name, layer in layers.items()}
    size = 1 if images is not None else max(1, BACKWARD_TOKENS // sequences.shape[1])
    batches: Any = sequences.to(model.device).split(size)  # type: ignore[no-untyped-call]
    image_token = getattr(model.config, "image_token_id", -1)
    _, blocks = block_stack(model, layers)
    try:
        with _recomputed(blocks):
            for ids, beside in zip(batches, images or [{}] * len(batches), strict=True):
                labels = ids if images is None else ids.masked_fill(ids == image_token, -100)
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
    pattern: Pattern
    to: UnitSettings
    report: OneshotReport
    generator: torch.Generator
    scores: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """The scores (units,) that were computed before the walk, by the names of the layers."""

    @property
    def outer(self) -> Channels | Heads:
        outer = self.pattern.cut_out
        assert isinstance(outer, Channels | Heads)
        return outer

    def rank(self, layers: Mapping[str, nn.Linear], gradients: Mapping[str, Tensor]) -> None:
        """Scores the units of all `layers` by the gradients of their weights, which can be freed afterwards."""
        for names in self.outer.joint_layers(layers):
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
        pattern, outer, weights = self.pattern, self.outer, list(dense.values())
        if len(names) == 1:  # n:m alone
            whole = torch.ones_like(weights[0], dtype=torch.bool)
            return {name: self._groups_in(dense[name], whole, inputs.get(name)) for name in names}
        kept = outer.best(self.scores.pop(names) if names in self.scores else self._score(dense, inputs, {}))
        damping, solved = max(self.to.damping, MIN_DAMPING), {}
        for name, weight, mask in zip(names, weights, outer.expand(kept, weights)):
            new = weight.masked_fill(~mask, 0)
            if self.to.refit_iterations and name in inputs and name == names[-1]:
                new[:, mask[0]] = solve_columns(weight, mask[0], inputs[name].gram, damping)
            groups = isinstance(pattern, Combined)
            solved[name] = self._groups_in(new, mask, inputs.get(name)) if groups else (new, self.to.damping)
        return solved

    def _score(
        self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistic], gradients: Mapping[str, Tensor]
    ) -> Tensor:
        """The scores (units,) of the units in `weights`, whose last entry writes to the residual stream."""
        *_, last = weights
        seen = [Seen(w, n == last, inputs.get(n), gradients.get(n), self.generator) for n, w in weights.items()]
        return self.outer.sums([SCORES[self.score].values(layer) for layer in seen])

    def _refitted(self, new: Tensor, target: Tensor, gram: Tensor) -> Tensor:
        return refit(new, target, damped(gram, max(self.to.damping, MIN_DAMPING)), self.to.refit_iterations)

    def _groups_in(self, weight: Tensor, mask: Tensor, statistic: InputStatistic | None) -> tuple[Tensor, float]:
        """Prunes the kept rows and columns of a weight to n:m; returns the new weight and SparseGPT's damping.

        Groups of m are counted as they lie after the cut.
        """
        assert isinstance(self.pattern, Combined)
        inner, damping = self.pattern.inner, self.to.damping
        rows, columns = mask.any(1), mask.any(0)
        small = weight[rows][:, columns].contiguous()  # (576, 1536) -> (576, 768)
        if statistic is None:
            new = small.masked_fill(~inner.mask(small), 0)
        else:
            gram = statistic.gram[columns][:, columns]
            inner.check_shape(small.shape)
            new, damping = sparsegpt(small, gram.clone(), inner.n, inner.m, damping, _BLOCK_COLUMNS)
            new = self._refitted(new, small, gram) if self.to.refit_iterations else new
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


def _check(
    model: PreTrainedModel,
    score: str,
    pattern: Pattern,
    layers: dict[str, nn.Linear],
    calibration: Tensor | None,
    to: UnitSettings,
) -> None:
    if score not in SCORES:
        raise InputError(f"{score!r} does not rank the units of {pattern}: choose one of {', '.join(SCORES)}")
    check_damping(to.damping)
    check_plain_weights(layers, "pruning")
    if calibration is not None:
        check_calibration(model, calibration)
    elif SCORES[score].needs:
        raise InputError(f"score {score} needs a calibration text: pass calibration, from draw_calibration")
