"""Solves layers that read the same input: SparseGPT, Wanda or magnitude, then better masks and a refit.

Their rows are solved together, because they share one statistic and one Cholesky factorization.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.oneshot.admm import improve_masks
from castlm.oneshot.inputs import ExpertInputs, LayerInput, check_finite_input, check_finite_weight
from castlm.oneshot.options import NO_REFINEMENTS, Refinements
from castlm.oneshot.report import LayerResult, relative_error
from castlm.oneshot.solvers import SOLVERS, Pruned, Settings, Solver, damped, refit, whole_hessian


def prune_layers(
    layers: Mapping[str, Tensor],
    seen: LayerInput | None,
    solver: Solver,
    to: Settings,
    refinements: Refinements = NO_REFINEMENTS,
) -> list[LayerResult]:
    """Prunes weights (out, in) that read the same input, in place.

    Args:
        seen: the input; None for magnitude without calibration text.

    Raises:
        InputError: a weight or an input that is not finite, or a Hessian that cannot be factorized.
    """
    names, weights = ", ".join(layers), list(layers.values())
    dense = torch.cat([weight.float() for weight in weights])  # q, k, v: (576, 576), 2 x (192, 576) -> (960, 576)
    check_finite_weight(names, dense)
    statistic = torch.zeros(()) if seen is None else seen.statistic
    check_finite_input(names, statistic)
    has_zero_input = bool(solver.axes) and not statistic.any()
    try:
        if has_zero_input:  # any mask gives the same output, the bias
            pruned = SOLVERS["magnitude"].prune(dense, statistic, to)._replace(num_dead=dense.shape[1])
        elif refinements.mask_iterations or refinements.num_refits(to.pattern):
            pruned = _solve_refined(dense, statistic, solver, to, refinements)
        else:
            pruned = solver.prune(dense, statistic, to)
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


def _solve_refined(dense: Tensor, statistic: Tensor, solver: Solver, to: Settings, refinements: Refinements) -> Pruned:
    """Solves for masks and weights, improves the masks, and refits the kept weights."""
    hessian = whole_hessian(statistic).clone()
    pruned = solver.prune(dense.clone(), statistic, to)
    weight, is_dead = pruned.weight, hessian.diagonal() == 0
    taken = damped(hessian, to.damping if pruned.damping is None else pruned.damping)
    del hessian
    if refinements.mask_iterations:
        alive = dense.masked_fill(is_dead, 0)  # a weight whose input is always 0 should take no place in a mask
        weight = improve_masks(weight, alive, taken, to.pattern, refinements.mask_iterations)
    if num_refits := refinements.num_refits(to.pattern):
        weight = refit(weight, dense, taken, num_refits)
    return pruned._replace(weight=weight)


def prune_experts(
    layer: ExpertLinear, seen: ExpertInputs, solver: Solver, to: Settings, refinements: Refinements
) -> LayerResult:
    """Prunes one projection of all experts of a transformer block, each with the statistics of its own tokens."""
    results = [
        prune_layers({entry.names[0]: layer.weight[expert]}, entry, solver, to, refinements)[0]
        for expert, entry in sorted(seen.experts.items())
    ]
    assert len(results) == layer.num_experts
    dampings = [result.damping for result in results if result.damping is not None]
    return LayerResult(
        seen.names[0],
        tuple(layer.weight.shape),
        sum(result.num_zeros for result in results),
        sum(result.error or 0.0 for result in results) / len(results),
        sum(result.num_dead for result in results),
        max(dampings, default=None),
        len(seen.few),
        sum(result.num_zero_inputs for result in results),
    )
