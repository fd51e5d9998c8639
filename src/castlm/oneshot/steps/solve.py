"""The step that prunes the layers of a block by the inputs that they read: a solver, then its refinements.

The rows of layers that read the same input are solved together, because they share one statistic and one Cholesky
factorization. With staged statistics, the inputs of a layer are measured after the layers before it are pruned.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.errors import check_finite, naming
from castlm.core.nm import Pattern
from castlm.core.sparsify import SparseLayer, matrices
from castlm.data.calibration import CalibrationText
from castlm.oneshot.inputs import check_finite_input, entries_of, see_inputs
from castlm.oneshot.layer_input import LayerInput
from castlm.oneshot.options import Refinements
from castlm.oneshot.refine import improve_masks, refit
from castlm.oneshot.report import LayerResult, OneshotReport, relative_error
from castlm.oneshot.routed import Seen
from castlm.oneshot.solvers import SOLVERS, Pruned, Settings, Solver, damped, whole_hessian
from castlm.oneshot.source import Source
from castlm.oneshot.steps.base import Step
from castlm.oneshot.walk import Visit
from castlm.world import World


class Solve(Step):
    """Prunes the layers of each block with a row of `SOLVERS`, and refines them.

    Args:
        refinements: of these, the step reads the iterations and the damping.
        is_staged: see `Effort.is_staged`. A solver without refinements reads the text once for each block.
    """

    is_divided = True

    def __init__(self, method: str, pattern: Pattern, refinements: Refinements, is_staged: bool) -> None:
        self.method, self.pattern, self.refinements = method, pattern, refinements
        self.solver = SOLVERS[method]
        self.is_staged = is_staged and self.solver.is_refined
        self.needs_text = self.reads_text = self.solver.reads_text

    def __str__(self) -> str:
        return f"method {self.method}"

    def options(self) -> dict[str, Any]:
        read = ("mask_iterations", "refit_iterations", "damping")
        options = {name: getattr(self.refinements, name) for name in read}
        return {"method": self.method, "pattern": str(self.pattern), "staged_statistics": self.is_staged, **options}

    def begin(self, source: Source, text: CalibrationText | None, report: OneshotReport) -> None:
        assert isinstance(source.pattern, Pattern)
        self.pattern = source.pattern
        if "damping" in self.solver.refinements:
            report.damping = self.refinements.damping

    def __call__(self, visit: Visit, report: OneshotReport) -> None:
        inside, inputs = visit.inside, visit.inputs
        visit.source.keep_dense(inside)
        if inputs is None:
            for name, layer in inside.items():
                settings = Settings(self.pattern.at(name), self.refinements, visit.world)
                report.layers += prune_layers({name: layer.weight}, None, self.solver, settings)
            return
        if not inside:
            return
        seen, visit.seen = visit.seen, []
        stages = [list(inside)]
        if self.is_staged:
            # No pruned layer comes before the first stage, so its statistics are still right; the others are freed.
            if seen:
                by_stage = stages_of(seen)
                stages, seen = _names_of(by_stage), by_stage[0]
                del by_stage
            else:
                stages = visit.world.on_main(
                    lambda: _names_of(stages_of(see_inputs(inside, inputs, None, 0))), patient=True
                )
        seen = self._with_statistics(seen)
        for num_done, names in enumerate(stages, 1):
            if not seen:
                seen = see_inputs({name: inside[name] for name in names}, inputs, self.solver, inputs.num_sequences)
            report.layers += self._prune_seen(inside, seen, visit.world)
            seen = []
            # Once q, k, v and o are pruned, the outputs of the attention are final, and later passes need not run it.
            unpruned = [inside[name] for later in stages[num_done:] for name in later]
            # Where one rank has one block at a time in memory, to need little of it counts more than time.
            if (visit.source.is_whole or visit.world.size > 1) and unpruned:
                inputs.keep_outputs(_finished(inputs.blocks[inputs.block_index], inside.values(), unpruned))

    def _prune_seen(self, layers: Mapping[str, SparseLayer], seen: Seen, world: World) -> list[LayerResult]:
        """Prunes the layers that read the inputs `seen`, in place; each expert by the statistic of its own tokens."""
        results = []
        for each in seen:
            weights = matrices({name: layers[name] for name in each.names})
            pruned = []
            for entry in each.entries():
                alike: dict[Pattern, dict[str, Tensor]] = {}  # layers of one pattern are solved together
                for name in entry.names:
                    layer = name if name in layers else each.names[0]  # an expert has the layer's name and a number
                    alike.setdefault(self.pattern.at(layer), {})[name] = weights[name]
                whole = entry.statistic
                for number, (pattern, together) in enumerate(alike.items(), 1):
                    # a solver may overwrite the statistic
                    entry.statistic = whole if number == len(alike) else whole.clone()
                    settings = Settings(pattern, self.refinements, world)
                    pruned += prune_layers(together, entry, self.solver, settings)
            assert len(pruned) == len(weights)
            if layers[each.names[0]].weight.dim() == 3:
                pruned = [LayerResult.of_matrices(each.names[0], pruned, each.num_few)]
            results += pruned
        return results

    def _with_statistics(self, seen: Seen) -> Seen:
        """Turns the Hessians in `seen` into the statistics of the solver; drops them if it has others."""
        for entry in entries_of(seen):
            statistic = self.solver.from_hessian(entry.statistic)
            if statistic is None:
                return []
            entry.statistic = statistic
        return seen


def stages_of(seen: Seen) -> list[Seen]:
    """Inputs in the order of the calls, grouped by the layers that are pruned before the next statistics are taken.

    A group has the layers that read one input, such as q, k and v. Layers whose names differ only in the number of a
    module, such as parallel experts, are one group.
    """
    alike: dict[tuple[str, ...], Seen] = {}
    for entry in seen:
        # experts.0.up_proj, experts.1.up_proj -> experts.#.up_proj
        names = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in entry.names)
        alike.setdefault(names, []).append(entry)
    return list(alike.values())


def _names_of(stages: list[Seen]) -> list[list[str]]:
    return [[name for entry in stage for name in entry.names] for stage in stages]


def _finished(
    block: nn.Module, layers: Collection[SparseLayer], unpruned: Collection[SparseLayer]
) -> Iterator[nn.Module]:
    """The modules directly in `block`, such as its attention, that contain `layers` and none that is unpruned."""
    for module in block.children():
        inside = set(module.modules()) - {module}
        if not inside.isdisjoint(layers) and inside.isdisjoint(unpruned):
            yield module


def prune_layers(
    weights: Mapping[str, Tensor],
    seen: LayerInput | None,
    solver: Solver,
    settings: Settings,
) -> list[LayerResult]:
    """Prunes weights (out, in) that read the same input, in place.

    Args:
        seen: the input; None for magnitude without calibration text.
        settings: their ranks have the same weights and input, and divide the rows.

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
        elif solver.is_refined and (settings.refinements.mask_iterations or settings.refinements.num_refits):
            pruned = _solve_refined(dense, statistic, solver, settings)
        else:
            pruned = solver.prune(dense, statistic, settings)
    num_rows = [len(weight) for weight in weights.values()]
    results = []
    for (name, weight), old, new in zip(weights.items(), dense.split(num_rows), pruned.weight.split(num_rows)):
        weight.copy_(new)
        error = None
        if seen is not None:
            # Of the weight as stored, so that rounding to bf16 counts: (256, 576) @ (576, 192).
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


def _solve_refined(dense: Tensor, statistic: Tensor, solver: Solver, settings: Settings) -> Pruned:
    """Solves for masks and weights, then for better masks and for better weights, as the options ask."""
    options = settings.refinements
    # The solver overwrites its statistic; the refinements need it whole.
    hessian = whole_hessian(statistic).clone()
    pruned = solver.prune(dense.clone(), statistic, settings)
    weight = pruned.weight
    dead = hessian.diagonal() == 0  # where the input is always 0, no weight is worth a place in a mask
    target = dense.masked_fill(dead, 0) if dead.any() else dense
    hessian = damped(hessian, options.damping if pruned.damping is None else pruned.damping)
    if options.mask_iterations:
        weight = improve_masks(weight, target, hessian, settings.pattern, options.mask_iterations, settings.world)
    if options.num_refits:
        weight = refit(weight, target, hessian, options.num_refits, settings.world)
    return pruned._replace(weight=weight)
