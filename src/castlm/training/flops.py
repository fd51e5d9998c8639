"""Model FLOP/s utilization (MFU) as in PaLM (arXiv 2204.02311): the share of a GPU's peak that a run reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from castlm.core.blocks import is_tower
from castlm.inference.devices import device_of


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak of a device in FLOP/s; None where it is not known, as of CPUs and in fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    record = device_of(torch.cuda.get_device_name(device))
    return None if record is None else record.peak["bf16"]


def flops_per_token(names: Mapping[Tensor, str], model_config: Any, seq_len: int, has_teacher: bool) -> float:
    """FLOPs of one training token: `6 N + 12 L H T` for the student, and a third of it for a teacher's forward pass.

    N counts the weight matrices (of experts as many as a token takes, of a vision tower none) without the input
    embedding unless it is also the head, L the transformer blocks, H is the hidden size and T the sequence length.
    Recomputation for gradient checkpointing does not count.

    Args:
        names: name of every trained parameter. Sharded ones count whole.
    """
    config = model_config.get_text_config()
    embedding = 0 if model_config.tie_word_embeddings else config.vocab_size * config.hidden_size
    active = getattr(config, "num_experts_per_tok", 1)
    matrices = sum(
        p.numel() * (min(1.0, active / len(p)) if p.dim() == 3 else 1)
        for p, name in names.items()
        if p.dim() > 1 and name.endswith(("weight", "weight.original")) and not is_tower(name)
    )
    training = 6 * (matrices - embedding) + 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return training * (4 / 3 if has_teacher else 1)
