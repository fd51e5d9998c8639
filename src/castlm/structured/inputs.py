"""Sums over the inputs of a block's layers on the calibration text, for the scores of units and for least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castlm.oneshot.inputs import LayerInput, check_finite_input, see_inputs
from castlm.oneshot.walk import BlockInputs


@dataclass
class InputStatistic:
    """Sums over the inputs of a layer: tokens, columns, and products of two columns."""

    gram: Tensor
    """X^T X, (in, in)."""
    total: Tensor
    """The sum of each column, fp64, (in,)."""
    squares: Tensor
    """The sum of squares of each column, fp64, (in,): with a large mean, the variance is a small difference of sums."""
    num_tokens: int = 0

    @property
    def second_moment(self) -> Tensor:
        """The mean square of each column."""
        return (self.squares / max(1, self.num_tokens)).float()

    @property
    def variance(self) -> Tensor:
        """The variance of each column over the tokens."""
        num_tokens = max(1, self.num_tokens)
        return (self.squares / num_tokens - (self.total / num_tokens).square()).clamp(min=0).float()

    def add(self, tokens: Tensor) -> None:
        """Adds fp32 `tokens` (num_tokens, in)."""
        self.gram.addmm_(tokens.T, tokens)
        self.total += tokens.sum(0, dtype=torch.float64)
        self.squares += tokens.double().square().sum(0)
        self.num_tokens += len(tokens)

    @classmethod
    def like(cls, x: Tensor) -> InputStatistic:
        """An empty statistic for inputs like `x` (..., in), on its device."""
        width = x.shape[-1]
        sums = x.new_zeros(width, dtype=torch.float64)
        return cls(x.new_zeros(width, width, dtype=torch.float32), sums, sums.clone())


class UnitAccumulator:
    """Sums up an `InputStatistic`, for `see_inputs`."""

    zeros = staticmethod(InputStatistic.like)

    @staticmethod
    def add(statistic: InputStatistic, x: Tensor, num_sequences: int) -> None:
        statistic.add(x)


def see_statistics(layers: Mapping[str, nn.Linear], inputs: BlockInputs) -> dict[str, InputStatistic]:
    """The statistics of the inputs of the current block's `layers`, by name; layers with the same input share one.

    Raises:
        InputError: a layer that no calibration token reaches, or an input that is not finite.
    """
    found: dict[str, InputStatistic] = {}
    for seen in see_inputs(layers, inputs, UnitAccumulator(), num_sequences=1):  # sums, not means over sequences
        assert isinstance(seen, LayerInput), "structured patterns leave experts dense"
        found |= dict.fromkeys(seen.names, seen.statistic)
    for name in layers:
        check_finite_input(name, found[name].gram)
    return found
