"""One AdamS update of several parameters: by the C++ kernels, through `torch.compile`, or by torch operators.

The optimizer decides what is updated with which numbers; this module gathers the tensors of the parameters and runs the
update on them, in few calls where a call is costly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from castlm.core import native
from castlm.core.masks import bits_of_a_word, compiled, unpack_mask
from castlm.core.moments import MOMENT_KEYS
from castlm.core.shards import flat, local
from castlm.core.update import Columns, update_, update_words_

State = Mapping[Tensor, Mapping[str, Tensor]]

_SMALL = 65_536  # dense tensors with fewer weights are updated together
_CALL = 8  # tensors of one size that one call of the compiled update takes


class Update(NamedTuple):
    """An update of parameters that have the same dtype and device and are at the same step."""

    state: State
    sparse: bool
    in_8bit: bool
    hyper: Sequence[float]  # of `castlm.core.update.hyperparameters`
    second_moment: str
    fused: bool | None  # as in `AdamS`

    def apply_(self, params: Sequence[Tensor]) -> None:
        """Updates `params`, each with at least one weight on this rank, and their moments in place."""
        if self.fused is not False and all(native.runs_on(local(p)) for p in params):
            masks = [local(self.state[p]["mask"]) if self.sparse else None for p in params]
            weights = [local(p).detach() for p in params]
            native.update_(weights, *self._held(params), masks, self.hyper, self.second_moment)
            return
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        hyper = torch.tensor(self.hyper, dtype=dtype, device=params[0].device)
        (self._sparse_ if self.sparse else self._dense_)(params, self.in_8bit, hyper, self.second_moment)

    def _held(self, params: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """This rank's gradients in the dtype of the parameters, and its moments and their scales by name."""
        grads = [local(p.grad).to(p.dtype).contiguous() for p in params if p.grad is not None]
        keys = [key for key in MOMENT_KEYS if key in self.state[params[0]]]
        return grads, {key: [local(self.state[p][key]) for p in params] for key in keys}

    def _columns(self, params: Sequence[Tensor]) -> Columns:
        """This rank's weights, gradients and moments, and the scales of 8-bit moments."""
        grads, moments = self._held(params)
        columns = [list(params), grads, *moments.values()]
        scales = [key.endswith("_scale") for key in ("", "", *moments)]
        if not any(scales):
            return [[flat(tensor) for tensor in column] for column in columns]
        shapes = [(local(self.state[p]["exp_avg_scale"]).numel(), -1) for p in params]
        return [
            [flat(tensor) if is_scale else flat(tensor).view(shape) for tensor, shape in zip(column, shapes)]
            for column, is_scale in zip(columns, scales)
        ]

    def _sparse_(self, params: Sequence[Tensor], *rest: Any) -> None:
        for some in self._calls(params):
            columns = self._columns(some)
            packed = [local(self.state[p]["mask"]) for p in some]
            if self.fused and all(p.shape[-1] % 8 == 0 and local(p).numel() % 32 == 0 for p in some):
                words = [flat(flat(mask).view(torch.int32)) for mask in packed]
                self._run(update_words_, columns, words, bits_of_a_word(words[0].device), *rest)
            else:
                masks = [flat(unpack_mask(mask, p.shape[-1])) for mask, p in zip(packed, some)]
                self._run(update_, columns, masks, *rest)

    def _dense_(self, params: Sequence[Tensor], *rest: Any) -> None:
        together = [p for p in params if local(p).numel() < _SMALL and not self.in_8bit]
        for some in self._calls([p for p in params if self.in_8bit or local(p).numel() >= _SMALL]):
            self._run(update_, self._columns(some), [None] * len(some), *rest)
        if together:
            columns = self._columns(together)
            whole = [torch.cat(column) for column in columns]
            self._run(update_, [[tensor] for tensor in whole], [None], *rest)
            sizes = [weight.numel() for weight in columns[0]]
            for i in (0, 2, 3):
                torch._foreach_copy_(columns[i], torch.split(whole[i], sizes))

    def _calls(self, params: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
        """The parameters of each call of `_run`: one where several would hold their new moments at the same time."""
        return _by_size(params) if self.fused and not self.in_8bit else ([param] for param in params)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return (compiled(function) if self.fused else function)(*args)


def _by_size(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """`params` in lists of `_CALL` of one size, and the rest one by one.

    Two compilations then serve all sizes, and the cost of calling a compiled function, which equals that of updating
    100,000 weights, is paid once for eight.
    """
    by_size: dict[int, list[Tensor]] = {}
    for param in params:
        by_size.setdefault(local(param).numel(), []).append(param)
    for same in by_size.values():
        whole = len(same) // _CALL * _CALL
        yield from (same[i : i + _CALL] for i in range(0, whole, _CALL))
        yield from ([param] for param in same[whole:])
