"""Changes the basis of a transformer block so that an n:m prune of it loses less, and leaves its function as it is.

Two axes inside a block can be turned without a trace outside: the neurons of an MLP (a permutation), and the values of
each KV head, which `v_proj` writes and `o_proj` reads (a permutation or any rotation). Which weights share a group of
m, and how large they are in it, depends on that basis, and the gain stays through training. The result is a plain
checkpoint of the same architecture. `castlm.oneshot.residual` rotates the residual stream too.

A change is kept only if the error of the layers solved by SparseGPT falls under it and the outputs stay the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.oneshot.block_basis import Statistics, turn_mlps_, turn_values_
from castlm.oneshot.families import Block, Wiring, describe
from castlm.oneshot.options import BasisOptions
from castlm.oneshot.report import BasisReport
from castlm.oneshot.walk import BlockInputs

TOLERANCE = 1e-4
"""Largest difference of an output relative to the largest output, for weights of 32 bits."""
TOLERANCE_NARROW = 5e-2
"""The same for weights of 16 bits, which are rounded again after they have been rotated."""


def wiring_or_note(model: PreTrainedModel, pattern: Pattern, options: BasisOptions) -> tuple[Wiring | None, str | None]:
    """The wiring by which the basis is changed; None where nothing is turned, with the reason if the family is why.

    Raises:
        InputError: another pattern than n:m, or a family that does not allow it, where "auto" does not go without.
    """
    if options.is_off or (options.rotate == "auto" and not isinstance(pattern, NM)):
        return None, None
    if not isinstance(pattern, NM):
        raise InputError(f"a change of basis is for n:m patterns, not {pattern}: use rotate auto")
    try:
        return describe(model), None
    except InputError as error:
        if options.rotate != "auto":
            raise
        return None, str(error)


def turn_block_(
    block: Block, statistics: Statistics, inputs: BlockInputs, options: BasisOptions, pattern: NM, report: BasisReport
) -> None:
    """Turns the values and the neurons of the current block of `inputs`.

    Args:
        statistics: of the block's layers that are going to be pruned; those whose input is turned are replaced.
    """
    untouched = dict(statistics)
    # Without autocast: the tolerance is one of the weights' dtype.
    outputs = partial(inputs.call(0).run, inputs.blocks[inputs.index], inputs[0])
    before, undo = outputs(), []
    if options.rotates_values or options.permute:
        iterations = options.rotation_iterations if options.rotates_values else 0
        change = report.of("values rotated" if options.rotates_values else "values permuted")
        undo += turn_values_(block.attention, statistics, pattern, change, iterations)
    if options.permute:
        undo += turn_mlps_(block.mlps, statistics, pattern, report.of("MLP neurons permuted"))
    if not undo:
        return
    moved = distance(before, outputs())
    if moved <= tolerance_of(before.dtype):
        report.moved = max(report.moved, moved)
        return
    for weight, old in undo:
        weight.copy_(old)
    statistics.update(untouched)
    report.notes.append(f"block {inputs.index}: its basis is left as it was, for its outputs moved by {moved:.1g}")


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference of an output that a change of basis may make in a model of this dtype."""
    return TOLERANCE if dtype in (torch.float32, torch.float64) else TOLERANCE_NARROW


def distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest of `before`."""
    return float((after - before).abs().max() / before.abs().max())
