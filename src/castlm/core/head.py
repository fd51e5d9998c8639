"""From hidden states to logits, a chunk of tokens at a time. Student and teacher share this code in the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OutputHead(NamedTuple):
    """The map from hidden states to logits: `z = (h @ weight.T + bias) * scale`, then `softcap * tanh(z / softcap)`."""

    weight: Tensor
    """(vocab, hidden)."""
    bias: Tensor | None = None
    """(vocab,)."""
    softcap: float | None = None
    """Gemma 2's bound on |logit|; None for no cap."""
    scale: float = 1.0
    """Granite's 1 / logits_scaling or Cohere's logit_scale."""


class Side(NamedTuple):
    """The student or the teacher, ready for the matmul: cast once, with scale and 1/softcap folded into `hidden`."""

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
    """Writes the logits (chunk, vocab) of `rows` into `out`.

    Args:
        narrow: a buffer for the product if the matmul runs in a narrower dtype than `out`; empty otherwise.
        tanh: a buffer for the tanh of the softcap, which the gradient needs; None if it is not needed.
    """
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
    """`log_softmax` over the last axis, in place."""
    return torch.log_softmax(logits, -1, out=logits)


def log_probs_(side: Side, rows: slice, out: Tensor, narrow: Tensor, temperature: float) -> Tensor:
    """Writes the log-probabilities (chunk, vocab) at `temperature` into `out`. Other arguments as in `logits_`."""
    logits = logits_(side, rows, out, narrow, None)
    return log_softmax_(logits if temperature == 1 else logits.div_(temperature))


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of autocast if it is enabled, else the dtype of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def default_chunk_tokens(device: torch.device) -> int:
    """The number of tokens whose logits are in memory at once.

    The gradient of the head moves 8*vocab*hidden bytes per chunk for 2*chunk*vocab*hidden FLOP. On a CPU the time falls
    little beyond 128 tokens while memory grows (measured). An accelerator performs some 200 FLOP per byte, according
    to data sheets.
    """
    return 192 if device.type == "cpu" else 1024
