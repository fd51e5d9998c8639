"""Keeps the zeros of a sparse model at zero while any optimizer trains it.

An optimizer that updates each weight by its own gradient leaves a zero weight alone if its gradient has always been
zero: its moments are zero then, and weight decay does nothing. So gradients are masked as they are accumulated. Two
things can still move a masked weight. 8-bit moments may have a code for zero that is not zero (bitsandbytes on a CPU):
they are corrected after each step. An optimizer may mix weights: counting the zeros after each step finds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from castlm.core.errors import InputError
from castlm.core.nm import pack_mask, unpack_mask
from castlm.core.shards import check_matrix, local, sum_over_shards
from castlm.core.sparsify import SparseLayer, weight_parameter


@dataclass(frozen=True)
class _Weight:
    """A weight under guard. It does not hold its layer, so that a model can be freed."""

    parameter: Tensor
    layer: weakref.ref[SparseLayer]
    packed: Tensor
    """This rank's part of the mask in bits: (..., rows, ceil(in / 8)) uint8, 1 = kept."""

    def masked(self) -> Tensor:
        """(..., rows, in) bool, True where the weight is masked."""
        rows = local(self.parameter)
        return ~unpack_mask(self.packed.to(rows.device), rows.shape[-1])

    def mask_gradient_(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        gradient.masked_fill_(self.masked().to(gradient.device), 0.0)  # not a product: NaN * 0 is NaN, 0 * -1 is -0


class KeptPattern:
    """The guard over the zeros of some layers; `castlm.keep_pattern_` makes it. It lives as long as the layers.

    The weights that are zero when it is made are masked from then on, and all others are kept. The gradient of a masked
    weight is set to zero as soon as it is accumulated, so that clipping by norm, momentum and second moments see the
    gradient of the kept weights alone. After each step of an optimizer that holds one of the weights, masked weights
    that are not zero are counted.

    Works for plain tensors, under DDP, and for DTensors as FSDP2 makes them, if it is made after `fully_shard`.

    Args:
        layers: the layers by the name that errors give them. Their weights are (..., out, in).

    Raises:
        InputError: a flat weight, as FSDP1 and DeepSpeed ZeRO leave it.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self.weights: dict[str, _Weight] = {}
        self._num_steps = 0
        self.num_checks = 0
        """The number of times that the zeros have been counted."""
        for name, layer in layers.items():
            parameter = weight_parameter(layer)
            check_matrix(f"the weight of {name}", parameter)
            # One bit a weight: the masks of an 8B model are 1 GB, as bools they would be 8.
            packed = pack_mask(local(parameter).detach() != 0)
            self.weights[name] = _Weight(parameter, weakref.ref(layer), packed)
        hooks = ExitStack()
        for layer, weight in zip(layers.values(), self.weights.values()):
            _GUARDS.setdefault(layer, []).append(self)
            if weight.parameter.requires_grad:
                hook = weight.parameter.register_post_accumulate_grad_hook(weight.mask_gradient_)
                hooks.callback(hook.remove)
        this = weakref.ref(self)  # the hook below, which torch keeps, must not keep the guard alive

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (guard := this()) is not None:
                guard._check_step(optimizer)

        hooks.callback(register_optimizer_step_post_hook(after_step).remove)
        self._end = weakref.finalize(self, hooks.close)

    def masks(self) -> dict[str, Tensor]:
        """The mask of each weight by name: (rows of this rank, in), bool, True = kept."""
        return {name: ~weight.masked() for name, weight in self.weights.items()}

    @torch.no_grad()
    def check(self, after: str = "") -> None:
        """Raises `InputError` if masked weights are not zero on any rank. Under FSDP2 all ranks call it.

        Args:
            after: what has just happened, for the message: "step 3 of AdamW".
        """
        self.num_checks += 1
        values = self.weights.values()
        violating = [(local(weight.parameter) != 0).logical_and_(weight.masked()).sum() for weight in values]
        # All counts in one collective; each rank then raises or none does.
        counts = sum_over_shards([weight.parameter for weight in values], violating)
        broken = [f"{count:,} masked weights of {name}" for name, count in zip(self.weights, counts) if count]
        if broken:
            more = f" (and of {len(broken) - 1} more tensors)" if len(broken) > 1 else ""
            raise InputError(
                f"{f'after {after}, ' if after else ''}{broken[0]}{more} are not zero any more: the pattern is broken "
                "by an optimizer that mixes weights (Muon, Shampoo), moments from before keep_pattern_, or a merged "
                "adapter"
            )

    def remove(self) -> None:
        """Ends the guard: takes all hooks off."""
        for weight in self.weights.values():
            layer = weight.layer()
            if layer is not None and self in _GUARDS.get(layer, []):
                _GUARDS[layer].remove(self)
        self._end()

    @torch.no_grad()
    def _check_step(self, optimizer: Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights.items():
            layer = weight.layer()
            current = weight.parameter if layer is None else weight_parameter(layer)
            if current is not weight.parameter and id(current) in stepped:
                raise InputError(
                    f"the weight of {name} is another tensor than when keep_pattern_ was called: call it after "
                    "fully_shard, and after whatever replaces parameters"
                )
        mine = [weight for weight in self.weights.values() if id(weight.parameter) in stepped]
        for weight in mine:
            # bitsandbytes has 8-bit codes in `state1` and `state2`, (..., out, in) uint8, and what each code stands for
            # in `qmap1` and `qmap2`, (256,).
            state = optimizer.state.get(weight.parameter, {})
            for key, codes in state.items():
                values = state.get(key.replace("state", "qmap"))
                if key.startswith("state") and isinstance(values, Tensor) and codes.dtype == torch.uint8:
                    zero = int(values.abs().argmin())  # the code that stands for zero
                    codes.masked_fill_(weight.masked().to(codes.device), zero)
        if mine:
            self._num_steps += 1
            self.check(f"step {self._num_steps} of {type(optimizer).__name__}")


_GUARDS: weakref.WeakKeyDictionary[nn.Module, list[KeptPattern]] = weakref.WeakKeyDictionary()
"""Keeps a guard alive while any of its layers exists, whether or not the caller holds on to it."""
