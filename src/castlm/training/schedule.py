"""What changes from step to step of a run: its learning rate, the ramp of its decay, the weight of hidden states."""

from __future__ import annotations

from castlm.core.decay import decay_alpha
from castlm.training.config import TrainConfig
from castlm.training.lr_shapes import SCHEDULES


def warmup_steps(config: TrainConfig) -> int:
    return round(config.warmup_ratio * config.max_steps)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of the 0-based `step`: linear from 0 over the warm-up, then as `lr_scheduler_type` says."""
    warmup = warmup_steps(config)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    height = SCHEDULES[config.lr_scheduler_type](progress, step / config.max_steps)
    low = config.min_lr_ratio
    return config.learning_rate * (low + (1 - low) * height)


def hidden_weight(step: int, config: TrainConfig) -> float:
    """The weight of the distance of hidden states at the 0-based `step`: linear from its full value down to 0.

    At first the teacher's hidden states are the nearest target that each block has; in the end a sparse model does
    better with hidden states of its own.
    """
    return config.hidden_loss_weight * (1 - step / config.max_steps)


def num_left(step: int, last: int, every: int) -> int:
    """How many multiples of `every` (0: none) there are from `step` on up to `last`, which always counts as one.

    Examples:
        >>> num_left(1, last=10, every=4)  # at 4, 8 and 10
        3
    """
    return -(-last // every) - (step - 1) // every if every else 0


def schedule(config: TrainConfig) -> tuple[list[float], list[float]]:
    """The learning rate and the ramp of the decay at each step of a run."""
    steps, decay_end = range(config.max_steps), config.decay_end_used
    alphas = [decay_alpha(t, config.max_steps, config.decay, decay_end) for t in steps]
    return [learning_rate(t, config) for t in steps], alphas
