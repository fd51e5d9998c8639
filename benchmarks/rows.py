"""One row of the table: two contestants in one process, turn about, and the ratio between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Times = dict[str, list[float]]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Wall time, or processor time of this process: use the second with one thread on a shared machine."""


@dataclass
class Row:
    """A measurement of one contestant against another, as a ratio.

    Attributes:
        value: the ratio; median of the rounds where there are several.
        low, high: smallest and largest ratio of a round.
        goal: "<= 1.25" or ">= 8"; empty without a goal.
        bound: the limit of any implementation, and the distance of this one from it.
        detail: seconds, shapes and other data behind the ratio.
    """

    part: str
    against: str
    value: float
    low: float
    high: float
    goal: str = ""
    bound: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without one."""
        if not self.goal:
            return None
        sign, limit = self.goal.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int, clock: str = "wall") -> Times:
    """Seconds of each contestant in each of `repeats` rounds A B A B, after a warm-up round."""
    now = CLOCKS[clock]
    times: Times = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, run in contestants.items():
            started = now()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number:
                times[name].append(now() - started)
    return times


def ratio_row(
    part: str,
    against: str,
    mine: Sequence[float],
    theirs: Sequence[float],
    goal: str,
    speedup: bool | None = None,
    **rest: Any,
) -> Row:
    """`mine / theirs` round by round, or `theirs / mine` of a speed-up, which a goal with a lower limit is of."""
    if speedup is None:
        speedup = goal.startswith(">=")
    ratios = [b / a if speedup else a / b for a, b in zip(mine, theirs)]
    seconds = {"seconds": {"castlm": statistics.median(mine), "other": statistics.median(theirs)}}
    detail = seconds | rest.pop("detail", {})
    return Row(part, against, statistics.median(ratios), min(ratios), max(ratios), goal, detail=detail, **rest)


def llama_shapes(layers: int, hidden: int = 576, inner: int = 1536, kv: int = 192) -> list[tuple[int, int]]:
    """The sparse weights (out, in) of a LLaMA; with 30 layers, SmolLM2-135M's."""
    block = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return ([*block, (inner, hidden), (inner, hidden), (hidden, inner)]) * layers


def llama_parameters(
    layers: int, vocab: int, device: str = "cpu", hidden: int = 576
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Sparse and dense parameters with gradients, fp32: SmolLM2-135M's with 30 layers and 49,152 tokens."""
    generator = torch.Generator().manual_seed(0)

    def parameter(shape: tuple[int, ...]) -> nn.Parameter:
        made = nn.Parameter(_normal(shape, 0.05, generator).to(device))
        made.grad = _normal(shape, 1e-3, generator).to(device)
        return made

    sparse = [parameter(shape) for shape in llama_shapes(layers)]
    return sparse, [parameter((vocab, hidden)), *(parameter((hidden,)) for _ in range(2 * layers + 1))]


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(std=std, generator=generator)
