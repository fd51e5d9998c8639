"""One-shot n:m pruning with a calibration text: magnitude, Wanda and SparseGPT, written from their papers.

The order is that of the published code. In one transformer block after another, the inputs of all layers are collected
while the block is still dense, or with staged statistics those of a layer when the layers before it are pruned; then
the outputs of the pruned block become the inputs of the next. Layers that read the same tensor (q, k, v; gate, up)
share one statistic and one Cholesky factorization, and SparseGPT solves group by group, all rows at once, instead of
column by column.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.combined import is_structured
from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear, SparseLayer
from castlm.core.pattern import NM, Pattern, as_pattern
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.models.architecture import eval_mode
from castlm.oneshot.admm import improve_masks
from castlm.oneshot.calibration import check_calibration
from castlm.oneshot.dense_twin import DenseTwin, Shift, dense_twin, follow_dense
from castlm.oneshot.families import describe
from castlm.oneshot.inputs import (
    ERROR_TOKENS,
    ExpertInputs,
    LayerInput,
    check_finite_input,
    check_finite_weight,
    check_plain_weights,
    input_groups,
    see_inputs,
)
from castlm.oneshot.options import NO_REFINEMENTS, Refinements, check_damping
from castlm.oneshot.report import LayerResult, OneshotReport, relative_error
from castlm.oneshot.solvers import MIN_DAMPING, SOLVERS, Pruned, Settings, Solver, damped, refit, whole_hessian
from castlm.oneshot.units import UnitSettings, prune_units_
from castlm.oneshot.walk import BlockInputs, Images, block_stack, layers_by_block


def prune_layers(
    layers: Mapping[str, Tensor],
    seen: LayerInput | None,
    solver: Solver,
    to: Settings,
    refinements: Refinements | None = None,
    shift: Shift | None = None,
) -> list[LayerResult]:
    """Prunes weights that read the same input, all their rows in one piece."""
    names, weights = ", ".join(layers), list(layers.values())
    dense = torch.cat([weight.float() for weight in weights])
    check_finite_weight(names, dense)
    statistic = torch.zeros(()) if seen is None else seen.statistic
    check_finite_input(names, statistic)
    has_zero_input = bool(solver.axes) and not statistic.any()
    try:
        if has_zero_input:  # the layer gives its bias whatever its mask is
            pruned = SOLVERS["magnitude"].prune(dense, statistic, to)._replace(num_dead=dense.shape[1])
        elif refinements is None or not (shift or refinements.mask_iterations or refinements.num_refits(to.pattern)):
            pruned = solver.prune(dense, statistic, to)
        else:
            pruned = _solve_refined(dense, statistic, solver, to, refinements, shift)
    except InputError as error:
        raise InputError(f"{names}: {error}") from None
    results, rows = [], [weight.shape[0] for weight in weights]
    for name, weight, old, new in zip(layers, weights, dense.split(rows), pruned.weight.split(rows)):
        weight.copy_(new)
        lost = None if seen is None else relative_error(seen.sample @ (old - weight.float()).T, seen.sample @ old.T)
        num_zeros = int((weight == 0).sum())
        found = num_zeros, lost, pruned.num_dead, pruned.damping
        results.append(LayerResult(name, tuple(weight.shape), *found, num_zero_inputs=int(has_zero_input)))
    return results


def _prune_experts(
    layer: ExpertLinear, seen: ExpertInputs, solver: Solver, to: Settings, refinements: Refinements
) -> LayerResult:
    """Prunes one projection of all experts of a block, each by the tokens that it has seen."""
    of_expert = [
        prune_layers({entry.names[0]: layer.weight[expert]}, entry, solver, to, refinements)[0]
        for expert, entry in sorted(seen.experts.items())
    ]
    assert len(of_expert) == layer.num_experts
    dampings = [result.damping for result in of_expert if result.damping is not None]
    return LayerResult(
        seen.names[0],
        tuple(layer.weight.shape),
        sum(result.num_zeros for result in of_expert),
        sum(result.error or 0.0 for result in of_expert) / len(of_expert),
        sum(result.num_dead for result in of_expert),
        max(dampings, default=None),
        len(seen.few),
        sum(result.num_zero_inputs for result in of_expert),
        is_left_unshifted=refinements.shifts_targets,
    )


def _solve_refined(
    dense: Tensor, statistic: Tensor, solver: Solver, to: Settings, refinements: Refinements, shift: Shift | None
) -> Pruned:
    """Solves for a shifted target, chooses better masks, and refits what is kept."""
    hessian, target = whole_hessian(statistic).clone(), dense
    if shift is not None:
        factors = refinements.target_asymmetry, refinements.stream_correction
        target = shift.target(dense, damped(hessian, max(to.damping, MIN_DAMPING)), *factors)
    pruned = solver.prune(target.clone(), statistic, to)
    weight, is_dead = pruned.weight, hessian.diagonal() == 0
    taken = damped(hessian, to.damping if pruned.damping is None else pruned.damping)
    del hessian
    if refinements.mask_iterations:
        alive = target.masked_fill(is_dead, 0)  # what multiplies nothing is not worth a place in a mask
        weight = improve_masks(weight, alive, taken, to.pattern, refinements.mask_iterations)
    if num_refits := refinements.num_refits(to.pattern):
        weight = refit(weight, target, taken, num_refits)
    return pruned._replace(weight=weight)


@torch.no_grad()
def prune_oneshot_(
    model: PreTrainedModel,
    method: str,
    *,
    pattern: Pattern | str = "2:4",
    calibration: Tensor | None = None,
    images: Images = None,
    damping: float = 0.01,
    block_size: int = 128,
    refinements: Refinements = NO_REFINEMENTS,
    seed: int = 0,
    filter_fn: FilterFn = is_sparse_linear,
    progress: Callable[[int, int], None] | None = None,
    precision: str = "fp32",
) -> OneshotReport:
    """Prunes a model to a pattern in place, without training.

    Structured patterns are pruned by `castlm.oneshot.units.prune_units_`, with the methods in its `SCORES`.

    Memory beyond the model: the hidden states of the calibration text in the model's dtype, and the statistics of one
    block (SparseGPT: a fp32 matrix (in, in) for each distinct input). Method taylor holds the gradient of every weight
    that may be pruned. The weights keep their dtype.

    Args:
        method: "magnitude", "wanda" or "sparsegpt", see `SOLVERS`; of a structured pattern a name in `SCORES`.
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`. Magnitude needs none; where it is
            given one, its first 256 tokens serve for the reconstruction errors.
        images: of a vision-language model: for each sequence what its forward takes beside the tokens.
        damping: SparseGPT: share of the mean of the diagonal of H that is added to it.
        block_size: SparseGPT: columns between two full matmuls; a matter of speed only.
        refinements: what is done beyond SparseGPT as published; nothing by default. Of these, structured patterns read
            `refit_iterations`.
        seed: of method "random".
        filter_fn: which layers, as for `sparse_linears`.
        progress: called with (blocks done, blocks in all).
        precision: of the passes over the calibration text: "fp32", in which they run in the dtype of the weights, or
            "bf16", in which autocast multiplies in bf16. Statistics and solvers are fp32.

    Raises:
        InputError: an unknown method, a bad pattern or number, no calibration where one is needed, tokens the model
            cannot take, nothing to prune, a weight or an input of a layer that is not finite, or a model that cannot
            be followed block by block. Once pruning has begun, the blocks before the one named are pruned already.

    Reference: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    pattern = as_pattern(pattern)
    if is_structured(pattern):
        settings = UnitSettings(damping, refinements.num_refits(pattern), seed)
        return prune_units_(
            model,
            method,
            pattern,
            calibration=calibration,
            images=images,
            to=settings,
            filter_fn=filter_fn,
            progress=progress,
            precision=precision,
        )
    started = time.perf_counter()
    to = Settings(pattern, damping, block_size)
    layers, left_dense = sparse_linears(model, to.pattern, filter_fn)
    check_prune(model, method, layers, calibration, to, refinements)
    kind = SOLVERS[method]
    if kind.add is None and calibration is not None:
        calibration = calibration[: math.ceil(ERROR_TOKENS / calibration.shape[1])]
        images = None if images is None else images[: len(calibration)]
    num_sequences, seq_len = (0, 0) if calibration is None else calibration.shape
    asked = damping if method == "sparsegpt" else None
    report = OneshotReport(method, str(to.pattern), num_sequences, seq_len, asked, left_dense=left_dense)
    if calibration is None:
        for name, layer in layers.items():
            report.layers += prune_layers({name: layer.weight}, None, kind, to)
    else:
        with eval_mode(model):
            stack, blocks = block_stack(model, layers)
            inputs = BlockInputs(model, blocks, calibration, images=images, precision=precision)
            twin = dense_twin(model, inputs, stack, len(calibration), refinements)
            of_block = layers_by_block(stack, len(blocks), layers)
            _prune_blocks(of_block, inputs, len(calibration), kind, to, refinements, twin, report, progress)
    report.seconds = time.perf_counter() - started
    return report


def _prune_blocks(
    of_block: Sequence[Mapping[str, SparseLayer]],
    inputs: BlockInputs,
    num_sequences: int,
    solver: Solver,
    to: Settings,
    refinements: Refinements,
    twin: DenseTwin | None,
    report: OneshotReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    for index, inside in enumerate(of_block):
        report.layers += prune_block(inside, inputs, num_sequences, solver, to, refinements, twin)
        is_last = index + 1 == len(of_block)
        if twin is not None:
            report.reconstructions += follow_dense(inside, twin, refinements, is_last)
        if not is_last:
            inputs.advance()
        if progress is not None:
            progress(index + 1, len(of_block))


def prune_block(
    inside: Mapping[str, SparseLayer],
    inputs: BlockInputs,
    num_sequences: int,
    solver: Solver,
    to: Settings,
    refinements: Refinements,
    twin: DenseTwin | None = None,
) -> list[LayerResult]:
    """Prunes the layers `inside` the current block of `inputs`.

    Args:
        twin: of `dense_twin`, with which `follow_dense` is called next.
    """
    if twin is not None:
        twin.enter()
    if not inside:
        return []
    results: list[LayerResult] = []
    for names in input_groups(inside, inputs) if refinements.is_staged else [list(inside)]:
        group = {name: inside[name] for name in names}
        results += _prune_group(group, inputs, num_sequences, solver, to, refinements, twin)
    return results


def _prune_group(
    group: Mapping[str, SparseLayer],
    inputs: BlockInputs,
    num_sequences: int,
    solver: Solver,
    to: Settings,
    refinements: Refinements,
    twin: DenseTwin | None,
) -> list[LayerResult]:
    """Prunes layers of the current block by statistics of one pass, which are held until it returns."""
    results: list[LayerResult] = []
    for entry in see_inputs(group, inputs, solver, num_sequences):
        layers = {name: group[name] for name in entry.names}
        if isinstance(entry, ExpertInputs):
            (layer,) = layers.values()
            assert isinstance(layer, ExpertLinear)
            results.append(_prune_experts(layer, entry, solver, to, refinements))
            continue
        shift = twin.shift(entry.names[0]) if twin is not None and refinements.shifts_targets else None
        weights = {name: layer.weight for name, layer in layers.items()}
        results += prune_layers(weights, entry, solver, to, refinements, shift)
    return results


def check_prune(
    model: PreTrainedModel,
    method: str,
    layers: Mapping[str, SparseLayer],
    calibration: Tensor | None,
    to: Settings,
    refinements: Refinements,
) -> None:
    """Raises `InputError` where `prune_oneshot_` would not take these arguments, before anything is changed."""
    if method not in SOLVERS:
        raise InputError(f"there is no one-shot method {method!r}: choose one of {', '.join(SOLVERS)}")
    if method == "sparsegpt" and not isinstance(to.pattern, NM):
        raise InputError(f"SparseGPT prunes to n:m patterns, not to {to.pattern}: use wanda or magnitude")
    check_damping(to.damping)
    if to.block_size < 1:
        raise InputError(f"block_size = {to.block_size} is out of range: it must be at least 1")
    check_plain_weights(layers, "pruning")
    if calibration is not None:
        check_calibration(model, calibration)
        if refinements.reconstruct_epochs and len(calibration) < 2:
            raise InputError("reconstruct_epochs holds a calibration sequence out, and there is one: give at least 2")
    elif SOLVERS[method].add is not None:
        raise InputError(f"method {method} needs a calibration text: pass calibration, from draw_calibration")
    if refinements.stream_correction and (obstacle := (wiring := describe(model)).correction_obstacle):
        raise InputError(f"stream_correction is not for {wiring.family}, which {obstacle}: use 0")
    if refinements != NO_REFINEMENTS and method != "sparsegpt":
        raise InputError(f"refinements are for method sparsegpt, not for {method}: leave them out")
    refinements.check()
