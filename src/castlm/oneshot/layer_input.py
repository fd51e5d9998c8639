"""One input of the layers of a transformer block, with the statistic that a solver sums over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

ERROR_TOKENS = 256
"""Calibration tokens on which the reconstruction error of a layer is measured."""


class Accumulator(Protocol):
    """Sums a statistic over the inputs of a layer: a `Solver`, or another object with its `add` and `zeros`."""

    @property
    def add(self) -> Callable[[Any, Tensor, int], None] | None: ...

    def zeros(self, x: Tensor) -> Any: ...


class LayerInput:
    """One input of a block's layers, which one or more layers read, with its statistic over all passes.

    Attributes:
        names: the names of the layers.
        sample: the first 256 tokens (tokens, in) fp32, on which errors are measured.
        num_few: see `castlm.oneshot.routed.RoutedInputs`.
    """

    num_few = 0

    def __init__(self, x: Tensor, accumulator: Accumulator | None) -> None:
        self.names: list[str] = []
        self.current: Tensor | None = None  # in this pass; held, so that no new tensor can have its identity
        self.sample = x.reshape(-1, x.shape[-1])[:ERROR_TOKENS].to(torch.float32, copy=True)
        self.statistic: Any = None if accumulator is None else accumulator.zeros(x)

    def add(self, x: Tensor, accumulator: Accumulator | None, num_sequences: int) -> None:
        """Adds x (..., in) to the statistic, in fp32 even if the block runs under autocast."""
        if accumulator is not None and accumulator.add is not None:
            with torch.autocast(x.device.type, enabled=False):
                accumulator.add(self.statistic, x.reshape(-1, x.shape[-1]).float(), num_sequences)

    def entries(self) -> list[LayerInput]:
        """The inputs that have a statistic of their own."""
        return [self]
