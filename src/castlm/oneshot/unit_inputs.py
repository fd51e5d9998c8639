"""What enters the layers of a transformer block, as sums over the calibration text: for scores and least squares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from castlm.oneshot.inputs import check_finite_input, check_reached
from castlm.oneshot.walk import BlockInputs


@dataclass
class InputStatistic:
    """Sums over what enters a layer: tokens, columns, and products of two columns."""

    gram: Tensor
    """X^T X, (in, in)."""
    total: Tensor
    """Of each column, fp64, (in,)."""
    squares: Tensor
    """Of each column, fp64, (in,): the variance is a small difference of large numbers where a mean is large."""
    num_tokens: int = 0

    @property
    def second_moment(self) -> Tensor:
        """The mean square of each column."""
        return (self.squares / max(1, self.num_tokens)).float()

    @property
    def variance(self) -> Tensor:
        """Of each column over the tokens."""
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
        """The statistic of no token yet, for inputs like `x` (..., in), on its device."""
        width = x.shape[-1]
        sums = x.new_zeros(width, dtype=torch.float64)
        return cls(x.new_zeros(width, width, dtype=torch.float32), sums, sums.clone())


def see_statistics(layers: Mapping[str, nn.Linear], inputs: BlockInputs) -> dict[str, InputStatistic]:
    """Runs the current block on all batches and sums up what enters `layers`; layers with one input share one sum."""
    found: dict[str, InputStatistic] = {}
    current: list[tuple[Tensor, InputStatistic]] = []

    def before(name: str, x: Tensor) -> None:
        known = next((statistic for other, statistic in current if other is x), None)
        if known is None:
            known = found.get(name) or InputStatistic.like(x)
            known.add(x.reshape(-1, x.shape[-1]).float())
            current.append((x, known))
        found[name] = known

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: before(name, args[0])))
        for number, hidden in enumerate(inputs):
            current.clear()
            inputs.run(hidden, number)
    check_reached(layers, found)
    for name in layers:
        check_finite_input(name, found[name].gram)
    return found
