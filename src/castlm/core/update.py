"""The arithmetic of an AdamS step on plain tensors: one pure fp32 update function, and the loop over what is held in
fewer bits. `tests/reference.py` holds the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castlm.core.masks import unpack_words
from castlm.core.moments import from_codes, to_codes_

DECAYS = ("horizon", "proportional", "additive", "none")
SECOND_MOMENTS = ("gradient", "mix")

# Of some parameters: weights, gradients, first and second moments, each (numel,). With 8-bit moments each of these is
# (blocks, block), and after either moment come its scales (blocks,).
Columns = list[list[Tensor]]


def decay_alpha(step: int, total_steps: int, decay: str, decay_end: float = 0.1) -> float:
    """The ramp `a_t` of the decay before step `t = step` (0-based): linear from 0 to 1 over the horizon `total_steps`,
    and for `"horizon"` over its first `decay_end`, 1 from there on. 0 throughout for `"none"`."""
    if decay == "none":
        return 0.0
    end = decay_end * total_steps if decay == "horizon" else total_steps
    return min(1.0, step / end)


def adams_update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    hyper: Tensor,
    second_moment: str = "mix",
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamS step on plain tensors of one shape and dtype (`exp_avg` may be in bf16); plain Adam without `mask`.

    CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8, and our `"horizon"` and `"gradient"`. `kernels.cpp` does the same.

    Args:
        mask: bool, True = kept.
        hyper: (7,) float32, or float64 for float64 weights, of `hyperparameters`: a tensor, so that one compilation
            serves every step.

    Returns:
        The new `weight`, `exp_avg` (of the raw gradient, always) and `exp_avg_sq` (of the mix, kept weights too; of the
        raw gradient where `mask` is None or `second_moment` is `"gradient"`).
    """
    rate, eps, one_less_beta1, one_less_beta2, pull, keep, remaining = hyper.unbind()
    exp_avg = exp_avg.to(weight.dtype)
    exp_avg = exp_avg + (grad - exp_avg) * one_less_beta1
    mix = exp_avg if mask is None else torch.where(mask, exp_avg, exp_avg * keep + pull * weight.sign())
    to_square = grad if mask is None or second_moment == "gradient" else mix
    exp_avg_sq = exp_avg_sq + (to_square.square() - exp_avg_sq) * one_less_beta2
    weight = weight - rate * mix / (exp_avg_sq.sqrt() + eps)
    return (weight if mask is None else torch.where(mask, weight, weight * remaining)), exp_avg, exp_avg_sq


def hyperparameters(group: dict[str, Any], step: int) -> list[float]:
    """What `adams_update` needs to know of a parameter group at the 0-based `step = t`.

    In this order, with r the root of `1 - beta2^(t+1)`: the rate `lr r / (1 - beta1^(t+1))`; `eps r`; `1 - beta1` and
    `1 - beta2`; and of masked weights what is added to their momentum against their sign, the factor of the momentum
    itself, and the share of the weight that outlives the step.
    """
    beta1, beta2 = group["betas"]
    decay = group["decay"]
    alpha, alpha_next = (decay_alpha(s, group["total_steps"], decay, group["decay_end"]) for s in (step, step + 1))
    pull = 0.0 if decay == "horizon" else alpha * group["lam"]
    keep = 1.0 if decay == "additive" else 1 - alpha
    remaining = 1.0
    if decay == "horizon":
        remaining = (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0
    root = (1 - beta2 ** (step + 1)) ** 0.5
    rate = float(group["lr"]) * root / (1 - beta1 ** (step + 1))
    return [rate, group["eps"] * root, 1 - beta1, 1 - beta2, pull, keep, remaining]


def update_(columns: Columns, masks: Sequence[Tensor | None], in_8bit: bool, hyper: Tensor, second_moment: str) -> None:
    """`adams_update` of each parameter of `columns`, in place."""
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
    """`update_` of parameters of whole words of 32 weights, with their masks as `unpack_words` takes them: for
    `torch.compile`, which spreads them in registers."""
    update_(columns, [unpack_words(words, bits) for words in packed], *rest)
