"""The arithmetic of an AdamS step on plain tensors: one pure fp32 update function, and the loop over what is held in
fewer bits. `tests/reference.py` holds the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from castlm.core.masks import packed_to_bytes
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
    decay: str,
    second_moment: str = "mix",
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamS step on plain tensors of one shape and dtype (`exp_avg` may be in bf16); plain Adam without `mask`.

    CAST, arXiv 2509.25996, Alg. 1 and Eq. 7-8, and our `"horizon"` and `"gradient"`.

    Args:
        mask: uint8, not 0 = kept, or bool.
        hyper: (10,) float32, or float64 for float64 weights, of `hyperparameters`: a tensor, so that one compilation
            serves every step, and of one type, so that its inner loop converts nothing.

    Returns:
        The new `weight`, `exp_avg` (of the raw gradient, always) and `exp_avg_sq` (of the mix, kept weights too; of the
        raw gradient where `mask` is None or `second_moment` is `"gradient"`).
    """
    step_size, beta1, one_less_beta1, beta2, one_less_beta2, eps, pull, keep, remaining, inverse_root = hyper.unbind()
    exp_avg = exp_avg.to(weight.dtype) * beta1 + grad * one_less_beta1
    mix = exp_avg
    if mask is not None and decay != "none":
        kept = mask.to(weight.dtype) > 0  # the conversion is there for inductor, which vectorises no bool on CPU
        masked_mix = mix if decay == "additive" else mix * keep
        if decay != "horizon":
            masked_mix = masked_mix + pull * weight.sign()
        mix = torch.where(kept, mix, masked_mix)
    squared = mix if mask is not None and second_moment == "mix" else grad
    exp_avg_sq = exp_avg_sq * beta2 + squared.square() * one_less_beta2
    weight = weight - step_size * mix / (exp_avg_sq.sqrt() * inverse_root + eps)
    if mask is not None and decay == "horizon":
        weight = torch.where(kept, weight, weight * remaining)
    return weight, exp_avg, exp_avg_sq


def hyperparameters(group: dict[str, Any], step: int) -> list[float]:
    """What `adams_update` needs to know of a parameter group at the 0-based `step = t`.

    In this order: `lr / (1 - beta1^(t+1))`; both betas, each followed by what it lacks of 1; eps; `a_t lam`; `1 - a_t`;
    the share `(1 - a_{t+1}) / (1 - a_t)` of a masked weight that outlives a `"horizon"` step; `(1 - beta2^(t+1))^-1/2`.
    """
    beta1, beta2 = group["betas"]
    alpha, alpha_next = (
        decay_alpha(s, group["total_steps"], group["decay"], group["decay_end"]) for s in (step, step + 1)
    )
    remaining = (1 - alpha_next) / (1 - alpha) if alpha < 1 else 0.0
    step_size = float(group["lr"]) / (1 - beta1 ** (step + 1))
    inverse_root = (1 - beta2 ** (step + 1)) ** -0.5
    betas = (beta1, 1 - beta1, beta2, 1 - beta2)
    return [step_size, *betas, group["eps"], alpha * group["lam"], 1 - alpha, remaining, inverse_root]


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


def update_packed_(columns: Columns, packed: Sequence[Tensor], *rest: Any) -> None:
    """`update_` with masks in bits, as the optimizer's state has them."""
    update_(columns, [packed_to_bytes(bits) for bits in packed], *rest)
