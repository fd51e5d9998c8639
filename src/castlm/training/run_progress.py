"""How far a run has come, and how long it still takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from castlm.training.config import TrainConfig
from castlm.training.schedule import num_left


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Evaluations by step."""
    first_step: int = 0
    """The step that this process started from."""
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    """Of the last evaluation, and of the last save, in this process."""

    def seconds_left(self, config: TrainConfig) -> float:
        """To the end of the last step, with the evaluations and saves to come, each as long as the last of its kind."""
        last = config.max_steps
        evaluations = num_left(self.step, last, config.eval_steps_used) * self.eval_seconds
        saves = num_left(self.step, last, config.save_steps) * self.save_seconds
        return self.seconds / self.step * (last - self.step) + evaluations + saves
