"""From hidden states to logits, a chunk of tokens at a time: which student and teacher share in the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OutputHead(NamedTuple):
    """What turns hidden states into logits: `z = (h @ weight.T + bias) * scale`, then `softcap * tanh(z / softcap)`."""

    weight: Tensor
    """(vocab, hidden)."""
    bias: Tensor | None = None
    """(vocab,)."""
    softcap: float | None = None
    """Gemma 2's bound on |logit|; None for no cap."""
    scale: float = 1.0
    """Granite's 1/logits_scaling, Cohere's logit_scale."""


class Side(NamedTuple):
    """Student or teacher, ready for the matmul: cast once, scale (and 1/softcap) folded into the small tensors."""

    hidden: Tensor  # (tokens, hidden)
    weight_t: Tensor  # (hidden, vocab), a view
    bias: Tensor | None
    softcap: float | None

    @staticmethod
    def of(hidden: Tensor, head: OutputHead, dtype: torch.dtype) -> Side:
        factor = head.scale / (head.softcap or 1.0)
        hidden = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype) * factor
        weight_t = head.weight.detach().to(dtype).t()
        return Side(hidden if factor == 1 else hidden * factor, weight_t, bias, head.softcap)


def logits_(side: Side, rows: slice, out: Tensor, narrow: Tensor, tanh: Tensor | None) -> Tensor:
    """(chunk, vocab) in `out`, through `narrow` where the matmul is narrower; leaves the cap's tanh in `tanh`."""
    product = narrow if narrow.numel() else out
    if side.bias is None:
        torch.mm(side.hidden[rows], side.weight_t, out=product)
    else:
        torch.addmm(side.bias, side.hidden[rows], side.weight_t, out=product)
    if product is narrow:
        out.copy_(narrow)
    if side.softcap is not None:
        out.tanh_()
        if tanh is not None:
            tanh.copy_(out)
        out.mul_(side.softcap)
    return out


def log_softmax_(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, out=logits)


def log_probs_(side: Side, rows: slice, out: Tensor, narrow: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (chunk, vocab) at `temperature` in `out`; the rest as in `logits_`."""
    logits = logits_(side, rows, out, narrow, None)
    return log_softmax_(logits if temperature == 1 else logits.div_(temperature))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """autocast's dtype, or else that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits are alive at once.

    The head gradient moves 8*vocab*hidden bytes a chunk for 2*chunk*vocab*hidden FLOP. On CPU the time falls little
    past 128 tokens and the memory grows (measured); an accelerator does some 200 FLOP a byte (from data sheets, not
    measured).
    """
    return 192 if device.type == "cpu" else 1024
