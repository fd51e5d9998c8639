"""The table of training methods. Classes are imported on demand, so that the names are known without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from castlm.methods.base import Retraining


class Method(NamedTuple):
    """A row of `METHODS`."""

    module: str
    """Module in `castlm.methods`."""
    class_name: str
    title: str
    """What the method is, in a few words, for reports."""
    options: tuple[str, ...] = ()
    """Fields of `TrainConfig` that this method reads and others may not."""
    starts_dense: bool = False
    """Whether the method has no start other than the dense model."""
    published_start: str = "magnitude"
    """The start of the paper that the method comes from."""
    starts_solved: bool = False
    """Whether `castlm train` starts it from a one-shot solver where `init_from` is not given."""

    def load(self) -> type[Retraining]:
        """Imports the class of the method."""
        found: type[Retraining] = getattr(importlib.import_module(f"castlm.methods.{self.module}"), self.class_name)
        return found


METHODS: dict[str, Method] = {
    "cast": Method(
        "cast",
        "Cast",
        "CAST: dense forward pass, AdamS decays the masked weights (arXiv 2509.25996)",
        ("decay", "decay_end", "lam", "mask_interval", "scale_groups", "second_moment"),
        starts_solved=True,
    ),
    "finetune": Method(
        "finetune",
        "Finetune",
        "fine-tuning with a fixed mask, masked weights at zero (as in arXiv 2310.06927)",
        ("adapter", "lora_r"),
        published_start="sparsegpt",
        starts_solved=True,
    ),
    "ste": Method("ste", "STE", "straight-through estimator, a new mask at every step (arXiv 1308.3432)"),
    "srste": Method("ste", "SRSTE", "STE with a decay of the masked weights (arXiv 2102.04010)", ("srste_lam",)),
    "ast": Method("ast", "AST", "SR-STE with an annealed decay (arXiv 2407.20584)", ("srste_lam", "mask_interval")),
    "gradual_magnitude": Method(
        "gradual",
        "GradualMagnitude",
        "gradual magnitude pruning, group by group (arXiv 1710.01878)",
        ("mask_interval",),
        starts_dense=True,
    ),
    "dense": Method("dense", "Dense", "the dense control: the same training without sparsity", starts_dense=True),
}


def class_of(method: str, adapter: str) -> type[Retraining]:
    """The class that trains with `method` of `METHODS`: the whole model, or an adapter of it."""
    if adapter == "none":
        return METHODS[method].load()
    return Method("finetune_adapter", "FinetuneAdapter", "").load()
