"""A step inside the backward pass, so that the gradients of one transformer block are there at a time.

AdamS updates each parameter by itself, so a block can be stepped as soon as the backward pass has left it. A clipped
step needs the norm of all gradients before that: it runs forward and backward twice, first to measure each gradient and
drop it. The numbers are those of a step after the backward pass, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from castlm.core.blocks import block_name
from castlm.distributed.gradients import NormInParts, clip_
from castlm.methods.base import Retraining


class StepInBackward:
    """Measures or steps the parameters of a run while the backward pass goes through them, block by block.

    Args:
        method: with its optimizer. Its own hooks on gradients run before the ones that this class adds.
        names: all parameters of the run with their names.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
    """

    def __init__(self, method: Retraining, names: Mapping[Tensor, str], max_grad_norm: float) -> None:
        self._method, self._max_norm = method, max_grad_norm
        self._parts: dict[str, list[Tensor]] = {}
        self._waiting: dict[str, set[Tensor]] = {}
        self._at_gradient: Callable[[Tensor], None] | None = None
        self._trained = {parameter: name for parameter, name in names.items() if parameter.requires_grad}
        self._norm = NormInParts(self._trained)
        self._part_of = {p: block_name(name) or name for p, name in self._trained.items()}
        for parameter, part in self._part_of.items():
            self._parts.setdefault(part, []).append(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrived)
        # The blocks in the order of a backward pass, from the last one. Embeddings and head may be as large as several
        # blocks, so their moments are not fetched before their turn.
        blocks = [part for part, parameters in reversed(self._parts.items()) if len(parameters) > 1]
        self._next = dict(itertools.pairwise(blocks))

    @property
    def clips(self) -> bool:
        """Whether a step needs a pass that measures."""
        return self._max_norm > 0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside the context, a backward pass measures each gradient and drops it; see `norm`."""
        self._norm.clear()
        with self._at(self._measure):
            yield

    @contextlib.contextmanager
    def stepping(self, step: int, norm: Tensor | None) -> Iterator[None]:
        """Inside the context, one backward pass updates every parameter; `AdamS.begin_step` was called before.

        Args:
            step: the 0-based step.
            norm: the norm of all gradients, by which they are clipped; None measures it and clips nothing.

        Raises:
            InputError: a sparse parameter has no gradient; all others are updated by then.
        """
        if norm is None:
            self._norm.clear()
        self._waiting = {part: set(parameters) for part, parameters in self._parts.items()}

        def collect(parameter: Tensor) -> None:
            if norm is None:
                self._norm.add(parameter)
            part = self._part_of[parameter]
            self._waiting[part].discard(parameter)
            if not self._waiting[part]:
                self._update(part, step, norm)

        with self._at(collect):
            yield
        for part in [part for part, waiting in self._waiting.items() if waiting]:  # parameters that no pass reaches
            self._update(part, step, norm)
        self._method.optimizer.wait_for_moments()

    def norm(self) -> Tensor:
        """The norm of the gradients that were measured in the last pass, ()."""
        return self._norm.norm()

    @contextlib.contextmanager
    def _at(self, action: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside the context, `action` is called with each parameter whose gradient is whole."""
        self._at_gradient = action
        try:
            yield
        finally:
            self._at_gradient = None

    def _arrived(self, parameter: Tensor) -> None:
        if self._at_gradient is not None:
            self._at_gradient(parameter)

    def _measure(self, parameter: Tensor) -> None:
        self._norm.add(parameter)
        parameter.grad = None

    def _update(self, part: str, step: int, norm: Tensor | None) -> None:
        """Clips the gradients of a part, updates its parameters and drops the gradients."""
        parameters = self._parts[part]
        if norm is not None:
            clip_(parameters, self._max_norm, norm)
        self._method.before_update(step, parameters)
        self._method.optimizer.update(parameters)
        for parameter in parameters:
            parameter.grad = None
        self._method.optimizer.fetch_moments(self._parts.get(self._next.get(part, ""), ()))
