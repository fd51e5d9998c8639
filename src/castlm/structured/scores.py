"""The scores by which whole units are ranked. Every score is a sum over the weights of a unit.

| score | of a unit | reads |
|---|---|---|
| `magnitude` | the squared L2 norm of its weights | nothing |
| `flap` | the variance of its contribution to the stream (An et al. 2023, arXiv 2312.11983) | inputs |
| `taylor` | the sum of `|w dL/dw|` over its weights, as in LLM-Pruner (Ma et al. 2023, arXiv 2305.11627) | gradients |

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Score(NamedTuple):
    """A row of `SCORES`."""

    values: Callable[[Sequence[Tensor], Tensor | None, Sequence[Tensor] | None], list[Tensor]]
    """`values(weights, variance, gradients)` returns a tensor for each of the `weights` (out, in) that hold units, of
    its shape; the score of a unit is the sum of its entries. The last weight writes to the residual stream, and
    `variance` (in,) is that of its input; None without a text. `gradients` of the loss are like `weights`; None unless
    the score `needs_gradients`, which are computed before the walk, so that there is no variance then."""
    needs_text: bool = True
    needs_gradients: bool = False


def _magnitude(weights: Sequence[Tensor], variance: Tensor | None, gradients: Sequence[Tensor] | None) -> list[Tensor]:
    return [weight.square() for weight in weights]


def _flap(weights: Sequence[Tensor], variance: Tensor | None, gradients: Sequence[Tensor] | None) -> list[Tensor]:
    *inner, last = weights
    assert variance is not None
    # W_ij^2 times the variance of input column j, in the layer that writes: (576, 1536) * (1536,)
    return [*(weight.new_zeros(weight.shape) for weight in inner), last.square() * variance]


def _taylor(weights: Sequence[Tensor], variance: Tensor | None, gradients: Sequence[Tensor] | None) -> list[Tensor]:
    assert gradients is not None
    return [(weight * gradient).abs() for weight, gradient in zip(weights, gradients)]


SCORES: dict[str, Score] = {
    "magnitude": Score(_magnitude, needs_text=False),
    "flap": Score(_flap),
    "taylor": Score(_taylor, needs_gradients=True),
}
