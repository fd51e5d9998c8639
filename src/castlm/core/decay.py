"""The rules by which AdamS decays masked weights, and the decay budget: whether a run can bring them to zero.

An Adam step moves a weight by about `lr` whatever `lam` is, so a masked weight travels at most about
`sum_t lr_t * a_t`. If that is less than its magnitude, the final prune removes weights that were never near zero.
Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decay:
    """A rule that changes the update of a masked weight. All functions take and return plain floats.

    Args:
        ramp: `a_t` from `(step, total_steps, decay_end)`: 0 at the start, 1 at full strength.
        needs_lam: whether the rule uses `lam`. Such a rule reaches zero only if the learning rates allow it.
        exact_zero: whether every masked weight is exactly zero once `a_t` is 1.
        uses_decay_end: whether `decay_end` changes the ramp.
        pull: the factor of the weight's sign, which is added to the momentum, from `(a_t, lam)`.
        keep: the factor of the momentum, from `a_t`.
        remaining: the factor of the weight after the step, from `(a_t, a_{t+1})`.
    """

    ramp: Callable[[int, int, float], float]
    needs_lam: bool
    exact_zero: bool
    uses_decay_end: bool = False
    pull: Callable[[float, float], float] = lambda alpha, lam: 0.0
    keep: Callable[[float], float] = lambda alpha: 1.0
    remaining: Callable[[float, float], float] = lambda alpha, alpha_next: 1.0

    @property
    def reduces(self) -> bool:
        """Whether the rule makes masked weights smaller at all."""
        return self.needs_lam or self.exact_zero


_PAPER = Decay(  # Eq. 7 of the paper: mix = (1 - a) mu + a lam sign(W)
    ramp=lambda step, total_steps, decay_end: min(1.0, step / total_steps),
    needs_lam=True,
    exact_zero=False,
    pull=lambda alpha, lam: alpha * lam,
    keep=lambda alpha: 1 - alpha,
)
DECAYS: dict[str, Decay] = {
    "horizon": Decay(
        ramp=lambda step, total_steps, decay_end: min(1.0, step / (decay_end * total_steps)),
        needs_lam=False,
        exact_zero=True,
        uses_decay_end=True,
        keep=lambda alpha: 1 - alpha,  # mix = (1 - a_t) mu
        # The factors of all steps multiply to 1 - a_t: a masked weight with zero gradient shrinks as 1 - a_t.
        remaining=lambda alpha, alpha_next: (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0,
    ),
    "proportional": _PAPER,
    "additive": replace(_PAPER, keep=lambda alpha: 1.0),  # its ablation: mix = mu + a lam sign(W)
    "none": Decay(ramp=lambda step, total_steps, decay_end: 0.0, needs_lam=False, exact_zero=False),
}
"""By name: ours (`"horizon"`), the paper's (`"proportional"`), its ablation (`"additive"`), and no decay."""


def decay_alpha(step: int, total_steps: int, decay: str, decay_end: float = 0.1) -> float:
    """The ramp `a_t` of a decay rule before the 0-based step `t = step`.

    Examples:
        >>> [decay_alpha(t, 100, "horizon", decay_end=0.2) for t in (0, 10, 20, 99)]
        [0.0, 0.5, 1.0, 1.0]
        >>> decay_alpha(50, 100, "proportional")
        0.5
    """
    return DECAYS[decay].ramp(step, total_steps, decay_end)


QUANTILES = (0.5, 0.9, 0.99, 1.0)
_DROPPED_BITS = 12  # of the 23 bits of a float32's mantissa


@dataclass(frozen=True)
class DecayBudget:
    """The distance that masked weights can travel, and the distance to zero, in units of a weight.

    Args:
        decay: the decay rule, a name in `DECAYS`.
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
    def headroom(self) -> float:
        """The decay budget divided by the 99 % quantile of the masked weights; above 1, these reach zero."""
        return self.travel / max(self.quantiles[2], 1e-30)

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


def decay_budget(
    weights: Iterable[tuple[Tensor, Tensor]],
    lrs: Sequence[float],
    alphas: Sequence[float],
    decay: str,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> DecayBudget:
    """The decay budget of a run.

    Args:
        weights: pairs of a sparse weight and its bool mask, True = kept. Every masked weight counts once in the
            quantiles, which are at most 0.05 % above the true ones; without masked weights they are 0.
        lrs: the learning rate of each step.
        alphas: the ramp `a_t` of each step, see `castlm.core.decay.decay_alpha`.
        decay: the decay rule.
        total: sums a tensor of counts (524,288,) over the ranks, if `weights` are only this rank's rows.

    Examples:
        >>> import torch
        >>> weight = torch.tensor([[0.5, 0.1, 0.4, 0.2]])
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> budget = decay_budget([(weight, mask)], lrs=[0.01] * 100, alphas=[1.0] * 100, decay="additive")
        >>> round(budget.travel, 2), budget.reaches_zero
        (1.0, True)
    """
    import torch

    # The bits of floats >= 0 are ordered as the floats are. So a histogram of the upper bits, whose 11 bits of mantissa
    # are a width of 0.05 %, has the quantiles of all weights, however many there are and however ranks share them.
    counts = torch.zeros(1 << (31 - _DROPPED_BITS), dtype=torch.int64)
    for weight, mask in weights:
        magnitudes = weight.detach()[~mask].float().abs()
        bins = magnitudes.view(torch.int32) >> _DROPPED_BITS
        counts = counts.to(bins.device) + torch.bincount(bins, minlength=len(counts))
    below = total(counts).cpu().cumsum(0)  # (524288,): the number of masked weights up to the end of each bin
    num_masked = int(below[-1])
    # The position of each quantile among the sorted weights: 0.99 of 400 is position 395, counted from 0.
    positions = torch.tensor([int(q * (num_masked - 1)) for q in QUANTILES])
    chosen = torch.searchsorted(below, positions, right=True).to(torch.int32)
    ends = ((chosen << _DROPPED_BITS) + (1 << _DROPPED_BITS) - 1).view(torch.float32)  # the largest of each bin
    ends[chosen == 0] = 0.0  # exact zeros, and what is below 6e-42
    quantiles = tuple(ends.tolist()) if num_masked else (0.0,) * len(QUANTILES)
    travel = sum(lr * alpha for lr, alpha in zip(lrs, alphas, strict=True))  # sum_t lr_t a_t, in units of a weight
    return DecayBudget(decay, travel, quantiles, 0.0 if DECAYS[decay].exact_zero else lrs[-1])
