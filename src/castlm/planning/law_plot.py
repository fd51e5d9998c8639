"""The plot of a fitted law: perplexity over tokens with its band, and the residuals below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_file, reporting_full_disk
from castlm.planning.law import Law, interval
from castlm.planning.points import Point
from castlm.report.charts import NEEDS_MATPLOTLIB, can_draw

_FORMATS = (".pdf", ".png", ".svg")
_CREATOR = "castlm plan fit"
"""Marks a plot, in its metadata, as one that may be replaced."""


def check_plot(path: str | Path) -> None:
    """Checks before a fit that its plot can be written and replaces at most an earlier plot.

    Raises:
        InputError: matplotlib is not installed, the suffix of `path` is not one of `_FORMATS`, or it is a file that is
            no plot of a law.
    """
    if not can_draw():
        raise InputError(NEEDS_MATPLOTLIB)
    if Path(path).suffix.lower() not in _FORMATS:
        raise InputError(f"{path} has no suffix of a plot format: use one of {', '.join(_FORMATS)}")
    if os.path.lexists(path) and not (os.path.isfile(path) and _CREATOR.encode() in Path(path).read_bytes()):
        raise InputError(f"{path} exists and is not a plot of castlm plan fit: choose another name")


def plot_law(law: Law, points: Sequence[Point], path: str | Path) -> None:
    """Writes a plot to `path` (its suffix is the format): the law with its 90 % band, and log-loss residuals below.

    Raises:
        InputError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    tokens = np.geomspace(law.tokens_range[0] / 1.5, law.tokens_range[1] * 4, 100)
    x, ppl = np.array([point.tokens for point in points]), np.array([point.perplexity for point in points])
    band = np.array([interval(np.exp(law.draw_losses(t))) for t in tokens])
    (line,) = upper.plot(tokens, np.exp(law.loss(tokens)))
    upper.fill_between(tokens, band[:, 0], band[:, 1], alpha=0.2, color=line.get_color())
    upper.plot(x, ppl, "o", color=line.get_color())
    lower.plot(x, np.log(np.log(ppl)) - np.log(law.loss(x)), "o", color=line.get_color())
    upper.set(xscale="log", ylabel="perplexity", title=f"R² {law.r2:.4f} in log loss")
    lower.axhline(0, color="grey", linewidth=0.8)
    lower.set(xlabel="training tokens", ylabel="log-loss residual")
    with reporting_full_disk(path), atomic_file(Path(path)) as temporary:
        kind = Path(path).suffix.lower().removeprefix(".")
        figure.savefig(temporary, format=kind, metadata={"Creator": _CREATOR})
