"""Axes of the charts: the ticks of a range, linear or logarithmic, and the text of a number on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def short(value: float) -> str:
    """A number as an axis shows it: 0.05, 12, 3.5k, 1.2M, 1e-06."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return "0" if value == 0 else f"{value:.3g}" if size >= 1e-3 else f"{value:.0e}"


def linear_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` multiples of 1, 2 or 5 times a power of ten that lie in [low, high]."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; also 2 and 5 times these, or finer ones, if the range is short."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        found = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(found) >= 3:
            every = -(-len(found) // 7)
            return found[::every]
    return linear_ticks(low, high)


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def of(values: Iterable[float], start: float, end: float, *, log: bool = False, pad: float = 0.05) -> Scale:
        """A scale over `values`, with a share `pad` of the range free at both ends."""
        found: Sequence[float] = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(found), max(found)
        if log:
            room = max((high / low) ** pad, 1.02)
            return Scale(low / room, high * room, start, end, True)
        room = (high - low) * pad or abs(high) * 0.05 or 1.0
        return Scale(low - room if low != 0 else 0.0, high + room if high != 0 else 0.0 if low else room, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value; values outside lie at the edge."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to label."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
