"""The decay budget: whether the learning rates of a run can bring its masked weights to zero, known before it starts.

An Adam step moves a weight by about `lr` whatever `lam` is, so a masked weight travels at most about
`sum_t lr_t * a_t`. If that is less than its magnitude, the final prune removes weights that were never near zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from castlm.core.decay import DECAYS
from castlm.core.errors import InputError

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class DecayBudget:
    """The distance that masked weights can travel, and the distance to zero, in units of a weight.

    Args:
        decay: the decay rule, a name in `castlm.core.decay.DECAYS`.
        travel: the decay budget `sum_t lr_t * a_t`.
        quantiles: of `|masked weight|` at 0.5, 0.9, 0.99 and 1.
        floor: the last learning rate, at about which a weight that has arrived keeps oscillating; 0 for a decay that
            ends at exactly zero.
    """

    decay: str
    travel: float
    quantiles: tuple[float, ...]
    floor: float

    @property
    def reaches_zero(self) -> bool:
        """Whether 99 % of the masked weights can reach zero.

        A decay that ends at exactly zero always does, and one that does not decay never does.
        """
        decay = DECAYS[self.decay]
        return decay.exact_zero or (decay.reduces and self.travel >= self.quantiles[2])

    @property
    def factor(self) -> float:
        """The factor by which the learning rate or the steps must grow to reach zero; 1 if they suffice."""
        return 1.0 if self.reaches_zero else self.quantiles[2] / max(self.travel, 1e-30)

    def explain(self) -> str:
        """One line: the numbers, and the remedies if they do not suffice."""
        half, _, nearly_all, largest = self.quantiles
        numbers = (
            f"decay budget sum(lr*alpha) = {self.travel:.3g} against masked weights of median {half:.3g}, "
            f"99 % {nearly_all:.3g}, largest {largest:.3g}"
        )
        if self.reaches_zero:
            exact = f" (decay {self.decay!r} reaches zero by construction)" if DECAYS[self.decay].exact_zero else ""
            return f"{numbers}: enough{exact}"
        return (
            f"{numbers}: masked weights cannot reach zero, so the final prune would raise the loss sharply; use "
            f"decay='horizon', or {self.factor:.1f}x the learning rate, or {self.factor:.1f}x the steps"
        )


@torch.no_grad()
def decay_budget(
    weights: Iterable[tuple[Tensor, Tensor]], lrs: Sequence[float], alphas: Sequence[float], decay: str
) -> DecayBudget:
    """The decay budget of a run.

    Args:
        weights: pairs of a sparse weight and its bool mask, True = kept. Quantiles are over all pairs together, from
            an even sample of at most 4,096 masked entries per pair; the maximum is over all entries.
        lrs: the learning rate of each step.
        alphas: the ramp `a_t` of each step, see `castlm.core.decay.decay_alpha`.
        decay: the decay rule.

    Returns:
        The decay budget `sum_t lr_t * a_t`, and the quantiles of the masked weights, which it must cover.

    Raises:
        InputError: no masked weight.

    Examples:
        >>> weight = torch.tensor([[0.5, 0.1, 0.4, 0.2]])
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> budget = decay_budget([(weight, mask)], lrs=[0.01] * 100, alphas=[1.0] * 100, decay="additive")
        >>> round(budget.travel, 2), budget.reaches_zero
        (1.0, True)
    """
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
    travel = sum(lr * alpha for lr, alpha in zip(lrs, alphas, strict=True))
    return DecayBudget(decay, travel, (*at, largest), 0.0 if DECAYS[decay].exact_zero else lrs[-1])
