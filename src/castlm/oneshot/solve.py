"""Prunes layers by the inputs that they read: with a solver, then with the refinements of SparseGPT.

The rows of layers that read the same input are solved together, because they share one statistic and one Cholesky
factorization.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from castlm.core.errors import naming
from castlm.core.sparsify import SparseLayer, matrices
from castlm.oneshot.inputs import Seen, check_finite_input, check_finite_weight
from castlm.oneshot.report import LayerResult, relative_error
from castlm.oneshot.solvers import (
    SOLVERS,
    LayerInput,
    Pruned,
    Settings,
    Solver,
    damped,
    improve_masks,
    refit,
    whole_hessian,
)


def prune_seen(layers: Mapping[str, SparseLayer], seen: Seen, solver: Solver, to: Settings) -> list[LayerResult]:
    """Prunes the layers that read the inputs `seen`, in place; each expert by the statistic of its own tokens."""
    results = []
    for each in seen:
        weights = {k: weight for name in each.names for k, weight in matrices(name, layers[name]).items()}
        found = []
        for entry in each.entries():
            found += prune_layers({name: weights[name] for name in entry.names}, entry, solver, to)
        assert len(found) == len(weights)
        if layers[each.names[0]].weight.dim() == 3:
            found = [LayerResult.of_matrices(each.names[0], found, each.num_few)]
        results += found
    return results


def prune_layers(
    weights: Mapping[str, Tensor], seen: LayerInput | None, solver: Solver, to: Settings
) -> list[LayerResult]:
    """Prunes weights (out, in) that read the same input, in place.

    Args:
        seen: the input; None for magnitude without calibration text.

    Raises:
        InputError: a weight or an input that is not finite, or a Hessian that cannot be factorized.
    """
    names = ", ".join(weights)
    dense = torch.cat([w.float() for w in weights.values()])  # q, k, v: (576, 576), 2 x (192, 576) -> (960, 576)
    check_finite_weight(names, dense)
    statistic = torch.zeros(()) if seen is None else seen.statistic
    check_finite_input(names, statistic)
    has_zero_input = bool(solver.axes) and not statistic.any()
    with naming(names):
        if has_zero_input:  # any mask gives the same output, the bias
            pruned = SOLVERS["magnitude"].prune(dense, statistic, to)
        elif to.refinements.mask_iterations or to.refinements.num_refits(to.pattern):
            pruned = _solve_refined(dense, statistic, solver, to)
        else:
            pruned = solver.prune(dense, statistic, to)
    results, rows = [], [weight.shape[0] for weight in weights.values()]
    for (name, weight), old, new in zip(weights.items(), dense.split(rows), pruned.weight.split(rows)):
        weight.copy_(new)
        lost = None if seen is None else relative_error(seen.sample @ (old - weight.float()).T, seen.sample @ old.T)
        num_zeros, shape = int((weight == 0).sum()), tuple(weight.shape)
        results.append(LayerResult(name, shape, num_zeros, lost, pruned.damping, num_zero_inputs=int(has_zero_input)))
    return results


def _solve_refined(dense: Tensor, statistic: Tensor, solver: Solver, to: Settings) -> Pruned:
    """Solves for masks and weights, improves the masks, and refits the kept weights."""
    hessian = whole_hessian(statistic).clone()
    pruned = solver.prune(dense.clone(), statistic, to)
    weight, is_dead = pruned.weight, hessian.diagonal() == 0
    taken = damped(hessian, to.damping if pruned.damping is None else pruned.damping)
    del hessian
    if to.refinements.mask_iterations:
        alive = dense.masked_fill(is_dead, 0)  # a weight whose input is always 0 should take no place in a mask
        weight = improve_masks(weight, alive, taken, to.pattern, to.refinements.mask_iterations)
    if num_refits := to.refinements.num_refits(to.pattern):
        weight = refit(weight, dense, taken, num_refits)
    return pruned._replace(weight=weight)
