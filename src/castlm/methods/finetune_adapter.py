"""Fine-tuning of a sparse model through a PEFT adapter, which is merged at the end and keeps every zero."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from castlm.core.adams import AdamS
from castlm.core.sparsify import weight_parameter
from castlm.files.atomic_dir import atomic_dir
from castlm.methods.adapters import add_adapter_, masked_lora_config, shira_config
from castlm.methods.finetune import Finetune


class FinetuneAdapter(Finetune):
    """SHiRA on kept positions, or LoRA under the mask, over a frozen model that is n:m already.

    The adapter is written to `adapter/` in the output folder, as PEFT writes it, before it is merged.
    """

    whole_copies = True  # as PEFT reads positions and whole weights in its forward pass

    def prepare(self, model: nn.Module) -> None:
        chosen = {"pattern": self.pattern, "filter_fn": self.filter_fn}
        if self.adapter.adapter == "shira":
            config = shira_config(model, self.adapter.lora_r, random_seed=self.seed, **chosen)
        else:
            config = masked_lora_config(model, self.adapter.lora_r, **chosen)
        self._masks = {weight_parameter(layer): layer.weight.detach() != 0 for layer in self.layers.values()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # of LoRA's first matrix
            self.peft_model = add_adapter_(model, config)

    def build_optimizer(self, model: nn.Module, fused: bool) -> AdamS:
        self._masks = {p: mask.to(p.device) for p, mask in self._masks.items()}  # the model has moved since `prepare`
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        group = {"params": [p for _, p in named], "param_names": [name for name, _ in named], "sparse": False}
        return self.optimize([group], fused)

    def start_layer_(self, layer: nn.Linear, weight: Tensor, mask: Tensor) -> None:
        """Nothing: the model is its own start."""

    def save_parts(self, folder: Path) -> None:
        with atomic_dir(folder / "adapter", overwrite=True) as temporary:
            self.peft_model.save_pretrained(temporary)

    def fold_(self) -> None:
        self.peft_model.merge_and_unload()
