"""A model whose transformer blocks stay in its safetensors files and come into memory one at a time.

One-shot pruning never needs more: the text passes through the embeddings once, and then through block after block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.distributed.loading import Checkpoint, opened_files

Held = list[tuple[nn.Module, str, nn.Parameter]]
"""Parameters that are in memory: the module, the name in it, and the one on the meta device that stood there."""


class StoredModel:
    """A model on the meta device, with the files that its weights lie in.

    Args:
        model: as `castlm.distributed.loading.open_sharded` gives it: parameters on the meta device, buffers real.
        stack: the name of its list of transformer blocks, as `model.layers`.
        device: where the weights are read to, in fp32.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, stack: str, device: torch.device) -> None:
        self.model, self.checkpoint, self.stack, self.device = model, checkpoint, stack, device
        self.blocks = list(model.get_submodule(stack).children())
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Holds one transformer block in memory.

        Raises:
            InputError: a file that cannot be read, or a weight that is not finite.
        """
        held = self._read(self.blocks[index], f"{self.stack}.{index}.")
        try:
            yield self.blocks[index]
        finally:
            _drop(held)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Lets `model.base_model` be called: what is outside the blocks is held, each block while it is at work.

        Plain embeddings are held in the dtype that they are stored in, as they are the greatest part of it.
        """
        with ExitStack() as stack:
            stack.callback(_drop, self._read_outside(stack))
            for index, block in enumerate(self.blocks):
                block.forward = self._loading(index, block.forward)
                stack.callback(block.__dict__.pop, "forward")
            yield

    def _loading(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            with self.block(index):
                return forward(*args, **kwargs)

        return loaded

    def _read_outside(self, stack: ExitStack) -> Held:
        inside, base, held = set(self.blocks), self.model.base_model, []
        names = {module: name for name, module in self.model.named_modules()}
        pending = [base]
        while pending:
            module = pending.pop()
            plain_embedding = type(module) is nn.Embedding
            held += self._read(module, f"{names[module]}.".removeprefix("."), recurse=False, widen=not plain_embedding)
            if plain_embedding:
                hook = module.register_forward_hook(lambda _, __, output: output.float())
                stack.callback(hook.remove)
            pending += [child for child in module.children() if child not in inside]
        return held

    def _read(self, module: nn.Module, prefix: str, recurse: bool = True, widen: bool = True) -> Held:
        """Reads the parameters of a module whose names in the model begin with `prefix`."""
        held: Held = []
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            value = self._value(prefix + name)
            value = value.to(self.device, torch.float32 if widen else None).contiguous()
            held.append((owner, leaf, parameter))
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return held

    def _value(self, name: str) -> Tensor:
        place = self.checkpoint.places[name]
        try:
            with opened_files() as read:
                value = place.read(read, slice(None))
        except Exception as error:  # safetensors' own type
            raise InputError(f"{name} of {self.checkpoint.source} cannot be read: {error}") from None
        _check_finite(name, value, self.checkpoint)
        return value


def outside_blocks(checkpoint: Checkpoint, stack: str) -> Iterator[tuple[str, Tensor]]:
    """The stored weights outside the blocks of `stack` by name, one at a time, as the files hold them."""
    for name, place in checkpoint.places.items():
        if not name.startswith(f"{stack}."):
            with opened_files() as read:
                yield name, place.read(read, slice(None))


def check_outside_blocks(checkpoint: Checkpoint, stack: str) -> None:
    """Raises `InputError` where a weight outside the blocks is not finite, before the blocks are worked on."""
    for name, value in outside_blocks(checkpoint, stack):
        _check_finite(name, value, checkpoint)


def _check_finite(name: str, value: Tensor, checkpoint: Checkpoint) -> None:
    if not all(math.isfinite(bound) for bound in torch.aminmax(value)):  # `isfinite` would take three copies
        raise InputError(f"{name} of {checkpoint.source} holds NaN or infinity: the checkpoint is damaged")


def _drop(held: Held) -> None:
    """Puts the parameters on the meta device back."""
    for owner, leaf, parameter in held:
        owner._parameters[leaf] = parameter
