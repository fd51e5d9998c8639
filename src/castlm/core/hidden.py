"""Distillation of hidden states: how far a student's residual stream is from its teacher's, block by block.

The logits tell a student what to compute in the end; the hidden states tell each of its blocks. For a sparse student,
whose blocks were each damaged, that is the nearer target.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def hidden_distance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    *,
    num_tokens: int | Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Mean over blocks and tokens of the relative distance of two residual streams, in at least fp32.

    With `s` and `t` (hidden,) the stream of student and teacher at one token behind one block:

    .. code-block:: text

        distance = log(1 + |s - t|^2 / |t|^2)

    It is 0 where the student agrees and log 2 where its stream is zero, whatever the width and depth of the model. It
    adds up over micro-batches and ranks, and a rotation of both streams leaves it as it is. The logarithm bounds what
    one token counts: most models give the first token a stream that is hundreds of times the usual size (22,700
    against 150 in SmolLM2-135M), and a student that gives it to another token is at a squared distance of thousands.

    Args:
        student: the stream behind each block, each `labels.shape + (hidden,)`.
        teacher: the same of the teacher, which gets no gradient.
        labels: int64; tokens whose label is `ignore_index` do not count.
        num_tokens: the divisor, in place of this call's number of tokens that count; as for `distillation_loss`.

    Reference: SquareHead, Kurtic et al. 2023 (arXiv 2310.06927), which normalizes a whole batch at once and has no
    logarithm.

    Examples:
        >>> states, labels = torch.ones(1, 3, 4), torch.tensor([[1, 2, -100]])
        >>> hidden_distance([1.5 * states], [states], labels)  # log 1.25
        tensor(0.2231)
    """
    real = labels != ignore_index
    count = real.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=labels.device)
    weights = real / count.clamp(min=1) / len(student)  # (8, 512): the mean over tokens, then over blocks
    pairs = zip(student, teacher, strict=True)
    distances = [_Distance.apply(ours, theirs.detach(), weights) for ours, theirs in pairs]
    return torch.stack(distances).sum()


class _Distance(torch.autograd.Function):
    """The weighted sum of the distances of all tokens behind one block.

    The backward pass computes the difference again, so that nothing is kept but the states themselves: the student's
    are there anyway, and the teacher's may be narrower than a difference.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(ours, theirs, weights)
        _, ratio, _ = _compare(ours, theirs)
        return (ratio.log1p() * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ours, theirs, weights = ctx.saved_tensors
        difference, ratio, power = _compare(ours, theirs)
        # d log(1 + |s - t|^2 / |t|^2) / ds = 2 (s - t) / (|t|^2 (1 + ratio))
        per_token = 2 * grad * weights / (power * (1 + ratio))  # (8, 512)
        return difference.mul_(per_token[..., None]).to(ours.dtype), None, None


def _compare(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The difference (..., hidden), and by token `|s - t|^2 / |t|^2` and `|t|^2` (...), in at least fp32."""
    wide = torch.promote_types(ours.dtype, torch.promote_types(theirs.dtype, torch.float32))
    target = theirs.to(wide)
    power = target.square().sum(-1).clamp(min=torch.finfo(wide).tiny)  # a stream of zeros divides by 1e-38, not by 0
    difference = ours.to(wide) - target
    return difference, difference.square().sum(-1) / power, power
