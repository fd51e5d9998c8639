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

# Of some parameters: weights, gradients, first and second moments, each (numel,), or (numel / 32, 32) where masks are
# words. With 8-bit moments each of these is (blocks, block), and after either moment come its scales (blocks,).
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
    decay: str,
    second_moment: str = "mix",
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamS step on plain tensors of one shape and dtype (`exp_avg` may be in bf16); plain Adam without `mask`.

    CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8, and our `"horizon"` and `"gradient"`.

    Args:
        mask: bool, True = kept, or uint8, not 0 = kept, which is what to pass where nothing is compiled with it.
        hyper: (8,) float32, or float64 for float64 weights, of `hyperparameters`: a tensor, so that one compilation
            serves every step, and of one type, so that its inner loop converts nothing.

    Returns:
        The new `weight`, `exp_avg` (of the raw gradient, always) and `exp_avg_sq` (of the mix, kept weights too; of the
        raw gradient where `mask` is None or `second_moment` is `"gradient"`).
    """
    rate, eps, one_less_beta1, one_less_beta2, pull, keep, remaining, masked_rate = hyper.unbind()
    exp_avg = exp_avg.to(weight.dtype)
    exp_avg = exp_avg + (grad - exp_avg) * one_less_beta1
    mix = exp_avg
    if mask is not None and decay != "none":
        # inductor on CPU vectorises no bool that comes from memory
        kept = mask if mask.dtype == torch.bool else mask.to(weight.dtype) > 0
        if decay == "horizon":  # the factors of a masked weight go into its rate; its mix is needed only squared
            rate = torch.where(kept, rate, masked_rate)
            weight = torch.where(kept, weight, weight * remaining)
        else:
            masked_mix = (mix if decay == "additive" else mix * keep) + pull * weight.sign()
            mix = torch.where(kept, mix, masked_mix)
    if mask is None or second_moment == "gradient":
        squared = grad.square()
    elif decay == "horizon":
        squared = torch.where(kept, mix, mix * keep).square()
    else:
        squared = mix.square()
    exp_avg_sq = exp_avg_sq + (squared - exp_avg_sq) * one_less_beta2
    return weight - rate * mix / (exp_avg_sq.sqrt() + eps), exp_avg, exp_avg_sq


def hyperparameters(group: dict[str, Any], step: int) -> list[float]:
    """What `adams_update` needs to know of a parameter group at the 0-based `step = t`.

    In this order, with r the root of `1 - beta2^(t+1)`: the rate `lr r / (1 - beta1^(t+1))`; `eps r`; `1 - beta1` and
    `1 - beta2`; `a_t lam`; `1 - a_t`; the share `(1 - a_{t+1}) / (1 - a_t)` of a masked weight that outlives a
    `"horizon"` step; the rate times the last two. As few as can be: the compiled loop reads each anew for every 16
    weights.
    """
    beta1, beta2 = group["betas"]
    alpha, alpha_next = (
        decay_alpha(s, group["total_steps"], group["decay"], group["decay_end"]) for s in (step, step + 1)
    )
    remaining = (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0
    root = (1 - beta2 ** (step + 1)) ** 0.5
    rate, keep = float(group["lr"]) * root / (1 - beta1 ** (step + 1)), 1 - alpha
    moments = (1 - beta1, 1 - beta2)
    return [rate, group["eps"] * root, *moments, alpha * group["lam"], keep, remaining, rate * keep * remaining]


def update_(
    columns: Columns,
    masks: Sequence[Tensor | None],
    in_8bit: bool,
    hyper: Tensor,
    decay: str,
    second_moment: str,
) -> None:
    """`adams_update` of each parameter of `columns`, in place; masks as it takes them."""
    for weight, grad, *held, mask in zip(*columns, masks):
        mask = None if mask is None else mask.view(weight.shape)
        if in_8bit:
            codes, scale, codes_sq, scale_sq = held
            moments = [from_codes(codes, scale, signed=True), from_codes(codes_sq, scale_sq, signed=False)]
        else:
            moments = held
        new = adams_update(weight, grad, moments[0], moments[1], mask, hyper, decay, second_moment)
        weight.copy_(new[0])
        if in_8bit:
            to_codes_(new[1], codes, scale, signed=True)
            to_codes_(new[2], codes_sq, scale_sq, signed=False)
        else:
            held[0].copy_(new[1])
            held[1].copy_(new[2])


def update_words_(columns: Columns, packed: Sequence[Tensor], bits: Tensor, *rest: Any) -> None:
    """`update_` of parameters (num_words, 32) with their masks as `unpack_words` takes them."""
    assert len(bits) == 32  # tells the compiler that this size is no variable: else it vectorises nothing
    update_(columns, [unpack_words(words, bits) for words in packed], *rest)
