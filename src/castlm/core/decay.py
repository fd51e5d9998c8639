"""The rules by which AdamS decays masked weights. To add a rule, add one record to `DECAYS`.

Importing this module does not import torch, so that the command line can list the rules without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _over_the_run(step: int, total_steps: int, decay_end: float) -> float:
    return min(1.0, step / total_steps)


def _until_decay_end(step: int, total_steps: int, decay_end: float) -> float:
    return min(1.0, step / (decay_end * total_steps))


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


DECAYS: dict[str, Decay] = {
    "horizon": Decay(
        ramp=_until_decay_end,
        needs_lam=False,
        exact_zero=True,
        uses_decay_end=True,
        keep=lambda alpha: 1 - alpha,  # mix = (1 - a_t) mu
        # The factors of all steps multiply to 1 - a_t: a weight that its gradient leaves alone falls along the ramp.
        remaining=lambda alpha, alpha_next: (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0,
    ),
    "proportional": Decay(  # Eq. 7 of the paper: mix = (1 - a) mu + a lam sign(W)
        ramp=_over_the_run,
        needs_lam=True,
        exact_zero=False,
        pull=lambda alpha, lam: alpha * lam,
        keep=lambda alpha: 1 - alpha,
    ),
    "additive": Decay(  # its ablation: mix = mu + a lam sign(W)
        ramp=_over_the_run,
        needs_lam=True,
        exact_zero=False,
        pull=lambda alpha, lam: alpha * lam,
    ),
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
