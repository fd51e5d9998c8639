"""The AdamS step: its equations as one pure function on plain tensors, and the update of many parameters in place.

The same equations are in `tests/reference.py`, weight by weight in Python, and in `kernels.cpp`, for CPUs. The
optimizer in `adams.py` knows groups, state and ranks, and passes plain tensors and numbers to this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from castlm.core import native
from castlm.core.decay import DECAYS, decay_alpha
from castlm.core.moments import from_codes, to_codes_
from castlm.core.native import Batch
from castlm.core.nm import bits_of_a_word, compiled, unpack_mask, unpack_words
from castlm.core.shards import flat

SECOND_MOMENTS = ("gradient", "mix")

_SMALL = 65_536  # dense tensors with fewer weights are updated together, as one tensor
_CALL = 8  # tensors of one size in a call of the compiled update, which costs as much as 100,000 weights

Row = list[Tensor]
"""Weight, gradient, first and second moment of one parameter, each (numel,). With 8-bit moments each is
(blocks, block), and each moment is followed by its scales (blocks,)."""


def adams_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    hyper: Tensor,
    second_moment: str = "mix",
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamS step on tensors of one shape and dtype; plain Adam without `mask`.

    CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8, with our `"horizon"` decay and `"gradient"` second moment.

    Args:
        mask: bool, True = kept.
        hyper: (7,), `hyperparameters` as float32, or as float64 for float64 weights. It is a tensor, so that one
            compilation serves every step.

    Returns:
        The new `weight`, the new `exp_avg` (always of the raw gradient) and the new `exp_avg_sq` (of the mix, also
        where weights are kept; of the raw gradient if `mask` is None or `second_moment` is `"gradient"`).
    """
    rate, eps, one_less_beta1, one_less_beta2, pull, keep, remaining = hyper.unbind()
    # Alg. 1: mu_t = b1 mu_{t-1} + (1 - b1) g_t. The decay never enters it.
    exp_avg = exp_avg + (grad - exp_avg) * one_less_beta1
    # Eq. 7: mix_t = mu_t where kept, (1 - a_t) mu_t + a_t lam sign(W_{t-1}) where masked; sign(0) = 0. (1536, 576)
    mix = exp_avg if mask is None else torch.where(mask, exp_avg, exp_avg * keep + pull * weight.sign())
    # Eq. 8: v_t = b2 v_{t-1} + (1 - b2) mix_t^2; ours squares g_t, so that lr has the same meaning as in Adam.
    squared = grad if mask is None or second_moment == "gradient" else mix
    exp_avg_sq = exp_avg_sq + (squared.square() - exp_avg_sq) * one_less_beta2
    # Alg. 1: W_t = W_{t-1} - lr (mix_t / (1 - b1^(t+1))) / (sqrt(v_t / (1 - b2^(t+1))) + eps), see `hyperparameters`.
    weight = weight - rate * mix / (exp_avg_sq.sqrt() + eps)
    # "horizon": W_t (1 - a_{t+1}) / (1 - a_t) where masked, which is exactly 0 once a_{t+1} = 1.
    return (weight if mask is None else torch.where(mask, weight, weight * remaining)), exp_avg, exp_avg_sq


def hyperparameters(group: Mapping[str, Any], step: int) -> list[float]:
    """The seven numbers of a parameter group for `adams_update` at the 0-based `step = t`.

    In this order, with r the square root of `1 - beta2^(t+1)`: the rate `lr r / (1 - beta1^(t+1))`; `eps r`;
    `1 - beta1`; `1 - beta2`; and `pull`, `keep` and `remaining` of the decay rule (`castlm.core.decay.Decay`). Both
    bias corrections are in the rate and eps: sqrt(v / r^2) + eps = (sqrt(v) + eps r) / r.
    """
    beta1, beta2 = group["betas"]
    decay = DECAYS[group["decay"]]
    alpha, alpha_next = (
        decay_alpha(s, group["total_steps"], group["decay"], group["decay_end"]) for s in (step, step + 1)
    )
    root = (1 - beta2 ** (step + 1)) ** 0.5
    rate = float(group["lr"]) * root / (1 - beta1 ** (step + 1))
    masked = [decay.pull(alpha, group["lam"]), decay.keep(alpha), decay.remaining(alpha, alpha_next)]
    return [rate, group["eps"] * root, 1 - beta1, 1 - beta2, *masked]


def update_(batch: Batch, hyper: Sequence[float], second_moment: str, fused: bool | None) -> None:
    """`adams_update` of several parameters, in place: by the C++ kernels if they take them, or by torch.

    Args:
        hyper: of `hyperparameters`.
        fused: as in `castlm.core.adams.AdamS`.
    """
    if fused is not False and all(map(native.runs_on, batch.weights)):
        native.update_(batch, hyper, second_moment)
    else:
        _update_by_torch_(batch, hyper, second_moment, compile=bool(fused))


def _update_by_torch_(batch: Batch, hyper: Sequence[float], second_moment: str, *, compile: bool) -> None:
    """`update_` on any device, by `torch.compile` or by torch operators.

    One call of an operator or a compiled function costs as much as an update of many weights, so a call takes as many
    parameters as it can: all small dense ones as one tensor, and compiled, eight of one size.
    """
    weights, grads, moments, masks = batch
    in_8bit = batch.in_8bit
    # By parameter: weight, gradient and moments, each (numel,): a view, so that the update writes into the parameter.
    rows = [list(map(flat, row)) for row in zip(weights, grads, *moments.values(), strict=True)]
    if in_8bit:
        rows = [_in_blocks(row) for row in rows]
    update_rows = compiled(update_rows_) if compile else update_rows_
    device, wide = weights[0].device, torch.promote_types(weights[0].dtype, torch.float32)
    # A tensor of seven numbers and not seven floats: torch.compile would compile again for each new float.
    settings: Any = in_8bit, torch.tensor(hyper, dtype=wide, device=device), second_moment

    # The 61 norms of SmolLM2-135M, (576,) each, are one tensor of 35,136 numbers: one call in place of 61.
    can_join = masks[0] is None and not in_8bit  # blocks of codes may differ in size
    small: list[int] = []
    large: list[int] = []
    for i, weight in enumerate(weights):
        (small if can_join and weight.numel() < _SMALL else large).append(i)
    if small:
        weight, grad, exp_avg, exp_avg_sq = (torch.cat(column) for column in zip(*(rows[i] for i in small)))
        update_rows([[weight, grad, exp_avg, exp_avg_sq]], [None], *settings)
        sizes = [weights[i].numel() for i in small]
        for k, new in ((0, weight), (2, exp_avg), (3, exp_avg_sq)):
            torch._foreach_copy_([rows[i][k] for i in small], torch.split(new, sizes))

    # Operators gain nothing from several parameters, and in 8 bits these would only hold more new moments at a time.
    most = _CALL if compile and not in_8bit else 1
    for some in _of_one_size(large, weights, most):
        packed = [(weights[i], mask) for i in some if (mask := masks[i]) is not None]
        # A packed mask can be read by words of 32 bits if it consists of whole ones: each row ends with a byte.
        fills_words = all(weight.shape[-1] % 8 == 0 and weight.numel() % 32 == 0 for weight, _ in packed)
        if compile and packed and fills_words:
            words = [mask.view(-1).view(torch.int32).detach() for _, mask in packed]  # (1536, 72) uint8 -> (27648,)
            compiled(update_rows_by_words_)([rows[i] for i in some], words, bits_of_a_word(device), *settings)
        else:
            unpacked = [unpack_mask(mask, weight.shape[-1]).view(-1) for weight, mask in packed]
            update_rows([rows[i] for i in some], unpacked or [None] * len(some), *settings)


def _in_blocks(row: Row) -> Row:
    """A row with 8-bit moments whose other tensors are (blocks, block), as `castlm.core.moments` reads them."""
    weight, grad, codes, scale, codes_sq, scale_sq = row
    shape = (len(scale), -1)
    return [weight.view(shape), grad.view(shape), codes.view(shape), scale, codes_sq.view(shape), scale_sq]


def update_rows_(
    rows: Sequence[Row], masks: Sequence[Tensor | None], in_8bit: bool, hyper: Tensor, second_moment: str
) -> None:
    """`adams_update` of several parameters, in place. Masks are bool, (numel,)."""
    for (weight, grad, *moments), mask in zip(rows, masks):
        if in_8bit:
            codes, scale, codes_sq, scale_sq = moments
            exp_avg = from_codes(codes, scale, signed=True)
            exp_avg_sq = from_codes(codes_sq, scale_sq, signed=False)
        else:
            exp_avg, exp_avg_sq = moments
        mask = None if mask is None else mask.view(weight.shape)
        new_weight, new_avg, new_avg_sq = adams_update(weight, grad, exp_avg, exp_avg_sq, mask, hyper, second_moment)
        weight.copy_(new_weight)
        if in_8bit:
            to_codes_(new_avg, codes, scale, signed=True)
            to_codes_(new_avg_sq, codes_sq, scale_sq, signed=False)
        else:
            exp_avg.copy_(new_avg)
            exp_avg_sq.copy_(new_avg_sq)


def update_rows_by_words_(rows: Sequence[Row], packed: Sequence[Tensor], bits: Tensor, *settings: Any) -> None:
    """`update_rows_` with packed masks viewed as words of 32 weights, see `unpack_words`; for `torch.compile`."""
    update_rows_(rows, [unpack_words(words, bits) for words in packed], *settings)


def _of_one_size(positions: Sequence[int], weights: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """`positions` in lists of `most` of one size, and the rest one by one, so that two compilations serve all sizes."""
    by_size: dict[int, list[int]] = {}
    for i in positions:
        by_size.setdefault(weights[i].numel(), []).append(i)
    for same in by_size.values():
        num_together = len(same) // most * most
        for first in range(0, num_together, most):
            yield same[first : first + most]
        for i in same[num_together:]:
            yield [i]
