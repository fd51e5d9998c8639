"""What a teacher says of a token in few numbers: its k most probable tokens, and all others as one.

Few enough to be kept on disk, so that text it has read before needs it neither running nor in memory. With the rest as
one more token the KL stays a divergence; without it the student would learn to be surer than the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.head import OutputHead, Side, default_chunk_tokens, log_probs_, matmul_dtype

_LEAST = 1e-7  # probability of the rest: what fp32 can tell from none


class TopTokens(NamedTuple):
    """The k most probable tokens of each token's successor, in no order."""

    tokens: Tensor
    """int32, (..., k)."""
    log_probs: Tensor
    """fp32, (..., k): of the softmax over the whole vocabulary, at the temperature of the loss."""

    def rows(self, chosen: Tensor | slice) -> TopTokens:
        """Of the tokens that a mask (...) or a slice chooses."""
        return TopTokens(self.tokens[chosen], self.log_probs[chosen])


@torch.no_grad()
def top_tokens(
    hidden: Tensor, head: OutputHead, k: int, temperature: float = 1.0, chunk_tokens: int | None = None
) -> TopTokens:
    """The `k` most probable tokens by `hidden` (..., hidden) under `head`, for `distillation_loss(taught=...)`.

    Matmuls and chunks as there.

    Raises:
        InputError: `k` is not between 1 and the vocabulary.
    """
    vocab = head.weight.shape[0]
    if not 1 <= k <= vocab:
        raise InputError(f"{k} most probable tokens of a vocabulary of {vocab}: choose between 1 and {vocab}")
    dtype = matmul_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    side = Side.of(hidden, head, dtype)
    num_tokens = len(side.hidden)
    chunk = min(chunk_tokens or default_chunk_tokens(hidden.device), num_tokens)
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


def spread_(taught: TopTokens, student: Tensor, out: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocab) in `out` that teach what `taught` (tokens, k) does: the rest of the teacher's
    probability lies as the student's log-probabilities `student` have it, so that only its sum counts."""
    tokens = taught.tokens.to(torch.int64)
    rest = 1 - taught.log_probs.exp().sum(-1, keepdim=True)
    rest_of_student = 1 - student.gather(1, tokens).exp_().sum(-1, keepdim=True)
    torch.add(student, rest.clamp_(min=_LEAST).log_() - rest_of_student.clamp_(min=_LEAST).log_(), out=out)
    return out.scatter_(1, tokens, taught.log_probs.to(out.dtype))
