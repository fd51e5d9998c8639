"""Reads batches with a model: its states after the final norm, the residual stream between its blocks, and its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.blocks import is_tower
from castlm.core.distill import OutputHead
from castlm.core.sparsify import transformer_blocks
from castlm.distributed.sharding import gathered
from castlm.models.architecture import backbone, output_head


class Reading(NamedTuple):
    """The output of a model for a batch."""

    states: Tensor
    """(batch, seq, hidden), after the final norm."""
    stream: list[Tensor]
    """The residual stream after each transformer block, (batch, seq, hidden); empty if it was not asked for."""


class Reader:
    """Runs a model, student or teacher, up to its head.

    Args:
        keeps_stream: whether `read` may be asked for the residual stream.
    """

    def __init__(self, model: PreTrainedModel, keeps_stream: bool) -> None:
        self.model = model
        self._kept: list[Tensor] | None = None
        if keeps_stream:
            for name, block in transformer_blocks(backbone(model)).items():
                if not is_tower(name):
                    block.register_forward_pre_hook(_as_sharded)
                    block.register_forward_hook(self._keep)

    def read(self, inputs: dict[str, Any], stream: bool) -> Reading:
        """The output for the arguments of a forward pass, with the residual stream if `stream`."""
        self._kept = [] if stream else None
        # Without the head, whose logits for 8 x 512 tokens would be 768 MiB: the loss makes them in chunks.
        states = backbone(self.model)(**inputs, use_cache=False).last_hidden_state
        kept, self._kept = self._kept, None  # blocks that checkpointing runs again in the backward pass add nothing
        return Reading(states, kept or [])

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._kept is not None:
            self._kept.append(output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """The head of the model, with its whole weight if it is sharded by itself."""
        with gathered(self.model.get_output_embeddings()):
            yield output_head(self.model)


# A view: compiled, it would be a graph of its own beside each block's.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_sharded(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a block, of which the residual stream is a tensor of its own.

    Its gradients, from the branches of the block, are added up before the one of the stream that is kept, as FSDP has
    them: three sums in one place would come in another order, and with other bits, in one process.
    """
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)
