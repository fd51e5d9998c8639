"""The sources of transformer blocks for the walk of a start: a model in memory, or its safetensors files.

One-shot pruning needs only one block at a time. Both sources give the same blocks, so that results agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.blocks import block_name
from castlm.core.errors import InputError, check_finite
from castlm.core.nm import Pattern
from castlm.core.sparsify import SparseLayer
from castlm.models.architecture import backbone, replaced_forward
from castlm.models.loading import StoredWeights
from castlm.models.stored_layout import StoredLayout
from castlm.world import ALONE, World


def block_stack(model: nn.Module, layer_names: Iterable[str]) -> tuple[str, list[nn.Module]]:
    """The stack of blocks that holds the named layers: its name, such as `model.layers`, and its blocks in order."""
    blocks = map(block_name, layer_names)
    stacks = {None if block is None else block.rpartition(".")[0] for block in blocks}
    stack = stacks.pop()
    if stack is None or stacks:
        found = ", ".join(sorted(map(str, {stack, *stacks})))
        raise InputError(f"the layers lie in {found}, not in one stack of blocks: choose them with filter_fn")
    return stack, list(model.get_submodule(stack).children())


class MemoryModel:
    """A whole model in memory, which is changed in place.

    Args:
        layers: the layers that a start changes, by name; their blocks are the stack that the walk follows.
        pattern: the pattern to which they are pruned, bound to the model; None if they are not pruned.
        keeps_dense: keep a copy of the weights of these layers, in their new basis, from before the prune.
    """

    is_whole = True  # whether all blocks are in memory at the same time

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, SparseLayer],
        pattern: Pattern | None = None,
        keeps_dense: bool = False,
    ) -> None:
        self.model, self.layers, self.pattern, self.device = model, layers, pattern, model.device
        self.stack, self.blocks = block_stack(model, layers)
        self.keeps_dense = keeps_dense
        self.dense: dict[str, Tensor] = {}
        """The dense weights on the CPU, by the name of the layer."""

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Inside the context, a transformer block is in memory."""
        return nullcontext(self.blocks[index])

    def entering(self) -> AbstractContextManager[None]:
        """Inside the context, the backbone can be called."""
        return nullcontext()

    def keep_dense(self, layers: Mapping[str, SparseLayer]) -> None:
        """Copies the weights of layers before they are pruned, if `keeps_dense`."""
        if self.keeps_dense:
            self.dense |= {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}

    def finished(self, index: int) -> dict[str, Tensor]:
        """The weights of a finished block by their names in the model, and the copies of its dense weights."""
        dense = {f"{DENSE}{k}": v for k, v in self.dense.items() if k.startswith(f"{self.stack}.{index}.")}
        return dense | {name: p.detach().cpu().contiguous() for name, p in self._parameters(index).items()}

    def restore_(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Loads the weights that `finished` returned for a block."""
        self.dense |= {name.removeprefix(DENSE): t for name, t in tensors.items() if name.startswith(DENSE)}
        with torch.no_grad():
            for name, parameter in self._parameters(index).items():
                parameter.copy_(tensors[name])

    def _parameters(self, index: int) -> dict[str, nn.Parameter]:
        return {f"{self.stack}.{index}.{name}": p for name, p in self.blocks[index].named_parameters()}


DENSE = "dense:"
"""Before the names of layers whose dense weights are in the file of a block."""


class StoredModel:
    """A model on the meta device, with the files of its weights.

    Args:
        model: as `open_sharded` returns it: parameters on the meta device, buffers real.
        layers: the layers that a start changes, by name; their blocks are the stack that the walk follows.
        device: the device to which weights are read, in fp32.
        dtype: the dtype of the weights of finished blocks, which are laid out as in a file of the model. None is for
            training: they are as `MemoryModel` has them.
        pattern, keeps_dense: as of `MemoryModel`.
        world: the ranks that make the start, which read each block together: a weight is read by one of them.
    """

    is_whole = False

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: StoredWeights,
        layers: Mapping[str, SparseLayer],
        device: torch.device,
        dtype: torch.dtype | None,
        pattern: Pattern | None = None,
        keeps_dense: bool = False,
        world: World = ALONE,
    ) -> None:
        self.model, self.layers, self.pattern, self.world = model, layers, pattern, world
        self.keeps_dense = keeps_dense
        self.dense: dict[str, Tensor] = {}
        """The dense weights of the block at work, on the CPU, by the name of the layer."""
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.stack, self.blocks = block_stack(model, layers)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Holds one transformer block in memory; all ranks call it. Raises `InputError` for a weight that is not
        finite."""
        with ExitStack() as stack:
            self._read_(self.blocks[index], f"{self.stack}.{index}.", stack, world=self.world)
            yield self.blocks[index]

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Inside the context, the backbone can be called, for what enters each block beside hidden states.

        Weights outside the blocks are in memory all the time; plain embeddings, the largest of them, in their stored
        dtype. The first block is read for its call. The others return what enters them, in the form of the first
        block's output: masks and rotary tables do not depend on it, and no weight of theirs is read.
        """
        outputs: list[Any] = []  # of the first block, in its first call

        def first(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as of_call:
                self._read_(self.blocks[0], f"{self.stack}.0.", of_call)
                outputs.append(forward(*args, **kwargs))
            return outputs[0]

        def other(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden

        with ExitStack() as stack:
            self._read_outside_(stack)
            # The model's own forward runs its blocks.
            for index, block in enumerate(self.blocks):
                forward = other if index else partial(first, block.forward)
                stack.enter_context(replaced_forward(block, forward))
            yield

    def finished(self, index: int) -> dict[str, Tensor]:
        """The weights of a block in memory in `dtype`, with the copies of its dense weights."""
        block = self.blocks[index].named_parameters(prefix=f"{self.stack}.{index}")
        tensors = {name: parameter.detach().to(self.dtype) for name, parameter in block}
        if self.dtype is not None:  # Conv1D as (in, out), and experts one by one where a file has them so
            tensors = StoredLayout(self.model).to_stored(tensors)
        dense = {f"{DENSE}{name}": weight for name, weight in self.dense.items()}
        return dense | {name: value.contiguous().cpu() for name, value in tensors.items()}

    def keep_dense(self, layers: Mapping[str, SparseLayer]) -> None:
        """As of `MemoryModel`, for the block in memory."""
        if self.keeps_dense:
            self.dense = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}

    def restore_(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Does nothing: the walk does not need a finished block again."""

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """The stored weights outside the blocks by name, one at a time, as the files hold them."""
        for name in self.checkpoint.places:
            if not name.startswith(f"{self.stack}."):
                yield name, self._stored(name)

    def _read_outside_(self, stack: ExitStack) -> None:
        inside, pending = set(self.blocks), [backbone(self.model)]
        names = {module: name for name, module in self.model.named_modules()}
        while pending:
            module = pending.pop()
            plain_embedding = type(module) is nn.Embedding
            prefix = f"{names[module]}.".removeprefix(".")
            self._read_(module, prefix, stack, recurse=False, widen=not plain_embedding)
            if plain_embedding:
                # Rows are widened after they are looked up: a table (49152, 576) in bf16 stays 54 MiB.
                stack.callback(module.register_forward_hook(lambda _, __, output: output.float()).remove)
            pending += [child for child in module.children() if child not in inside]

    def _read_(
        self,
        module: nn.Module,
        prefix: str,
        stack: ExitStack,
        recurse: bool = True,
        widen: bool = True,
        world: World = ALONE,
    ) -> None:
        """Reads the parameters of a module, whose names in the model begin with `prefix`, until `stack` is closed.

        With several ranks, each reads some of them and gets the others.
        """
        for number, (name, parameter) in enumerate(list(module.named_parameters(recurse=recurse))):
            parent, _, leaf = name.rpartition(".")
            holder, owner = module.get_submodule(parent), number % world.size
            if world.rank == owner:
                value = self._stored(prefix + name).to(self.device, torch.float32 if widen else None).contiguous()
            else:
                value = torch.empty(parameter.shape, device=self.device)
            if world.size > 1:
                assert widen
                world.share_(value, owner)
            stack.callback(setattr, holder, leaf, parameter)  # back to the one on the meta device
            setattr(holder, leaf, nn.Parameter(value, requires_grad=False))

    def _stored(self, name: str) -> Tensor:
        value = self.checkpoint.read(name)
        check_finite(f"{name} of {self.checkpoint.source}", value)
        return value


Source = MemoryModel | StoredModel
"""The model of a start."""
