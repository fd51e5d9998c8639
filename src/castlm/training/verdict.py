"""The verdict on a run, and the rise that stops one; read without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from castlm.facts import Perplexities, Verdict

FAR_FACTOR = 2.0
"""A result whose perplexity is more than this many times the dense model's fell short, even if it improved."""
RISE_FACTOR = 2.0
"""A result that fell short without having had a sparse start diverged if it is above this many times the run's own
lowest perplexity."""

STOP_FACTOR = 1.5
"""A run stops if its last two evaluations are above this many times the perplexity of its start."""


def has_risen(starts_dense: bool, figures: Mapping[str, Mapping[str, float]]) -> str | None:
    """How far the last two evaluations of a run lie above its start, in words; None if it may go on.

    One evaluation alone may lie there: a high learning rate can raise the perplexity for some steps. A method that
    becomes sparse during training has no start to compare with.

    Args:
        starts_dense: whether the run is of such a method.
        figures: the figures of each evaluation, by step.

    Examples:
        >>> has_risen(False, {"0": {"prune_now_ppl": 21.7}, "2": {"prune_now_ppl": 35.0}, "4": {"prune_now_ppl": 46.4}})
        'the last two perplexities, 35.000 and 46.400, are far above the start (21.700)'
    """
    rows = [figures[step] for step in sorted(figures, key=int)]
    if len(rows) < 3 or (starts_dense and "prune_now_ppl" in rows[0]):
        return None
    start, before, last = (row.get("prune_now_ppl", row.get("perplexity", math.nan)) for row in (rows[0], *rows[-2:]))
    if before <= STOP_FACTOR * start or last <= STOP_FACTOR * start:
        return None
    return f"the last two perplexities, {before:,.3f} and {last:,.3f}, are far above the start ({start:,.3f})"


def perplexities_when_sparse(
    figures: Mapping[str, Mapping[str, float]], max_steps: int, mask_interval: int
) -> list[float]:
    """The perplexities of a run that becomes sparse during training, since every group is n:m, without the last one.

    Every group is n:m from the first mask refresh in the second half of the run.
    """
    first = max_steps / 2 + mask_interval
    return [values["prune_now_ppl"] for step, values in figures.items() if first <= int(step) < max_steps]


_DIVERGED = {"problem": "DIVERGED", "remedy": "lower learning_rate"}
_FELL_SHORT = {"problem": "FELL SHORT", "remedy": "train for more steps"}


def verdict(perplexities: Perplexities, earlier: Iterable[float] = ()) -> Verdict:
    """Whether training improved the model, and why.

    Args:
        perplexities: those of a run: `pruned` (`trained` for the dense control), `dense` and `one_shot` if they were
            measured, and `start` for a fine-tuning run.
        earlier: perplexities since the model became sparse, for a run that becomes sparse during training.

    Returns:
        The verdict. `ok` is False if the run diverged (its perplexity is not finite, or above its start: the one-shot
        start, or the model before fine-tuning), or if it ended above twice the perplexity of the dense model. Then
        `problem` and `remedy` name the problem and the help. A run without a start that ended far from the dense model
        diverged if it is the dense control, or above twice the lowest of `earlier`; otherwise it fell short.

    Examples:
        >>> verdict(Perplexities(dense=6.0, one_shot=14.0, pruned=8.0)).reason
        'perplexity 8.000, below the one-shot start (14.000), 1.33 times the dense model (6.000)'
        >>> verdict(Perplexities(dense=6.0, one_shot=14.0, pruned=15.0)).ok
        False
    """
    final = perplexities.final
    dense, one_shot = perplexities.dense, perplexities.one_shot
    if final is None or not math.isfinite(final):
        return Verdict(ok=False, reason=f"the perplexity is {final}", **_DIVERGED)
    parts, ok = [f"perplexity {final:,.3f}"], True
    if (start := perplexities.start) is not None:
        ok = final <= start
        parts.append(f"{'below' if ok else 'ABOVE'} the model before fine-tuning ({start:,.3f})")
    if one_shot is not None:
        ok = final <= one_shot
        parts.append(f"{'below' if ok else 'ABOVE'} the one-shot start ({one_shot:,.3f})")
    problem = {} if ok else _DIVERGED
    if dense is not None:
        parts.append(f"{final / dense:.2f} times the dense model ({dense:,.3f})")
        if ok and final > FAR_FACTOR * dense:
            lowest = min(filter(math.isfinite, earlier), default=math.inf)
            ok, problem = False, _FELL_SHORT if perplexities.trained is None else _DIVERGED
            if final > RISE_FACTOR * lowest:
                parts.append(f"{final / lowest:.2f} times the lowest that it had reached ({lowest:,.3f})")
                problem = _DIVERGED
    return Verdict(ok=ok, reason=", ".join(parts), **problem)
