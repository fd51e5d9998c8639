"""The options of a start: changes of basis before the prune, and refinements of SparseGPT.

Commands and configs inherit them. Importing this module does not import torch, so that `--help` is instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

from castlm.fields import Bounded, Needs, choice, option

T = TypeVar("T")

# The conditions of the options below. They ask the options for `reads`, a `castlm.oneshot.methods.Reads`.
CALIBRATED = Needs("a solver that reads text, such as sparsegpt", lambda options: options.reads.is_calibrated)
TURNED = Needs(
    "an n:m pattern and a solver that reads text, such as sparsegpt",
    lambda options: options.reads.is_calibrated and options.reads.turns_axes,
)


def _read(name: str, words: str, **more: Any) -> Needs:
    """The condition that the method of a start reads the option `name` of `Refinements`."""
    return Needs(words, lambda options: name in options.reads.refinements, **more)


_DAMPED = "a solver that inverts a Hessian, such as sparsegpt"
_REFINED = "a solver that refinements follow, such as sparsegpt, and an n:m pattern"


def part_of(options: Any, section: type[T]) -> T:
    """The dataclass `section` with its fields taken from `options`, which may have more fields."""
    return section(**{option.name: getattr(options, option.name) for option in fields(section)})  # type: ignore[arg-type]


class Effort(NamedTuple):
    """A row of `EFFORTS`."""

    options: dict[str, Any]
    """The options that it sets; options that are given override them."""
    calibration: float = 1.0
    """The share of the default calibration text that it reads."""
    is_staged: bool = True
    """Whether the statistics of a layer are collected after the layers before it in its transformer block are pruned,
    as --true-sequential of SparseGPT's published code does. This takes one partial pass over the text for each input
    of a block."""
    rotation_iterations: int = 100
    """Optimization steps for each rotation."""
    permute_iterations: int = 6
    """Rounds of the search for a permutation, each with one linear assignment."""


EFFORTS = {
    "best": Effort({}),
    "quick": Effort(
        {"mask_iterations": 0, "refit_iterations": 6, "damping": 0.03},
        calibration=0.25,
        is_staged=False,
        rotation_iterations=20,
        permute_iterations=4,
    ),
    "published": Effort(
        {"rotate": "off", "permute": False, "mask_iterations": 0, "refit_iterations": 0}, is_staged=False
    ),
}
"""The settings of each `start_effort`."""


def with_effort(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, the options that are given, with those that their `start_effort` sets."""
    effort = EFFORTS.get(str(values.get("start_effort")), EFFORTS["best"])
    return {**effort.options, **values}


@dataclass(frozen=True, kw_only=True)
class EffortOptions:
    """The effort of a start, which sets the options of its solver."""

    start_effort: str = choice(
        "best",
        EFFORTS,
        essential=True,
        needs=CALIBRATED,
        help="Effort of the one-shot start. quick takes a fifth of the time, for demonstrations: it reads a "
        "quarter of the calibration text, once for each transformer block, and refits kept weights in place of "
        "ADMM. SmolLM2-135M has 11 to 15 % more perplexity with it after 100 steps. published is the solver as its "
        "authors describe it: no change of basis, no refinements.",
    )


@dataclass(frozen=True, kw_only=True)
class BasisOptions(Bounded):
    """Changes of basis before the dense model is pruned; its function stays the same."""

    rotate: Literal["auto", "off", "values"] = option(
        "auto",
        needs=TURNED._replace(off="off"),
        help="Rotations before wanda or sparsegpt. values: the values of each attention head. auto: values if the "
        "model's family is known.",
    )

    permute: bool = option(
        True,
        needs=TURNED._replace(off=False),
        help="Permute the MLP neurons before the prune, and the values of attention heads if they are not rotated.",
    )

    @property
    def rotates_values(self) -> bool:
        return self.rotate != "off"

    @property
    def is_off(self) -> bool:
        return self.rotate == "off" and not self.permute


NO_BASIS = BasisOptions(rotate="off", permute=False)


@dataclass(frozen=True, kw_only=True)
class Refinements(Bounded):
    """The damping of SparseGPT, and refinements beyond its published form."""

    mask_iterations: int = option(
        16,
        at_least=0,
        at_most=10_000,
        needs=(CALIBRATED, _read("mask_iterations", _REFINED, off=0)),
        help="ADMM iterations that choose better masks than SparseGPT, which decides from left to right. Each "
        "costs two refit iterations, plus one eigendecomposition per layer; on a GPU, one refit iteration and one "
        "inverse. 0 keeps SparseGPT's masks.",
    )

    refit_iterations: int | None = option(
        None,
        at_least=0,
        needs=(
            CALIBRATED,
            _read("refit_iterations", "the solver sparsegpt", off=0),
        ),
        help="Conjugate gradient steps on the kept weights after the prune, without a pass over the text. The "
        "default is 20, and 0 after mask_iterations, which leave the kept weights near their optimum.",
    )

    reconstruct_epochs: int = option(
        0,
        at_least=0,
        needs=(CALIBRATED, _read("reconstruct_epochs", _REFINED)),
        help="Epochs over the calibration text in which each transformer block learns the outputs of the dense "
        "block. They stop early when the error on held-out sequences rises. An epoch costs as much as training on "
        "that text.",
    )

    damping: float = option(
        0.01,
        at_least=0,
        at_most=1,
        needs=(CALIBRATED, _read("damping", _DAMPED)),
        help="Add this fraction of the mean diagonal to the Hessian. The fewer calibration tokens, the more it needs.",
    )

    @property
    def num_refits(self) -> int:
        """`refit_iterations`, or its default: 0 after `mask_iterations`, else 20."""
        if self.refit_iterations is not None:
            return self.refit_iterations
        return 0 if self.mask_iterations else 20


NO_REFINEMENTS = Refinements(mask_iterations=0, refit_iterations=0)
"""SparseGPT as published."""
