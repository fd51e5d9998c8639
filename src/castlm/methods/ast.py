"""AST, adaptive sparse trainer (arXiv 2407.20584): the method before CAST by the same authors."""

from __future__ import annotations

from castlm.methods.ste import SRSTE


class AST(SRSTE):
    """SR-STE with an annealed decay (arXiv 2407.20584), without the extra weights of that paper.

    The decay grows linearly to `srste_lam` over the first quarter of the run, and the mask is refreshed every
    `mask_interval` steps.
    """

    @property
    def mask_every(self) -> int:  # type: ignore[override]
        return self.options.mask_interval

    def before_update(self, step: int) -> None:
        ramp = min(1.0, step / (0.25 * self.optimizer_options.max_steps))  # t / T0 with T0 = T / 4, then 1
        self.add_decay_(self.options.srste_lam * ramp)
