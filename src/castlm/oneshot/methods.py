"""The one-shot methods of a pattern, what they read, and the steps that they are made of.

A method is a row of `castlm.oneshot.solvers.SOLVERS`, which says whether it reads a text, needs one, and which
refinements apply to it; everybody asks here. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.core.errors import InputError, check_type
from castlm.core.nm import NM, Pattern, parse_pattern
from castlm.fields import Joined, unmet, without_effect
from castlm.oneshot.options import EFFORTS, NO_BASIS, NO_REFINEMENTS, BasisOptions, Refinements
from castlm.oneshot.solvers import SOLVERS, Solver
from castlm.say import Progress, Say, silent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from castlm.core.sparsify import FilterFn
    from castlm.data.calibration import Extras
    from castlm.facts import Basis
    from castlm.oneshot.report import OneshotReport
    from castlm.oneshot.steps.base import Step


def all_methods() -> tuple[str, ...]:
    """The one-shot methods of all patterns."""
    return tuple(SOLVERS)


def methods_of(pattern: Pattern) -> Mapping[str, Solver]:
    """The one-shot methods that prune to a pattern, by name.

    Examples:
        >>> list(methods_of(NM(2, 4)))
        ['magnitude', 'wanda', 'sparsegpt']
    """
    return {name: solver for name, solver in SOLVERS.items() if isinstance(pattern, solver.patterns)}


def default_method(pattern: Pattern) -> str:
    """The one-shot method to start from where no other is asked for. Figures in docs/results decided it."""
    return "sparsegpt" if "sparsegpt" in methods_of(pattern) else "magnitude"


def method_of(name: str, pattern: Pattern) -> Solver:
    """The row of a method; raises `InputError` if it does not prune to the pattern."""
    methods = methods_of(pattern)
    if name not in methods:
        raise InputError(f"{name!r} does not prune to {pattern}: choose one of {', '.join(methods)}")
    return methods[name]


def trained_from(name: str, pattern: Pattern) -> Solver | None:
    """The method that makes the start `init_from NAME` of a training run; None for magnitude and for a model.

    With magnitude, masks are made by the optimizer.
    """
    return None if name == "magnitude" else methods_of(pattern).get(name)


class Reads(NamedTuple):
    """What a start reads, for the conditions of its options in `castlm.oneshot.options`."""

    is_calibrated: bool = False
    """Whether it reads a text."""
    turns_axes: bool = False
    """Whether the basis may change before it."""
    refinements: tuple[str, ...] = ()
    """The options of `Refinements` that it reads."""


def reads_of(method: Solver | None, pattern: Pattern) -> Reads:
    """What the start by a method reads; None reads nothing."""
    if method is None:
        return Reads()
    return Reads(method.reads_text, isinstance(pattern, NM), method.refinements)


def applied(refinements: Refinements, method: str, pattern: Pattern, effort: str = "best") -> Refinements:
    """The refinements that have an effect with a method and a pattern; the others as in `NO_REFINEMENTS`.

    Args:
        effort: the `start_effort` that has set options of these refinements. They need no effect.

    Raises:
        InputError: a method that does not prune to the pattern, or another option that asks for something and has no
            effect.
    """
    reads = reads_of(method_of(method, pattern), pattern)._replace(is_calibrated=True)
    chosen, set_by_effort = Joined(SimpleNamespace(reads=reads), refinements), EFFORTS[effort].options
    asked = {name: value for name, value in asdict(refinements).items() if value != set_by_effort.get(name)}
    for reason in without_effect([Refinements], asked, chosen).values():
        raise InputError(f"{reason} (this is {method} for {pattern}): leave it out")
    unread = [option.name for option in fields(Refinements) if unmet(option, chosen) is not None]
    return replace(refinements, **{name: getattr(NO_REFINEMENTS, name) for name in unread})


def steps_of(
    method: str,
    pattern: Pattern,
    basis: BasisOptions = NO_BASIS,
    refinements: Refinements = NO_REFINEMENTS,
    effort: str = "published",
) -> list[Step]:
    """The steps that prune a model by a method, for `run_start`; by default as published.

    Args:
        effort: the `start_effort`, a row of `EFFORTS`. Its options are in `basis` and `refinements` already.

    Raises:
        InputError: as `applied`, or a rotation that does not apply.
    """
    from castlm.oneshot.basis import ChangeBasis
    from castlm.oneshot.steps.reconstruct import Reconstruct
    from castlm.oneshot.steps.solve import Solve

    refinements = applied(refinements, method, pattern, effort)
    steps: list[Step] = []
    reads_text = SOLVERS[method].reads_text
    if isinstance(pattern, NM) and reads_text and not basis.is_off:
        steps.append(ChangeBasis(pattern, basis, EFFORTS[effort]))
    elif basis.rotate not in ("auto", "off"):
        why = (
            f"needs a calibration text, and {method} reads none" if not reads_text else f"is for n:m, not for {pattern}"
        )
        raise InputError(f"rotate {basis.rotate} {why}: use rotate auto")
    steps.append(Solve(method, pattern, refinements, EFFORTS[effort].is_staged))
    if refinements.reconstruct_epochs:
        steps.append(Reconstruct(refinements.reconstruct_epochs))
    return steps


def prune_oneshot_(
    model: PreTrainedModel,
    method: str,
    *,
    pattern: Pattern | str = "2:4",
    calibration: Tensor | None = None,
    extras: Extras = None,
    basis: BasisOptions = NO_BASIS,
    refinements: Refinements = NO_REFINEMENTS,
    effort: str = "published",
    filter_fn: FilterFn | None = None,
    precision: str = "fp32",
    say: Say = silent,
    progress: Progress = silent,
) -> OneshotReport:
    """Prunes a model to a pattern in place, without training; by default with the method as published.

    The weights keep their dtype.

    Args:
        pattern: a `Pattern` or its text.
        method: "magnitude", "wanda" or "sparsegpt", see `SOLVERS`.
        calibration: int64, (num_sequences, seq_len), as from `draw_calibration`. A method that reads no text uses only
            its first 256 tokens, to measure reconstruction errors.
        extras: for each sequence, the further arguments of the model's forward, such as images.
        basis: changes of basis before the prune; off by default.
        refinements: beyond the method as published; off by default, see `applied`.
        effort: "published", "quick" or "best", as the option `start_effort`; it sets none of `basis` and `refinements`.
        filter_fn: chooses the layers to prune, as for `sparse_linears`.
        precision: see `castlm.data.calibration.CalibrationText`.
        say: as for `castlm.oneshot.run.run_start`.
        progress: as for `castlm.oneshot.run.run_start`.

    Raises:
        InputError: as `steps_of` and `run_start`. Blocks before the one that the message names are pruned already.

    Reference: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> report = prune_oneshot_(model, "sparsegpt", calibration=tokens)  # doctest: +SKIP
    """
    check_type(basis, BasisOptions, "basis must be BasisOptions", "leave it out for none")
    check_type(refinements, Refinements, "refinements must be Refinements", "leave it out for none")
    pattern = parse_pattern(pattern)
    if effort not in EFFORTS:
        raise InputError(f"effort {effort!r} is unknown: use one of {', '.join(EFFORTS)}")
    steps = steps_of(method, pattern, basis, refinements, effort)
    text = None if calibration is None else (calibration, extras, precision)
    return _run(model, steps, pattern, text, filter_fn, say, progress)


def change_basis_(
    model: PreTrainedModel,
    calibration: Tensor,
    basis: BasisOptions | None = None,
    *,
    pattern: Pattern | str = "2:4",
    extras: Extras = None,
    filter_fn: FilterFn | None = None,
    precision: str = "fp32",
    say: Say = silent,
    progress: Progress = silent,
) -> Basis:
    """Changes the basis of a dense model in place, without pruning it.

    Args:
        basis: the changes; None for the defaults of `BasisOptions`.
        pattern: the pattern to which the layers will be pruned.
        filter_fn: chooses the layers that will be pruned: only their errors count.
        say: called with a line about each change that was made, omitted or undone.

    The other arguments are as for `prune_oneshot_`.

    Raises:
        InputError: a family that does not allow the changes; "auto" keeps the basis instead, and reports it.

    Examples:
        >>> tokens = draw_calibration(token_ids, seq_len=calibration_length(model), seed=0)  # doctest: +SKIP
        >>> change_basis_(model, tokens, say=print)  # doctest: +SKIP
    """
    from castlm.oneshot.basis import ChangeBasis

    pattern = parse_pattern(pattern)
    if not isinstance(pattern, NM):
        raise InputError(f"a change of basis is for n:m patterns, not for {pattern}: use 2:4")
    steps: list[Step] = [ChangeBasis(pattern, basis or BasisOptions(), EFFORTS["best"])]
    return _run(model, steps, pattern, (calibration, extras, precision), filter_fn, say, progress).basis


def _run(
    model: PreTrainedModel,
    steps: list[Step],
    pattern: Pattern,
    text: tuple[Any, ...] | None,
    filter_fn: FilterFn | None,
    say: Say,
    progress: Progress,
) -> OneshotReport:
    """Takes steps in a model in memory."""
    from castlm.core.sparsify import is_sparse_linear, scope_of
    from castlm.data.calibration import CalibrationText
    from castlm.models.architecture import check_of_transformers
    from castlm.oneshot.run import run_start
    from castlm.oneshot.source import MemoryModel

    check_of_transformers(model)
    scope = scope_of(model, pattern, filter_fn or is_sparse_linear)
    read = None if text is None else CalibrationText(*text)
    if read is not None:
        read.check(len(model.get_input_embeddings().get_parameter("weight")))
    report = run_start(MemoryModel(model, scope.layers, scope.pattern), steps, read, say=say, progress=progress)
    report.left_dense = scope.left_dense
    return report
