"""The decay budget: whether a run's learning rates can bring its masked weights to zero, said before it starts.

Adam's step is about `lr` whatever `lam` is, so a masked weight travels at most about `sum_t lr_t * a_t`. A run whose
budget is smaller ends at a cliff: its final prune removes weights that were never near zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.errors import InputError

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class DecayBudget:
    """How far masked weights can travel, and how far they have to.

    `travel`: `sum_t lr_t * a_t`, in units of a weight. `quantiles`: of `|masked weight|`, at 0.5, 0.9, 0.99 and 1.
    `floor`: about where a weight that has arrived keeps swinging, the last learning rate; 0 for `"horizon"`.
    """

    decay: str
    travel: float
    quantiles: tuple[float, ...]
    floor: float

    @property
    def reaches_zero(self) -> bool:
        """Whether 99 % of the masked weights can reach zero; `"horizon"` does so by construction, `"none"` never."""
        return self.decay == "horizon" or (self.decay != "none" and self.travel >= self.quantiles[2])

    @property
    def factor(self) -> float:
        """By what the learning rate or the steps would have to be multiplied to reach zero; 1 when they do."""
        return 1.0 if self.reaches_zero else self.quantiles[2] / max(self.travel, 1e-30)

    def explain(self) -> str:
        """One line: the numbers, and the remedies when they do not suffice."""
        half, _, nearly_all, largest = self.quantiles
        numbers = (
            f"decay budget sum(lr*alpha) = {self.travel:.3g} against masked weights of median {half:.3g}, "
            f"99 % {nearly_all:.3g}, largest {largest:.3g}"
        )
        if self.reaches_zero:
            exact = " (decay 'horizon' reaches zero by construction)" if self.decay == "horizon" else ""
            return f"{numbers}: enough{exact}"
        return (
            f"{numbers}: masked weights cannot reach zero and the final prune would be a cliff; use decay='horizon', "
            f"or {self.factor:.1f}x the learning rate, or {self.factor:.1f}x the steps"
        )


@torch.no_grad()
def decay_budget(
    weights: Iterable[tuple[Tensor, Tensor]], lrs: Sequence[float], alphas: Sequence[float], decay: str
) -> DecayBudget:
    """The budget of a run with learning rates `lrs` and ramp `alphas`, one of each per step.

    Args:
        weights: pairs of a sparse weight and its bool mask, True = kept. Quantiles are over all pairs together, from
            an even sample of at most 4,096 masked entries per pair, the maximum from all of them.

    Raises:
        InputError: lists of different lengths, or no masked weight.
    """
    if len(lrs) != len(alphas):
        raise InputError(f"{len(lrs)} learning rates against {len(alphas)} alphas: one of each per step")
    samples, largest = [], 0.0
    for weight, mask in weights:
        masked = weight.detach()[~mask].abs().float()
        if masked.numel():
            largest = max(largest, float(masked.max()))
            samples.append(masked[:: masked.numel() // 4096 + 1].cpu())
    if not samples:
        raise InputError("there is no masked weight: nothing to decay")
    values = torch.cat(samples).sort().values
    at = [float(values[int(q * (len(values) - 1))]) for q in QUANTILES[:-1]]
    travel = sum(lr * alpha for lr, alpha in zip(lrs, alphas))
    return DecayBudget(decay, travel, (*at, largest), 0.0 if decay == "horizon" else lrs[-1])
