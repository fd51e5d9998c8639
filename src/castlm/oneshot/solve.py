"""Prunes layers by the inputs that they read: with a solver, then with the refinements of SparseGPT.

The rows of layers that read the same input are solved together, because they share one statistic and one Cholesky
factorization.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from castlm.core.errors import check_finite, naming
from castlm.core.nm import Pattern
from castlm.core.sparsify import SparseLayer, matrices
from castlm.oneshot.inputs import Seen, check_finite_input
from castlm.oneshot.options import Refinements
from castlm.oneshot.report import LayerResult, relative_error
from castlm.oneshot.solvers import (
    SOLVERS,
    LayerInput,
    Pruned,
    Settings,
    Solver,
    damped,
    improve_masks,
    improve_masks_holds,
    refit,
    refit_holds,
    whole_hessian,
)


def prune_seen(layers: Mapping[str, SparseLayer], seen: Seen, solver: Solver, settings: Settings) -> list[LayerResult]:
    """Prunes the layers that read the inputs `seen`, in place; each expert by the statistic of its own tokens."""
    results = []
    for each in seen:
        weights = matrices({name: layers[name] for name in each.names})
        found = []
        for entry in each.entries():
            found += prune_layers({name: weights[name] for name in entry.names}, entry, solver, settings)
        assert len(found) == len(weights)
        if layers[each.names[0]].weight.dim() == 3:
            found = [LayerResult.of_matrices(each.names[0], found, each.num_few)]
        results += found
    return results


def prune_layers(
    weights: Mapping[str, Tensor], seen: LayerInput | None, solver: Solver, settings: Settings
) -> list[LayerResult]:
    """Prunes weights (out, in) that read the same input, in place.

    Args:
        seen: the input; None for magnitude without calibration text.

    Raises:
        InputError: a weight or an input that is not finite, or a Hessian that cannot be factorized.
    """
    names = ", ".join(weights)
    dense = torch.cat([w.float() for w in weights.values()])  # q, k, v: (576, 576), 2 x (192, 576) -> (960, 576)
    check_finite(f"the weight of {names}", dense)
    statistic = torch.zeros(()) if seen is None else seen.statistic
    check_finite_input(names, statistic)
    has_zero_input = bool(solver.axes) and not statistic.any()
    with naming(names):
        if has_zero_input:  # any mask gives the same output, the bias
            pruned = SOLVERS["magnitude"].prune(dense, statistic, settings)
        elif settings.refinements.mask_iterations or settings.refinements.num_refits(settings.pattern):
            pruned = _solve_refined(dense, statistic, solver, settings)
        else:
            pruned = solver.prune(dense, statistic, settings)
    num_rows = [len(weight) for weight in weights.values()]
    results = []
    for (name, weight), old, new in zip(weights.items(), dense.split(num_rows), pruned.weight.split(num_rows)):
        weight.copy_(new)
        error = None
        if seen is not None:
            error = relative_error(seen.sample @ (old - weight.float()).T, seen.sample @ old.T)
        result = LayerResult(
            name,
            tuple(weight.shape),
            num_zeros=int((weight == 0).sum()),
            error=error,
            damping=pruned.damping,
            num_zero_inputs=int(has_zero_input),
        )
        results.append(result)
    return results


def prune_layers_holds(rows: int, columns: int, solver: Solver, refinements: Refinements, pattern: Pattern) -> int:
    """Elements that `prune_layers` holds at its peak beside weights and statistic, for weights of `rows` in all."""
    size = rows * columns
    phases = [size + solver.holds(rows, columns)]  # the dense weights together, and the solver
    improves, refits = refinements.mask_iterations > 0, refinements.num_refits(pattern) > 0
    if improves or refits:
        phases[0] += size + columns**2  # copies, of which the solver overwrites one
        if improves:
            phases.append(improve_masks_holds(rows, columns))
        if refits:
            phases.append(refit_holds(rows, columns))
    return max(phases)


def _solve_refined(dense: Tensor, statistic: Tensor, solver: Solver, settings: Settings) -> Pruned:
    """Solves for masks and weights, improves the masks, and refits the kept weights."""
    hessian = whole_hessian(statistic).clone()
    pruned = solver.prune(dense.clone(), statistic, settings)
    weight = pruned.weight
    is_dead = hessian.diagonal() == 0
    hessian = damped(hessian, settings.refinements.damping if pruned.damping is None else pruned.damping)
    if settings.refinements.mask_iterations:
        alive = dense.masked_fill(is_dead, 0)  # a weight whose input is always 0 should take no place in a mask
        weight = improve_masks(weight, alive, hessian, settings.pattern, settings.refinements.mask_iterations)
    if num_refits := settings.refinements.num_refits(settings.pattern):
        weight = refit(weight, dense, hessian, num_refits)
    return pruned._replace(weight=weight)
