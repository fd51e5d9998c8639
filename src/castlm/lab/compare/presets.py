"""The paper's ablations and the comparison of methods over budgets, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from castlm.core.nm import Pattern
from castlm.methods.table import METHODS
from castlm.oneshot.methods import all_methods, methods_of

RETRAINING = tuple(METHODS)
ONESHOT = all_methods()


@dataclass(frozen=True)
class Preset:
    """The variants of a `castlm compare --preset`."""

    question: str
    """The heading of the report."""
    variants: dict[str, dict[str, Any]]
    """Fields of TrainConfig by the name of the variant."""
    budget_shares: tuple[float, ...] = (1.0,)
    """Token budgets to run, as fractions of the given one."""


# Two of the decays may not bring masked weights to zero within the budget; these presets show the effect.
_ANY_BUDGET = {"method": "cast", "ignore_decay_budget": True}
SPARSEGPT = {"init_from": "sparsegpt", "start_effort": "published"}
"""The start of the rivals: SparseGPT as published."""
# The strongest recipe without castlm's own parts.
_PUBLISHED = {**SPARSEGPT, "hidden_weight": 0.0}
# The masks that the paper refreshes.
_MAGNITUDE = {"init_from": "magnitude"}

PRESETS: dict[str, Preset] = {
    "oscillation": Preset(
        "Does the mask settle? SR-STE against CAST",
        {"srste": {"method": "srste", **_MAGNITUDE}, "cast": {"method": "cast", **_MAGNITUDE}},
    ),
    "decay": Preset(
        "Where do masked weights end? Additive, proportional and horizon decay",
        {
            "additive": {**_ANY_BUDGET, **_MAGNITUDE, "decay": "additive", "lam": "auto"},
            "proportional": {**_ANY_BUDGET, **_MAGNITUDE, "decay": "proportional", "lam": "auto"},
            "horizon": {"method": "cast", **_MAGNITUDE, "decay": "horizon"},
        },
    ),
    "parts": Preset(
        "What does each part of CAST contribute?",
        {
            "cast": {"method": "cast"},
            "no scaling": {"method": "cast", "scale_groups": 0},
            "no distillation": {"method": "cast", "eta": 0.0, "hidden_weight": 0.0},
            "no decay": {**_ANY_BUDGET, "decay": "none"},
            "additive decay": {**_ANY_BUDGET, "decay": "additive", "lam": "auto"},
            "proportional decay": {**_ANY_BUDGET, "decay": "proportional", "lam": "auto"},
            "mask interval 1": {"method": "cast", "mask_interval": 1},
            "mask interval 100": {"method": "cast", "mask_interval": 100},
            "mask of Wanda": {"method": "cast", "init_from": "wanda"},
            "mask of SparseGPT": {"method": "cast", **SPARSEGPT},
            "second moment of the mix": {"method": "cast", "second_moment": "mix"},
        },
    ),
    "budgets": Preset(
        "Which method is best at which budget?",
        {
            **{name: {"method": name} for name in ("cast", "ste", "srste", "ast", "gradual_magnitude")},
            **{f"{name} from SparseGPT": {"method": name, **_PUBLISHED} for name in ("cast", "srste", "ast")},
            "fixed mask from SparseGPT": {"method": "finetune", **_PUBLISHED},
        },
        budget_shares=(1 / 8, 1 / 4, 1 / 2, 1.0),
    ),
    "law": Preset(
        "How does the perplexity fall with the tokens?",
        {"cast": {"method": "cast"}},
        budget_shares=(1 / 100, 1 / 50, 1 / 25, 2 / 25, 4 / 25, 8 / 25, 16 / 25, 1.0),
    ),
}


def every_method(pattern: Pattern) -> Preset:
    """The default preset: all one-shot and retraining methods of a pattern."""
    retraining = [name for name in RETRAINING if isinstance(pattern, METHODS[name].patterns)]
    return Preset(
        f"Which way to {pattern} is best?", {name: {"method": name} for name in (*methods_of(pattern), *retraining)}
    )
