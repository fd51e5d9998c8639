"""LoRA under the mask: PEFT's LoRA layer with the update `mask * (B A)` in place of `B A`. Imports peft.

PEFT stores it like any LoRA, without a trace of the mask. An adapter that is loaded without `masked_lora_config` is a
plain LoRA, computes something else and fills the zeros when it is merged; SHiRA has no such trap.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor

from castlm.core.errors import InputError


class MaskedLoraLinear(Linear):
    """A linear layer with LoRA whose update is zero wherever the base weight (out, in) is zero.

    It materializes the update (out, in) in each forward pass, as SHiRA does, and multiplies once, in the wider dtype of
    weight and adapter: PEFT keeps the adapter of a bf16 model in fp32.

    Raises:
        InputError: a variant of LoRA such as DoRA, when the adapter is added; several adapters in one batch.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        if adapter_name in self.lora_variant:
            variant = type(self.lora_variant[adapter_name]).__name__
            raise InputError(f"{variant} is not possible under a mask: use plain LoRA")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`scaling * mask * (B A)`, (out, in). Merging and unmerging use it too."""
        return super().get_delta_weight(adapter).masked_fill(self.get_base_layer().weight == 0, 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names are not possible for LoRA under a mask: choose one with set_adapter")
        base = self.get_base_layer()
        weight = base.weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter)
        if weight.dtype == base.weight.dtype:
            return F.linear(x, weight, base.bias)
        bias = None if base.bias is None else base.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
