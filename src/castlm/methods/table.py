"""The table of training methods: the name in options and tables, and the class, imported when it is asked for."""

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
    starts_dense: bool = False
    """Whether the method has no start other than the dense model."""

    def load(self) -> type[Retraining]:
        """The class of the method."""
        found: type[Retraining] = getattr(importlib.import_module(f"castlm.methods.{self.module}"), self.class_name)
        return found


METHODS: dict[str, Method] = {
    "cast": Method("cast", "Cast"),
    "ste": Method("ste", "STE"),
    "srste": Method("ste", "SRSTE"),
    "ast": Method("ast", "AST"),
    "gradual_magnitude": Method("gradual", "GradualMagnitude", starts_dense=True),
    "dense": Method("dense", "Dense", starts_dense=True),
}
