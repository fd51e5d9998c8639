"""Checks during a run that its masks match its weights and that every sparse weight is updated.

With a mask that does not match its weight, training would raise no error and give a useless model. So the mask is
recomputed by another formula, from the whole weight, gathered from all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from castlm.core.adams import AdamS
from castlm.core.blocks import block_name
from castlm.core.nm import NM, Pattern
from castlm.core.shards import local, own_rows, whole
from castlm.core.sparsify import SparseLayer, num_weights, weight_parameter
from castlm.world import World

_ROWS = 1024  # rows that are sorted at a time


def sorted_mask(weight: Tensor, pattern: NM) -> Tensor:
    """The mask of (..., out, in) by a stable sort of each group; `core.nm` counts comparisons instead."""
    n, m = pattern.n, pattern.m
    masks = []
    for rows in weight.detach().abs().flatten(0, -2).split(_ROWS):
        # (1024, 576) -> (1024, 144, 4): the indices of the n largest of each group, ties by position
        best = rows.unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True)[..., :n]
        masks.append(torch.zeros_like(rows, dtype=torch.bool).unflatten(1, (-1, m)).scatter_(-1, best, True).flatten(1))
    return torch.cat(masks).view(weight.shape) if masks else torch.zeros_like(weight, dtype=torch.bool)


class SelfCheck:
    """Checks in the first step that all sparse weights are stepped, and at every refresh the masks of one block.

    Args:
        layers: the sparse layers of the model, by name, which contains the number of the block.
    """

    def __init__(self, optimizer: AdamS, layers: Mapping[str, SparseLayer], pattern: Pattern, world: World) -> None:
        self.optimizer, self.world = optimizer, world
        self.num_sparse = sum(map(num_weights, layers.values()))
        self.covered = False
        self._names: dict[Tensor, str] = {}
        self._patterns: dict[Tensor, NM] = {}  # masks of other patterns have no second formula
        by_block: dict[str, list[Tensor]] = {}
        for name, layer in layers.items():
            weight = weight_parameter(layer)
            if isinstance(own := pattern.at(name), NM):
                self._patterns[weight] = own
                by_block.setdefault(block_name(name) or "", []).append(weight)
            self._names[weight] = name
        self._blocks = list(by_block.values())

    @contextlib.contextmanager
    def around_step(self, step: int, mask_interval: int) -> Iterator[None]:
        """Checks the optimizer's 0-based `step`, which runs inside the context.

        Without a `mask_interval`, the masks are fixed and not checked.

        Raises:
            RuntimeError: a sparse weight was not stepped, or a mask does not match its weight.
        """
        is_refresh = mask_interval > 0 and step % mask_interval == 0 and bool(self._blocks)
        # One block at a refresh, in turns: gathering every block each time would cost as much as a forward pass.
        watched = self._blocks[step // mask_interval % len(self._blocks)] if is_refresh else []
        expected = {p: sorted_mask(whole(p)[own_rows(p)], self._patterns[p]) for p in watched}
        before = {} if self.covered else {p: int(self.optimizer.state[p]["step"]) for p in self._names}
        yield
        wrong = [self._names[p] for p, mask in expected.items() if not torch.equal(local(self.optimizer.mask(p)), mask)]
        wrong = sorted({name for names in self.world.gather(wrong) for name in names}) if is_refresh else []
        if wrong:
            raise RuntimeError(f"step {step + 1}: the mask of {wrong[0]} does not match its weight: the run is invalid")
        if before:
            stepped = {p for p, old in before.items() if int(self.optimizer.state[p]["step"]) == old + 1}
            counts = self.world.gather(sum(local(p).numel() for p in self.optimizer.sparse_params() if p in stepped))
            total = sum(counts) // self.world.num_replicas  # replicas step the same rows
            if total != self.num_sparse:
                raise RuntimeError(f"{total:,} sparse weights were stepped, the model has {self.num_sparse:,}")
            self.covered = True
