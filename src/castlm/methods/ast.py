"""AST: annealed sparse training, the same group's method before CAST (arXiv 2407.20584)."""

from __future__ import annotations

from castlm.methods.ste import SRSTE


class AST(SRSTE):
    """Annealed sparse training without extra weights (arXiv 2407.20584): SR-STE whose decay grows linearly to its full
    value over the first quarter of the run, and a mask that is refreshed every `mask_interval` steps."""

    @property
    def mask_every(self) -> int:  # type: ignore[override]
        return self.config.mask_interval

    def before_update(self, step: int) -> None:
        ramp = min(1.0, step / (0.25 * self.config.max_steps))
        self.add_decay_(self.config.srste_lam * ramp)
