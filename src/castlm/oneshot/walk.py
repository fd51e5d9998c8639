"""The walk of a start over the transformer blocks, and what the calibration text feeds to one after another.

What is alive at a time is the input of one block for all sequences, in the model's dtype; it does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer
from castlm.hardware import autocast
from castlm.oneshot.folder import HiddenStates, StartFolder
from castlm.oneshot.source import MemoryModel, StoredModel, layers_by_block

# Tokens a forward pass: short sequences go together, as calling the operators costs too. On a CPU with 1 MiB of L2,
# 2,048 are a tenth slower than 1,024 (SmolLM2-135M): what passes between operators no longer fits the cache.
PASS_TOKENS_CPU = 1024
_PASS_TOKENS_ACCELERATOR = 8192


class Step(NamedTuple):
    """One transformer block of a walk, in memory, with what enters it once the blocks before it are changed."""

    index: int
    inside: dict[str, SparseLayer]
    """Its layers that the walk is about."""
    inputs: BlockInputs | None
    """None without calibration text, and behind the last block that has such layers."""
    dense_outputs: Sequence[Tensor]
    """What the block gives in the dense model for each batch, where that is followed."""


def walk(
    source: MemoryModel | StoredModel,
    layers: Mapping[str, SparseLayer],
    calibration: Tensor | None,
    *,
    extras: Extras = None,
    precision: str = "fp32",
    follows_dense: bool = False,
    folder: StartFolder | None = None,
    results: Callable[[], dict[str, Any]] = dict,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Step]:
    """Yields one transformer block after another, which the caller may change before it asks for the next.

    With a `folder`, each finished block is recorded there, and the walk begins behind those that an earlier process has
    finished.

    Args:
        calibration, extras, precision: as for `BlockInputs`.
        follows_dense: runs the text through the dense blocks too, each before it is changed.
        results: what the record holds about the finished blocks.
        progress: called with (blocks done, blocks in all).
    """
    num_blocks = len(source.blocks)
    of_block = layers_by_block(source.stack, num_blocks, layers)
    last = max(index for index, inside in enumerate(of_block) if inside)
    first = 0 if folder is None else folder.done
    inputs = None
    if calibration is not None and first <= last:
        states = [_states(source, calibration, extras, folder, name) for name in ("hidden", "dense")]
        with nullcontext() if folder is None else folder.writing(), source.entering():
            inputs = BlockInputs(source.model, source.blocks, calibration, states[0], first, extras, precision)
        if follows_dense:
            inputs.follow_dense(states[1])
    for index in range(first):
        assert folder is not None
        source.restore_(index, folder.read_block(index))
    for index in range(first, num_blocks):
        inputs = inputs if index <= last else None
        with source.block(index), nullcontext() if folder is None else folder.writing():
            yield Step(index, of_block[index], inputs, inputs.dense_outputs() if inputs and follows_dense else ())
            if folder is not None:
                folder.write_block(index, source.finished(index))
            if inputs is not None and index < last:
                inputs.advance()
        if folder is not None:
            streams = [] if inputs is None else inputs.streams
            folder.record(index + 1, results(), streams, has_next=index < last)
        progress(index + 1, num_blocks)


def _states(
    source: MemoryModel | StoredModel, calibration: Tensor, extras: Extras, folder: StartFolder | None, name: str
) -> MutableSequence[Tensor]:
    """Where hidden states are held: on disk, with those that enter the next block to do, or in a list."""
    if folder is None:
        return []
    size = 1 if extras is not None else batch_size(calibration, source.device)
    shape = size, calibration.shape[1], source.model.config.get_text_config().hidden_size
    dtype = source.model.dtype if isinstance(source, MemoryModel) else torch.float32
    num_batches = math.ceil(len(calibration) / size) if folder.done else 0
    return HiddenStates(folder.path, name, shape, dtype, source.device, folder.done, num_batches)


class BlockCall(NamedTuple):
    """What a block is called with besides its hidden states: masks, rotary tables, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return _hidden_of(block(hidden, *self.args, **self.kwargs))


Extras = Sequence[Mapping[str, Tensor]] | None
"""For each calibration sequence what the model's forward takes beside its tokens; None where it takes tokens alone."""


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass from within, once what was wanted of it is there."""


class BlockInputs(Sequence[Tensor]):
    """The hidden states that enter the current block, a batch (batch, seq, hidden) each, and how each block is called.

    Taken from forward passes of the model itself, so that embeddings, masks (which can differ between blocks, as with
    sliding windows) and rotary tables are those of the model. The first pass goes through all blocks, and also checks
    that nothing but the hidden states runs from block to block; the others end at the first block.

    Sequences with extras, as images, have a pass of their own, through all blocks where rotary tables depend on them
    (Qwen2-VL) or features of them are added to some tokens between blocks (Qwen3-VL).

    Args:
        calibration: int64, (num_sequences, seq_len).
        states: where the outputs of the block before the current one are held; a list if not given. What it holds
            already enters the block `index`.
        extras: for each sequence what the model's forward takes beside its tokens.
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
        states: MutableSequence[Tensor] | None = None,
        index: int = 0,
        extras: Extras = None,
        precision: str = "fp32",
    ) -> None:
        self.blocks, self.index, self.precision = blocks, index, precision
        self.states: MutableSequence[Tensor] = [] if states is None else states
        self.dense: MutableSequence[Tensor] = []
        """The same of the dense model, where it is followed."""
        self.num_sequences = len(calibration)
        self._passes: list[_Pass] = []  # of each batch; those of one shape share their calls
        self._adds: bool | None = None  # whether something is added between blocks, known after the first extras
        is_filled = bool(self.states)
        self._batch_size = 1 if extras is not None else batch_size(calibration, model.device)
        batches = calibration.to(model.device).split(self._batch_size)
        for ids, beside in zip(batches, extras or [None] * len(batches), strict=True):
            if beside is None and is_filled and self._passes and len(ids) == self._batch_size:
                self._passes.append(self._passes[0])  # one pass of each shape, for the calls
            elif beside is None:
                self._enter(model, ids, None, keep=not is_filled)
            else:
                on_device = {name: tensor.to(model.device) for name, tensor in beside.items()}
                self._enter(model, ids, on_device, keep=not is_filled)

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, batch: Any) -> Any:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return self._entering(self.states[batch], batch)

    def call(self, batch: int) -> BlockCall:
        """How the current block is called with a batch, counted from 0."""
        return self._passes[batch].calls[self.index]

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """The output of the current block for the hidden states (batch, seq, hidden) of a batch."""
        with autocast(hidden.device, self.precision):
            output = self.call(batch).run(self.blocks[self.index], hidden)
        return output.to(hidden.dtype)

    def follow_dense(self, states: MutableSequence[Tensor]) -> None:
        """Holds what enters the current block in the dense model in `states`, unless it is there already."""
        self.dense = states
        if not len(states):
            states.extend(self.states)

    def dense_outputs(self) -> Sequence[Tensor]:
        """What the current block, still dense, gives for each batch of the dense model; it takes the inputs' place."""
        for batch, hidden in enumerate(self.dense):
            self.dense[batch] = self.run(self._entering(hidden, batch), batch)
        return self.dense.of_next_block() if isinstance(self.dense, HiddenStates) else self.dense

    def advance(self) -> None:
        """Runs the current block on each batch, and moves to the next."""
        for batch, hidden in enumerate(self):
            self.states[batch] = self.run(hidden, batch)
        self.index += 1

    @property
    def streams(self) -> list[HiddenStates]:
        """The hidden states that are on disk."""
        return [states for states in (self.states, self.dense) if isinstance(states, HiddenStates)]

    def _entering(self, output: Tensor, batch: int) -> Tensor:
        """What enters the current block where the one before it has given `output`."""
        added = self._passes[batch].added.get(self.index)
        if added is None:
            return output
        entering = output.clone()
        entering[0, added.tokens] += added.values
        return entering

    def _enter(self, model: PreTrainedModel, ids: Tensor, extras: dict[str, Tensor] | None, keep: bool) -> None:
        passed_on: list[Tensor] = []  # what the last block called gave back
        here = _Pass([], {})
        first = self._passes[0].calls if self._passes else None
        is_of_another_shape = len(ids) != self._batch_size

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split_call(args, kwargs)
            in_order = index == len(here.calls)
            if in_order and index > 0 and not _same(hidden, output := passed_on.pop()):
                added = None if extras is None else _added(output, hidden)
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
                if not (first is None or is_like_first or is_of_another_shape) and extras is None:
                    raise InputError(
                        f"the blocks of {type(model).__name__} take arguments that change with the text: "
                        "pruning block by block cannot follow it, use magnitude without calibration"
                    )
                if keep:
                    self.states.append(hidden)
                if is_like_first and (not extras or self._adds is False):
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
                model.base_model(input_ids=ids, use_cache=False, **(extras or {}))
        if not here.calls:  # as in the first pass
            assert first is not None
            self._passes.append(_Pass(first, {}))
            return
        if extras:
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
