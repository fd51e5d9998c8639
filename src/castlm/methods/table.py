"""The table of training methods: what is known of each without its class.

Options, their help and their checks read these facts without torch, whose import would make `--help` take 2 seconds of
processor time in place of 0.1. The class of a method (`base.py`) says what it does in a run; no fact is in both places.
`base.class_of` imports the class.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from castlm.core.nm import NM, Pattern

Step0 = Literal["dense", "sparse", "from zero"]
"""The model at step 0. "dense": it computes as the dense model, and masked weights, if there are any, have their dense
values. "sparse": it computes as the pruned model. "from zero": it is the pruned model, whose masked weights are trained
on from zero, so that a refresh may keep them again."""


class Method(NamedTuple):
    """A row of `METHODS`."""

    module: str
    """Full name of the module with the class; your own file is imported by its name, too."""
    class_name: str
    title: str
    """The method in a few words, for reports."""
    options: tuple[str, ...] = ()
    """Options that this method reads and others may not."""
    step0: Step0 = "sparse"
    """The model at step 0. A method with "dense" has no other start. For one with "from zero", start, pattern and decay
    decide; see `MethodOptions.step0`."""
    published_start: str = "magnitude"
    """The start of the paper that the method comes from."""
    starts_solved: bool = False
    """Whether `castlm train` starts it from a one-shot solver where `init_from` is not given."""
    is_sparse: bool = True
    """Whether its result has the pattern."""
    patterns: type[Pattern] = Pattern  # type: ignore[type-abstract]  # of isinstance alone
    """The patterns that it trains to, such as `NM`."""
    keeps_mask: bool = False
    """Whether it keeps the mask of the start, so that it can fine-tune a model that is sparse already."""

    @property
    def decays(self) -> bool:
        """Whether AdamS decays masked weights."""
        return "decay" in self.options


METHODS: dict[str, Method] = {
    "cast": Method(
        "castlm.methods.cast",
        "Cast",
        "CAST: dense forward pass, AdamS decays the masked weights (arXiv 2509.25996)",
        ("decay", "decay_end", "lam", "mask_interval", "scale_groups", "second_moment"),
        step0="from zero",
        starts_solved=True,
    ),
    "finetune": Method(
        "castlm.methods.finetune",
        "Finetune",
        "fine-tuning with a fixed mask, masked weights at zero (as in arXiv 2310.06927)",
        ("adapter", "lora_r"),
        published_start="sparsegpt",
        starts_solved=True,
        keeps_mask=True,
    ),
    "ste": Method(
        "castlm.methods.ste", "STE", "straight-through estimator, a new mask at every step (arXiv 1308.3432)"
    ),
    "srste": Method(
        "castlm.methods.ste", "SRSTE", "STE with a decay of the masked weights (arXiv 2102.04010)", ("lam",)
    ),
    "ast": Method(
        "castlm.methods.ste",
        "AST",
        "SR-STE with an annealed decay: the equation of AST (arXiv 2407.20584) under plain Adam, masks by magnitude; "
        "its authors' optimizer adds the decay after the momentum and takes masks by Wanda's metric",
        ("lam", "mask_interval"),
    ),
    "gradual_magnitude": Method(
        "castlm.methods.gradual",
        "GradualMagnitude",
        "gradual magnitude pruning, group by group (arXiv 1710.01878)",
        ("mask_interval",),
        step0="dense",
        patterns=NM,
    ),
    "dense": Method(
        "castlm.methods.dense",
        "Dense",
        "the dense control: the same training without sparsity",
        step0="dense",
        is_sparse=False,
    ),
}


def is_control(method: object) -> bool:
    """Whether `method` is a dense control: training without sparsity. One-shot methods are not."""
    return method in METHODS and not METHODS[str(method)].is_sparse
