"""The shapes of the learning rate after the warm-up. To add one, add a function to `SCHEDULES`. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable

STABLE = 0.8
"""Fraction of the run after which `warmup_stable_decay` falls."""

Shape = Callable[[float, float], float]
"""The height of the schedule, from 1 at the start to 0 at the end. Its arguments are the progress since the warm-up and
the progress of the whole run, both in [0, 1]."""

SCHEDULES: dict[str, Shape] = {
    "cosine": lambda progress, overall: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, overall: 1 - progress,
    "constant": lambda progress, overall: 1.0,
    "warmup_stable_decay": lambda progress, overall: min(1.0, (1 - overall) / (1 - STABLE)),
}
"""By the names of `transformers`; the learning rate is `min_lr_ratio + (1 - min_lr_ratio) * height` of its peak."""
