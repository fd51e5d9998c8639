"""The verdict on a run: whether training improved on the start. No torch here: reports do without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

FAR_FACTOR = 10.0
"""A result whose perplexity is more than this many times the dense model's is no use, even if it improved."""
RISE_FACTOR = 2.0
"""Such a run diverged if it had no sparse start, and ended at more than this many times its own earlier perplexity."""

_DIVERGED = {"problem": "DIVERGED", "remedy": "lower learning_rate"}
_FELL_SHORT = {"problem": "FELL SHORT", "remedy": "train for more steps"}

MEASURED_ALIKE = ("seq_len", "stride", "text_sha256", "num_tokens", "tokens")
"""What of `record["measured"]` two perplexities have in common if they can be compared."""


def final_perplexity(perplexities: Mapping[str, Any]) -> Any:
    """Of the result of a run, from `record["perplexity"]`: pruned, or the dense control's; None if it has none."""
    return perplexities.get("pruned", perplexities.get("trained"))


def problem(verdict: Mapping[str, Any]) -> str | None:
    """What is wrong with a run, by its `verdict`: "diverged" or "fell short"; None if nothing is."""
    return None if verdict.get("ok", True) else str(verdict.get("problem", "diverged")).lower()


def verdict(perplexities: Mapping[str, float], earlier: Iterable[float] = ()) -> dict[str, Any]:
    """Whether training left the model better than it found it, and why.

    Args:
        perplexities: `record["perplexity"]` of a run: `pruned` (of the dense control `trained`), and `dense` and
            `one_shot` where they were measured; of a fine-tuning run, `start`.
        earlier: of a run that becomes sparse on the way, and has no one-shot start, its perplexities since it is.

    Returns:
        `{"ok": bool, "reason": str}`. `ok` is False when the run diverged (the perplexity is not finite, or above that
        of the one-shot start; of a fine-tuning run, above that of the model before), or is above ten times that of the
        dense model. "problem" and "remedy" then say which, and what helps. Without a start, a run far from the dense
        model diverged if it is the dense control, or above twice the lowest of `earlier`; otherwise it fell short.

    Examples:
        >>> verdict({"dense": 6.0, "one_shot": 14.0, "pruned": 8.0})["reason"]
        'perplexity 8.000, below the one-shot start (14.000), 1.33 times the dense model (6.000)'
        >>> verdict({"dense": 6.0, "one_shot": 14.0, "pruned": 15.0})["ok"]
        False
    """
    found = final_perplexity(perplexities)
    dense, one_shot = perplexities.get("dense"), perplexities.get("one_shot")
    if found is None or not math.isfinite(found):
        return {"ok": False, "reason": f"the perplexity is {found}", **_DIVERGED}
    parts, ok = [f"perplexity {found:,.3f}"], True
    if (start := perplexities.get("start")) is not None:
        ok = found <= start
        parts.append(f"{'below' if ok else 'ABOVE'} the model before fine-tuning ({start:,.3f})")
    if one_shot is not None:
        ok = found <= one_shot
        parts.append(f"{'below' if ok else 'ABOVE'} the one-shot start ({one_shot:,.3f})")
    problem = {} if ok else _DIVERGED
    if dense is not None:
        parts.append(f"{found / dense:.2f} times the dense model ({dense:,.3f})")
        if ok and found > FAR_FACTOR * dense:
            lowest = min(filter(math.isfinite, earlier), default=math.inf)
            ok, problem = False, _DIVERGED if "trained" in perplexities else _FELL_SHORT
            if found > RISE_FACTOR * lowest:
                parts.append(f"{found / lowest:.2f} times the lowest that it had reached ({lowest:,.3f})")
                problem = _DIVERGED
    return {"ok": ok, "reason": ", ".join(parts), **problem}
