"""The options of a start: which axes of the dense model are turned, and what is done beyond SparseGPT.

Commands and configs inherit them. Importing this module does not import torch, so that `--help` is instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.fields import Bound, Bounded

T = TypeVar("T")


def part_of(options: Any, section: type[T]) -> T:
    """The fields of the dataclass `section` out of `options`, which have more."""
    return section(**{option.name: getattr(options, option.name) for option in fields(section)})  # type: ignore[arg-type]


def check_damping(damping: float) -> None:
    """Raises `InputError` where `damping`, a share of the mean of a Hessian's diagonal, is out of range."""
    if not 0 <= damping <= 1:
        raise InputError(f"damping = {damping} is out of range: it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BasisOptions(Bounded):
    """Which axes of the dense model are turned before it is pruned; its function stays as it is."""

    rotate: Literal["auto", "off", "values", "residual"] = "auto"
    """Rotations before wanda or sparsegpt. values: the values of each attention head. residual: the residual stream as
    well, which folds the norms' gains, unties tied embeddings, and reads the text once more. auto: values where the
    model's family is known."""

    permute: bool = True
    """Permute the MLP neurons before the prune, and the values of attention heads if they are not rotated."""

    rotation_iterations: int = 100
    """Steps in which each rotation is learned."""

    def out_of_range(self) -> Iterator[Bound]:
        yield "rotation_iterations", self.rotation_iterations >= 1, "at least 1"

    @property
    def rotates_values(self) -> bool:
        return self.rotate != "off"

    @property
    def is_off(self) -> bool:
        return self.rotate == "off" and not self.permute


NO_BASIS = BasisOptions(rotate="off", permute=False)


@dataclass(frozen=True, kw_only=True)
class Refinements(Bounded):
    """What is done beyond SparseGPT as published."""

    staged_statistics: bool = True
    """Take the statistics of a layer after the layers before it in its transformer block are pruned, as
    --true-sequential of SparseGPT's published code does. Each input of a transformer block has a pass over the text,
    which ends there."""

    mask_iterations: int = 16
    """ADMM iterations that choose better masks than SparseGPT, which decides from left to right. Each costs as much as
    two of refit_iterations, and all of them an eigendecomposition of each layer's statistics. 0 keeps SparseGPT's."""

    refit_iterations: int | None = None
    """Conjugate gradient steps on what is kept after SparseGPT or the choice of units, without a pass over the text.
    The default is 20, and 0 after mask_iterations, which leave the kept weights near their optimum."""

    reconstruct_epochs: int = 0
    """Epochs over the calibration text in which each transformer block is trained to give the outputs of the dense
    one. They stop early when the error on held-out sequences rises. An epoch costs what training on that text costs."""

    reconstruct_rate: float = 1e-3
    """Learning rate of the reconstruction."""

    def num_refits(self, pattern: Pattern) -> int:
        """`refit_iterations`, or its default for `pattern`; structured patterns have no `mask_iterations`."""
        if self.refit_iterations is not None:
            return self.refit_iterations
        return 0 if self.mask_iterations and pattern.cut_out is None else 20

    def for_solver(self, solver: str, pattern: Pattern) -> Refinements:
        """These for "sparsegpt", and none for a solver that has nothing to refine.

        Raises:
            InputError: another solver, and an option that is neither at its default nor off; or `reconstruct_rate`
                without `reconstruct_epochs`. Structured patterns have `refit_iterations` with every solver.
        """
        asked = [
            option.name
            for option in fields(self)
            if getattr(self, option.name) not in (option.default, getattr(NO_REFINEMENTS, option.name))
        ]
        if pattern.cut_out is not None:
            if others := [name for name in asked if name != "refit_iterations"]:
                raise InputError(
                    f"{others[0]} does nothing with {pattern}, which has refit_iterations alone: leave it out"
                )
            return replace(NO_REFINEMENTS, refit_iterations=self.refit_iterations)
        if solver == "sparsegpt":
            if "reconstruct_rate" in asked and not self.reconstruct_epochs:
                raise InputError("reconstruct_rate does nothing without reconstruct_epochs: leave it out or set both")
            return self
        if asked:
            raise InputError(f"{asked[0]} does nothing with {solver}: leave it out or use sparsegpt")
        return NO_REFINEMENTS

    def out_of_range(self) -> Iterator[Bound]:
        yield "mask_iterations", 0 <= self.mask_iterations <= 10_000, "between 0 and 10,000"
        yield "refit_iterations", self.refit_iterations is None or self.refit_iterations >= 0, "at least 0"
        yield "reconstruct_epochs", self.reconstruct_epochs >= 0, "at least 0"
        yield "reconstruct_rate", self.reconstruct_rate > 0, "above 0"


NO_REFINEMENTS = Refinements(staged_statistics=False, mask_iterations=0, refit_iterations=0)
"""SparseGPT as published."""
