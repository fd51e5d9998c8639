"""AST, adaptive sparse trainer (arXiv 2407.20584): the method before CAST by the same authors, as an equation.

The authors' own optimizer is not here: it adds the decay after the momentum, squares both together for the second
moment, and takes masks by Wanda's metric, which needs the norms of all inputs as further state of every checkpoint and
rank. After 12 steps at 1e-3 its masks differ in 12 % of their entries.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from castlm.methods.ste import SRSTE


class AST(SRSTE):
    """The equation of AST under plain Adam: SR-STE with an annealed decay, without the extra weights of that paper.

    The decay enters the gradient and grows linearly to `lam` over the first quarter of the run. The mask is the
    one by magnitude, refreshed every `mask_interval` steps.
    """

    @property
    def mask_every(self) -> int:  # type: ignore[override]
        return self.options.mask_interval

    def before_update(self, step: int, parameters: Iterable[Tensor]) -> None:
        ramp = min(1.0, step / (0.25 * self.optimizer_options.max_steps))  # t / T0 with T0 = T / 4, then 1
        self.add_decay_(parameters, self.lam * ramp)
