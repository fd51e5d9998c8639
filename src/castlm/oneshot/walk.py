"""Calibration text for one-shot pruning: its sequences, and what they feed to one transformer block after another.

What is alive at a time is the input of one block for all sequences, in the model's dtype; it does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.blocks import stack_name
from castlm.core.errors import InputError
from castlm.hardware import autocast

T = TypeVar("T")

# Tokens a forward pass: short sequences go together, as calling the operators costs too. On a CPU with 1 MiB of L2,
# 2,048 are a tenth slower than 1,024 (SmolLM2-135M): what passes between operators no longer fits the cache.
PASS_TOKENS_CPU = 1024
_PASS_TOKENS_ACCELERATOR = 8192


def block_stack(model: nn.Module, layer_names: Iterable[str]) -> tuple[str, list[nn.Module]]:
    """The stack that the named layers lie in: its name, as `model.layers`, and its blocks in order.

    Raises:
        InputError: layers outside numbered blocks, or in more than one stack.
    """
    stacks = set()
    for name in layer_names:
        stack = stack_name(name)
        if stack is None:
            raise InputError(f"{name} is in no transformer block: let filter_fn choose layers inside the blocks only")
        stacks.add(stack)
    if len(stacks) > 1:
        raise InputError(f"the layers lie in several stacks ({', '.join(sorted(stacks))}): choose one with filter_fn")
    (stack,) = stacks
    return stack, list(model.get_submodule(stack).children())


def layers_by_block(stack: str, num_blocks: int, layers: Mapping[str, T]) -> list[dict[str, T]]:
    """The layers of each block of `stack`, up to the last block that has any: what comes after it need not be run."""
    found = [{k: v for k, v in layers.items() if k.startswith(f"{stack}.{index}.")} for index in range(num_blocks)]
    while not found[-1]:
        found.pop()
    return found


def walk(
    model: PreTrainedModel,
    layers: Mapping[str, T],
    calibration: Tensor,
    images: Images = None,
    progress: Callable[[int, int], None] | None = None,
    precision: str = "fp32",
) -> Iterator[tuple[dict[str, T], BlockInputs]]:
    """The layers of one block after another, each with what enters it once the caller has changed those before.

    Args:
        calibration, images, precision: as for `BlockInputs`.
        progress: called with (blocks done, blocks in all).
    """
    stack, blocks = block_stack(model, layers)
    of_block = layers_by_block(stack, len(blocks), layers)
    inputs = BlockInputs(model, blocks, calibration, images=images, precision=precision)
    for done, inside in enumerate(of_block, 1):
        yield inside, inputs
        if done < len(of_block):
            inputs.advance()
        if progress is not None:
            progress(done, len(of_block))


class BlockCall(NamedTuple):
    """What a block is called with besides its hidden states: masks, rotary tables, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return _hidden_of(block(hidden, *self.args, **self.kwargs))


Images = Sequence[Mapping[str, Tensor]] | None
"""For each calibration sequence what the model's forward takes beside its tokens; None of a text without images."""


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass from within, once what was wanted of it is there."""


class BlockInputs:
    """The hidden states that enter the current block, and how each block is called.

    Taken from forward passes of the model itself, so that embeddings, masks (which can differ between blocks, as with
    sliding windows) and rotary tables are those of the model. The first pass goes through all blocks, and also checks
    that nothing but the hidden states runs from block to block; the others end at the first block.

    With images, each sequence has a pass of its own, through all blocks where rotary tables depend on its images
    (Qwen2-VL) or features of them are added to some tokens between blocks (Qwen3-VL).

    Args:
        calibration: int64, (num_sequences, seq_len).
        batches: where the hidden states are held, (batch, seq, hidden) each; a list if not given. What it holds already
            is what enters the block `index`.
        images: of each sequence.
        precision: "bf16" runs the blocks under autocast, which multiplies in bf16; what passes between them keeps its
            dtype.

    Raises:
        InputError: a model that passes more than hidden states between its blocks, or calls them otherwise than once
            each, in order, with the same arguments for every sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        calibration: Tensor,
        batches: MutableSequence[Tensor] | None = None,
        index: int = 0,
        images: Images = None,
        precision: str = "fp32",
    ) -> None:
        self.blocks, self.index, self.precision = blocks, index, precision
        self.batches: MutableSequence[Tensor] = [] if batches is None else batches
        self._passes: list[_Pass] = []  # of each batch; those of one shape share their calls
        self._adds: bool | None = None  # whether something is added between blocks, known after the first images
        is_filled = bool(self.batches)
        self._batch_size = 1 if images is not None else batch_size(calibration, model.device)
        if images is not None:
            assert not is_filled, "hidden states of images are not held on disk"
            for ids, of_sequence in zip(calibration.to(model.device).split(1), images, strict=True):
                of_device = {name: tensor.to(model.device) for name, tensor in of_sequence.items()}
                self._enter(model, ids, of_device, keep=True)
            return
        for ids in calibration.to(model.device).split(self._batch_size):
            if is_filled and self._passes and len(ids) == self._batch_size:  # one pass of each shape, for the calls
                self._passes.append(self._passes[0])
            else:
                self._enter(model, ids, None, keep=not is_filled)

    def __iter__(self) -> Iterator[Tensor]:
        """(batch, seq, hidden) each."""
        return iter(self.batches)

    def call(self, batch: int) -> BlockCall:
        """How the current block is called with a batch, counted from 0."""
        return self._passes[batch].calls[self.index]

    def run(self, hidden: Tensor, batch: int, block: nn.Module | None = None) -> Tensor:
        """The current block, or a `block` in its place, on one batch."""
        with autocast(hidden.device, self.precision):
            output = self.call(batch).run(block or self.blocks[self.index], hidden)
        return output.to(hidden.dtype)

    def advance(self, outputs: Sequence[Tensor] | None = None) -> None:
        """Puts what enters the next block for each batch in its place, and goes on to it.

        Args:
            outputs: what the current block gives, where that is known; else the block runs.
        """
        for i, hidden in enumerate(self.batches):
            self.batches[i] = self.entering_next(self.run(hidden, i) if outputs is None else outputs[i], i)
        self.index += 1

    def entering_next(self, output: Tensor, batch: int) -> Tensor:
        """What enters the next block where the current one gives `output`."""
        added = self._passes[batch].added.get(self.index + 1)
        if added is None:
            return output
        entering = output.clone()
        entering[0, added.tokens] += added.values
        return entering

    def _enter(self, model: PreTrainedModel, ids: Tensor, images: dict[str, Tensor] | None, keep: bool) -> None:
        passed_on: list[Tensor] = []  # what the last block called gave back
        here = _Pass([], {})
        first = self._passes[0].calls if self._passes else None
        is_of_another_shape = len(ids) != self._batch_size

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split_call(args, kwargs)
            in_order = index == len(here.calls)
            if in_order and index > 0 and not _same(hidden, output := passed_on.pop()):
                added = None if images is None else _added(output, hidden)
                in_order = added is not None
                if added is not None:
                    here.added[index] = added
            if not in_order:
                raise InputError(
                    f"{type(model).__name__} does more between its blocks than pass hidden states on: "
                    "pruning block by block cannot follow it, use magnitude without calibration"
                )
            if index == 0:
                is_like_first = first is not None and _same(call, first[0])
                if not (first is None or is_like_first or is_of_another_shape) and images is None:
                    raise InputError(
                        f"the blocks of {type(model).__name__} take arguments that change with the text: "
                        "pruning block by block cannot follow it, use magnitude without calibration"
                    )
                if keep:
                    self.batches.append(hidden)
                if is_like_first and (not images or self._adds is False):
                    raise StopForward
            here.calls.append(call)

        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                hooks.enter_context(
                    block.register_forward_pre_hook(
                        lambda _, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
                    )
                )
                hooks.enter_context(block.register_forward_hook(lambda _, __, out: passed_on.append(_hidden_of(out))))
            with suppress(StopForward):
                model.base_model(input_ids=ids, use_cache=False, **(images or {}))
        if not here.calls:  # as in the first pass
            assert first is not None
            self._passes.append(_Pass(first, {}))
            return
        if images:
            self._adds = bool(here.added)
        if len(here.calls) < len(self.blocks):
            raise InputError(f"{type(model).__name__} runs only {len(here.calls)} of its {len(self.blocks)} blocks")
        is_same = first is not None and _same(here.calls, first)  # then one copy of the tables is kept
        self._passes.append(here._replace(calls=first) if is_same else here)


class _Added(NamedTuple):
    """What a model adds to the hidden states of one sequence between two blocks."""

    tokens: Tensor
    """int64, (num_tokens,)."""
    values: Tensor
    """(num_tokens, hidden)."""


class _Pass(NamedTuple):
    """A forward pass of a batch: how each block was called, and what was added before some, by their number."""

    calls: list[BlockCall]
    added: dict[int, _Added]


def _added(output: Tensor, hidden: Tensor) -> _Added | None:
    """What was added between two blocks to some tokens of a sequence; None if all were changed, as by a scaling."""
    difference = hidden - output
    changed = (difference[0] != 0).any(dim=-1)
    if bool(changed.all()):
        return None
    tokens = changed.nonzero().flatten()
    return _Added(tokens, difference[0, tokens])


def batch_size(calibration: Tensor, device: torch.device) -> int:
    """Sequences of a forward pass: about the same number in each of as few passes as possible, fewer in the last."""
    num_sequences, seq_len = calibration.shape
    pass_tokens = PASS_TOKENS_CPU if device.type == "cpu" else _PASS_TOKENS_ACCELERATOR
    num_passes = math.ceil(num_sequences / max(1, pass_tokens // seq_len))
    return math.ceil(num_sequences / num_passes)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _hidden_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _same(a: Any, b: Any) -> bool:
    """Equal in every tensor they hold; objects of other types are not looked into."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b)
