"""One input of the layers of a transformer block, with the statistic that a solver sums over it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from castlm.oneshot.ranks import add_part_, share_sum_
from castlm.world import World

ERROR_TOKENS = 256
"""Calibration tokens on which the reconstruction error of a layer is measured."""


class Accumulator(Protocol):
    """Sums a statistic over the inputs of a layer: a `Solver`, or another object with these methods."""

    def add(self, statistic: Any, x: Tensor, num_sequences: int) -> None:
        """Adds x (tokens, in), fp32 or bf16."""

    def zeros(self, x: Tensor) -> Any: ...

    def tensors(self, statistic: Any) -> list[Tensor]:
        """The tensors of a statistic, which are sums."""
        ...


class LayerInput:
    """One input of a block's layers, which one or more layers read, with its statistic over all passes.

    Attributes:
        names: the names of the layers.
        sample: the first 256 tokens (tokens, in) fp32, on which errors are measured.
        statistic: the sum over the parts of the text that have ended; see `castlm.oneshot.ranks`.
        num_few: see `castlm.oneshot.routed.RoutedInputs`.
    """

    num_few = 0

    def __init__(self, x: Tensor, accumulator: Accumulator | None) -> None:
        self.names: list[str] = []
        self.current: Tensor | None = None  # in this pass; held, so that no new tensor can have its identity
        # A copy: the block's tensors are freed after the pass, and may be changed in place before.
        self.sample = x.reshape(-1, x.shape[-1])[:ERROR_TOKENS].to(torch.float32, copy=True)
        self.statistic: Any = None if accumulator is None else accumulator.zeros(x)
        self._part: Any = None  # the statistic over this part of the text

    def add(self, x: Tensor, accumulator: Accumulator | None, num_sequences: int) -> None:
        """Adds x (..., in) to the statistic of this part, which is fp32 even if the block runs under autocast."""
        if accumulator is not None:
            if self._part is None:
                self._part = accumulator.zeros(x)
            rows = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):
                accumulator.add(self._part, rows, num_sequences)

    def end_part(self, world: World, accumulator: Accumulator, num_ranks: int) -> None:
        """Adds the parts of the first `num_ranks` ranks to the statistic of rank 0, in order."""
        totals = accumulator.tensors(self.statistic)
        if self._part is not None:
            parts = accumulator.tensors(self._part)
        elif world.size == 1:  # no token of this part reached the expert
            return
        else:  # no token on this rank; a rank without a part sends none
            parts = [torch.zeros_like(total) for total in totals] if world.rank < num_ranks else totals
        for total, part in zip(totals, parts):
            add_part_(world, total, part, num_ranks)
        if self._part is not None:
            for part in parts:
                part.zero_()  # one buffer for all parts: (1536, 1536) fp32 are 9 MiB

    def fit_sample(self, shape: torch.Size) -> None:
        """Gives the sample the shape of another rank's, which `World.share_` will send; its values are lost then."""
        # a part with few tokens gives a shorter sample
        if self.sample.shape != shape:
            self.sample = self.sample.new_zeros(shape)

    def end(self, world: World, accumulator: Accumulator) -> None:
        """Gives every rank the statistic and the sample of rank 0."""
        self._part = None
        for total in accumulator.tensors(self.statistic):
            share_sum_(world, total)
        world.share_(self.sample, 0)

    def entries(self) -> list[LayerInput]:
        """The inputs that have a statistic of their own."""
        return [self]
