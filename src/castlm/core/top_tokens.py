"""A teacher's distribution in few numbers: its top-k tokens, and the rest of the distribution as one bucket.

This is small enough to be stored on disk, so that a text the teacher has read once can be distilled again without it.
With the bucket, the KL remains a divergence; without it, the student would learn to be more certain than the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from castlm.core.head import OutputHead, Side, default_chunk_tokens, log_probs_, matmul_dtype

_LEAST = 1e-7  # the smallest probability of the teacher's bucket: log-probabilities in fp32 do not tell less from 0


class TopTokens(NamedTuple):
    """The k most probable next tokens at each position, in no particular order."""

    tokens: Tensor
    """int32, (..., k)."""
    log_probs: Tensor
    """float32, (..., k): from the softmax over the whole vocabulary at the temperature of the loss."""

    def rows(self, chosen: Tensor | slice) -> TopTokens:
        """The positions that a bool mask (...) or a slice selects."""
        return TopTokens(self.tokens[chosen], self.log_probs[chosen])


@torch.no_grad()
def top_tokens(
    hidden: Tensor, head: OutputHead, k: int, temperature: float = 1.0, chunk_tokens: int | None = None
) -> TopTokens:
    """The `k` most probable next tokens of a teacher, for `distillation_loss(teacher_top=...)`.

    Args:
        hidden: (..., hidden), after the final norm.
        head: the teacher's output head.
        k: number of tokens, at most the size of the vocabulary.
        temperature: the same as in the loss, above 0.
        chunk_tokens: as in `distillation_loss`, as is the dtype of the matmuls.

    Returns:
        `tokens` (..., k), int32, and their `log_probs` (..., k), float32.

    Examples:
        >>> head = OutputHead(torch.eye(4))
        >>> top = top_tokens(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), head, k=2)
        >>> sorted(top.tokens[0].tolist())
        [1, 3]
    """
    vocab = head.weight.shape[0]
    dtype = matmul_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    side = Side.of(hidden, head, dtype)
    num_tokens = len(side.hidden)
    chunk = max(1, min(chunk_tokens or default_chunk_tokens(hidden.device), num_tokens))
    logits = torch.empty(chunk, vocab, dtype=wide, device=hidden.device)
    narrow = torch.empty(chunk if dtype != wide else 0, vocab, dtype=dtype, device=hidden.device)
    tokens = torch.empty(num_tokens, k, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(num_tokens, k, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, num_tokens, chunk):
            rows = slice(start, min(start + chunk, num_tokens))
            count = rows.stop - start
            best = log_probs_(side, rows, logits[:count], narrow[:count], temperature).topk(k, dim=-1, sorted=False)
            tokens[rows], log_probs[rows] = best.indices.to(torch.int32), best.values.float()
    shape = (*hidden.shape[:-1], k)
    return TopTokens(tokens.view(shape), log_probs.view(shape))


def spread_(teacher_top: TopTokens, student: Tensor, out: Tensor) -> Tensor:
    """Writes into `out` the log-probabilities (tokens, vocab) of a teacher that is known by its top-k tokens.

    The probability outside `teacher_top` (tokens, k) is distributed as in the student's log-probabilities `student`
    (tokens, vocab), so that only its sum contributes to the KL.
    """
    tokens = teacher_top.tokens.to(torch.int64)
    rest = (1 - teacher_top.log_probs.exp().sum(-1, keepdim=True)).clamp_(min=_LEAST).log_()  # (tokens, 1)
    rest_of_student = _log_sum_of_others(student, tokens, out)
    torch.add(student, rest - rest_of_student, out=out)
    return out.scatter_(1, tokens, teacher_top.log_probs.to(out.dtype))


def _log_sum_of_others(log_probs: Tensor, tokens: Tensor, scratch: Tensor) -> Tensor:
    """Returns the log of the probability of all tokens but `tokens` (tokens, k): (tokens, 1); -inf if there are none.

    It is a sum over the others and not 1 minus the sum over `tokens`: where a student is sure, that difference is
    rounding noise, which would make the KL negative and its gradient zero. `scratch` (tokens, vocab) is overwritten,
    so that nothing of this size is allocated.
    """
    others = scratch.copy_(log_probs).scatter_(1, tokens, float("-inf"))
    largest = others.amax(-1, keepdim=True).clamp_(min=torch.finfo(others.dtype).min)  # -inf - -inf would be NaN
    return others.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
