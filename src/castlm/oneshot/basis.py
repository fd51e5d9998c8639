"""Changes the basis inside a transformer block so that pruning it to n:m loses less; its function stays the same.

Two axes inside a block can be turned without changing its outputs: the neurons of an MLP (a permutation), and the
values of each KV head, which `v_proj` writes and `o_proj` reads (a permutation or any rotation). The basis decides
which weights share a group of m and how large they are; its gain remains after training. The result is a plain
checkpoint of the same architecture. `castlm.oneshot.residual` also rotates the residual stream.

A change is kept only if it lowers the error of the layers solved by SparseGPT and leaves the outputs the same.
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
"""The same for weights of 16 bits, which are rounded again after the rotation."""


def wiring_or_note(model: PreTrainedModel, pattern: Pattern, options: BasisOptions) -> tuple[Wiring | None, str | None]:
    """The wiring for changes of basis; None if the basis stays, with the reason if the model's family is the reason.

    Raises:
        InputError: a pattern other than n:m, or a family whose basis cannot change. "auto" keeps the basis instead.
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
        statistics: statistics of the block's layers that will be pruned; entries of layers whose input turns are
            replaced.
    """
    untouched = dict(statistics)
    # Without autocast, because the tolerance depends on the dtype of the weights.
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
    report.notes.append(f"block {inputs.index}: basis unchanged, because its outputs would move by {moved:.1g}")


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference of an output that a change of basis may cause at this dtype."""
    return TOLERANCE if dtype in (torch.float32, torch.float64) else TOLERANCE_NARROW


def distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest magnitude in `before`."""
    return float((after - before).abs().max() / before.abs().max())
