"""What enters the layers of a transformer block, as sums over the calibration text: for scores and least squares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.oneshot.walk import BlockInputs


@dataclass
class InputStatistic:
    """Sums over what enters a layer: tokens, columns, and products of two columns."""

    gram: Tensor
    """X^T X, (in, in)."""
    total: Tensor
    """(in,)."""
    num_tokens: int = 0

    @property
    def second_moment(self) -> Tensor:
        """The mean square of each column."""
        return self.gram.diagonal() / max(1, self.num_tokens)

    @property
    def variance(self) -> Tensor:
        """Of each column over the tokens."""
        mean = self.total / max(1, self.num_tokens)
        return (self.second_moment - mean.square()).clamp(min=0)


def see_statistics(layers: Mapping[str, nn.Linear], inputs: BlockInputs) -> dict[str, InputStatistic]:
    """Runs the current block on all batches and sums up what enters `layers`; layers with one input share one sum."""
    found: dict[str, InputStatistic] = {}
    current: list[tuple[Tensor, InputStatistic]] = []

    def before(name: str, x: Tensor) -> None:
        known = next((statistic for other, statistic in current if other is x), None)
        if known is None:
            width = x.shape[-1]
            known = found.get(name) or InputStatistic(x.new_zeros(width, width).float(), x.new_zeros(width).float())
            tokens = x.reshape(-1, width).float()
            known.gram.addmm_(tokens.T, tokens)
            known.total += tokens.sum(0)
            known.num_tokens += len(tokens)
            current.append((x, known))
        found[name] = known

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: before(name, args[0])))
        for number, hidden in enumerate(inputs):
            current.clear()
            inputs.run(hidden, number)
    for name in layers:
        if name not in found:
            raise InputError(f"no calibration token reaches {name}: leave it out with filter_fn, or pass more text")
        if not found[name].gram.isfinite().all():
            raise InputError(
                f"the calibration text makes NaN or infinity at the input of {name}: load the model in fp32"
            )
    return found
