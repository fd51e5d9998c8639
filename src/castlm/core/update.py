"""The arithmetic of an AdamS step on plain tensors: one pure update function, and the loop over stored state.

`tests/reference.py` holds the equations weight by weight, and `kernels.cpp` the same arithmetic for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castlm.core.decay import DECAYS, decay_alpha
from castlm.core.masks import unpack_words
from castlm.core.moments import from_codes, to_codes_

SECOND_MOMENTS = ("gradient", "mix")

# Columns of several parameters: weights, gradients, first moments, second moments, each tensor (numel,). With 8-bit
# moments each tensor is (blocks, block), and each column of moments is followed by one of scales (blocks,).
Columns = list[list[Tensor]]


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
    exp_avg = exp_avg + (grad - exp_avg) * one_less_beta1
    mix = exp_avg if mask is None else torch.where(mask, exp_avg, exp_avg * keep + pull * weight.sign())
    to_square = grad if mask is None or second_moment == "gradient" else mix
    exp_avg_sq = exp_avg_sq + (to_square.square() - exp_avg_sq) * one_less_beta2
    weight = weight - rate * mix / (exp_avg_sq.sqrt() + eps)
    return (weight if mask is None else torch.where(mask, weight, weight * remaining)), exp_avg, exp_avg_sq


def hyperparameters(group: dict[str, Any], step: int) -> list[float]:
    """The seven numbers that `adams_update` needs of a parameter group at the 0-based `step = t`.

    With r the square root of `1 - beta2^(t+1)`, in this order: the rate `lr r / (1 - beta1^(t+1))`; `eps r`;
    `1 - beta1`; `1 - beta2`; and `pull`, `keep` and `remaining` of the decay rule (`castlm.core.decay.Decay`).
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


def update_(columns: Columns, masks: Sequence[Tensor | None], in_8bit: bool, hyper: Tensor, second_moment: str) -> None:
    """`adams_update` of each parameter in `columns`, in place."""
    for weight, grad, *held, mask in zip(*columns, masks):
        mask = None if mask is None else mask.view(weight.shape)
        if in_8bit:
            codes, scale, codes_sq, scale_sq = held
            moments = [from_codes(codes, scale, signed=True), from_codes(codes_sq, scale_sq, signed=False)]
        else:
            moments = held
        new = adams_update(weight, grad, moments[0], moments[1], mask, hyper, second_moment)
        weight.copy_(new[0])
        if in_8bit:
            to_codes_(new[1], codes, scale, signed=True)
            to_codes_(new[2], codes_sq, scale_sq, signed=False)
        else:
            held[0].copy_(new[1])
            held[1].copy_(new[2])


def update_words_(columns: Columns, packed: Sequence[Tensor], bits: Tensor, *rest: Any) -> None:
    """`update_` with packed masks that are viewed as words of 32 weights, see `unpack_words`; for `torch.compile`."""
    update_(columns, [unpack_words(words, bits) for words in packed], *rest)
