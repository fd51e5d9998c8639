"""The walk of a start over the transformer blocks, and the hidden states that enter them.

For each block in turn, the caller changes it in memory, then its outputs become the inputs of the next one:

    states    inputs of block 0 -> [block 0, pruned] -> inputs of block 1 -> [block 1, pruned] -> ...
    dense     inputs of block 0 -> [block 0, dense]  -> outputs to learn  -> [block 1, dense]  -> ...

The second row exists only where blocks are reconstructed. Memory holds the inputs of one block for all sequences, in
the model's dtype; it does not grow with depth. Of several ranks, each holds those of its own batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.sparsify import SparseLayer
from castlm.data.calibration import CalibrationText, Extras
from castlm.hardware import autocast, available_memory
from castlm.models.architecture import backbone, replaced_forward
from castlm.oneshot.folder import HiddenStates, StartFolder
from castlm.oneshot.ranks import Division
from castlm.oneshot.routed import Seen
from castlm.oneshot.source import Source
from castlm.say import Progress, silent
from castlm.world import ALONE, World

# Tokens per forward pass: short sequences are batched, because calls of operators have a cost. On a CPU with 1 MiB of
# L2, 2,048 are a tenth slower than 1,024 (SmolLM2-135M): tensors between operators no longer fit in the cache.
PASS_TOKENS_CPU = 1024
_PASS_TOKENS_ACCELERATOR = 8192
BACKWARD_TOKENS = 2048
"""Tokens of a backward pass of the whole model, for scores by gradients; at least one sequence."""


@dataclass
class Visit:
    """One transformer block of a walk, in memory, with its inputs from the changed blocks before it."""

    source: Source
    index: int
    inside: dict[str, SparseLayer]
    """The layers of the block that the start changes, by name."""
    inputs: BlockInputs | None
    """None without calibration text, and after the last block with layers that the start changes."""
    dense_outputs: Sequence[Tensor]
    """The outputs of the block in the dense model for each batch; empty unless `follows_dense`."""
    world: World = ALONE
    """The ranks that make the start, of which this is one."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that steps leave in the file of the block beside its weights, by names that no weight has."""
    seen: Seen = field(default_factory=list)
    """The inputs of all layers `inside` with SparseGPT's Hessians, whole, which one step has collected for the next. A
    step that changes what enters a layer empties it."""


def walk(
    source: Source,
    text: CalibrationText | None,
    *,
    follows_dense: bool = False,
    folder: StartFolder | None = None,
    results: Callable[[], dict[str, Any]] = dict,
    progress: Progress = silent,
    world: World = ALONE,
) -> Iterator[Visit]:
    """Yields one transformer block after another, which the caller may change before it asks for the next.

    With a `folder`, each finished block is recorded there, and the walk begins after the blocks that an earlier process
    has finished.

    Args:
        follows_dense: also run the text through the dense blocks, each before it is changed.
        results: returns the results of the finished blocks, for the record.
        progress: called with (finished blocks, all blocks): first with those of an earlier process.
        world: the ranks that walk together; each must change a block in the same way.
    """
    num_blocks = len(source.blocks)
    layers_of = [
        {name: layer for name, layer in source.layers.items() if name.startswith(f"{source.stack}.{index}.")}
        for index in range(num_blocks)
    ]
    last = max(index for index, inside in enumerate(layers_of) if inside)  # behind it nothing reads text
    first = 0 if folder is None else folder.done
    writing = nullcontext if folder is None else folder.writing
    progress(first, num_blocks)
    inputs = None
    if text is not None and first <= last:
        states = _states(source, text, folder, world, "hidden")
        with writing(), source.entering():
            inputs = BlockInputs(
                source.model, source.blocks, text.sequences, states, first, text.extras, text.precision, world
            )
        if follows_dense:
            inputs.dense = _states(source, text, folder, world, "dense")
            # Nothing is pruned before block 0, so that both rows of the drawing above begin with the same states.
            if not len(inputs.dense):  # before the first block, the inputs are the dense model's too
                inputs.dense.extend(inputs.states)
    for index in range(first):
        assert folder is not None
        if source.is_whole:
            # A model in memory gets the weights back; of one on disk, the block's file is already their place.
            source.restore_(index, folder.read_block(index))
    for index in range(first, num_blocks):
        if index > last:
            inputs = None
        with source.block(index), writing():
            dense_outputs: Sequence[Tensor] = ()
            # Before the yield, as the steps change the block that these outputs come from.
            if inputs is not None and follows_dense:
                dense_outputs = inputs.dense_outputs()
            visit = Visit(source, index, layers_of[index], inputs, dense_outputs, world)
            yield visit
            # every rank has the same block
            if folder is not None and world.rank == 0:
                folder.write_block(index, source.finished(index) | visit.beside)
            if inputs is not None and index < last:
                inputs.advance()
        if folder is not None:
            streams = [] if inputs is None else inputs.streams
            # The block is finished only with this record. After a kill before it, the block is made again from its
            # inputs, which are deleted last.
            folder.record(index + 1, results(), streams, has_next=index < last)
        progress(index + 1, num_blocks)


def _states(
    source: Source, text: CalibrationText, folder: StartFolder | None, world: World, name: str
) -> MutableSequence[Tensor]:
    """The container for the hidden states of own batches: files in `folder` with the next block's inputs, or a list.

    For a GPU, the batches also stay in the host's memory if the whole text, which the ranks of a machine may share,
    takes at most half of what is free.
    """
    if folder is None:
        return []
    # images differ in size from sequence to sequence
    size = 1 if text.extras is not None else batch_size(text.sequences, source.device)
    division = Division(math.ceil(len(text) / size), world)
    shape = size, text.sequences.shape[1], source.model.config.get_text_config().hidden_size
    dtype = source.model.dtype if source.is_whole else torch.float32
    lengths = {part: len(division.parts[part]) for part in division.own}
    of_text = dtype.itemsize * text.sequences.numel() * shape[-1]
    fits = source.device.type == "cuda" and 2 * of_text <= available_memory()
    pinned: dict[int, tuple[int, Tensor]] | None = {} if fits else None
    of_folder = folder.path, name, lengths, shape, dtype, source.device, folder.done
    return HiddenStates(*of_folder, is_full=folder.done > 0, pinned=pinned)


class BlockCall(NamedTuple):
    """The arguments of a block besides its hidden states: masks, rotary tables, flags."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return _hidden_of(block(hidden, *self.args, **self.kwargs))


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass from a hook, once the rest of the pass is not needed."""


class BlockInputs(Sequence[Tensor]):
    """The inputs of the current block, in batches (batch, seq, hidden), and the other arguments of each block.

    Of several ranks, each has its own batches, counted from 0; rank 0 has the first one of the text.

    Forward passes of the model itself provide them, so that embeddings, masks (which can differ between blocks, as with
    sliding windows) and rotary tables are right. The first pass runs all blocks, and checks that only hidden states
    pass from block to block; later passes stop at the first block. A sequence with extras, such as images, has a pass
    of its own, which runs all blocks if rotary tables depend on the extras (Qwen2-VL), or if the model adds image
    features to some tokens between blocks (Qwen3-VL).

    Args:
        calibration: int64, (num_sequences, seq_len).
        states: the container for the outputs of the block before the current one; by default a list. If it is not
            empty, it holds the inputs of block `index`.
        extras: for each sequence, the further arguments of the model's forward.
        precision: "bf16" runs the blocks under autocast, which multiplies in bf16; hidden states keep their dtype.
        world: the ranks that share the text.

    Attributes:
        division: the parts of the text, and the batches of this rank.

    Raises:
        InputError: a model that passes more than hidden states between its blocks, or does not call each block once, in
            order, with the same arguments for every sequence.
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
        world: World = ALONE,
    ) -> None:
        self.blocks, self.block_index, self.precision, self.device = blocks, index, precision, model.device
        self.states: MutableSequence[Tensor] = [] if states is None else states
        self.dense: MutableSequence[Tensor] = []
        """The outputs of the block before the current one in the dense model; empty if it is not followed."""
        self.num_sequences = len(calibration)
        self._passes: list[_Pass] = []  # one for each batch; batches of one shape share their calls
        self._outputs: dict[nn.Module, list[list[Any]]] = {}  # of `keep_outputs`: for each batch, one for each call
        self.seen_outputs: Tensor | None = None
        """The outputs of the current block for the first batch, in the latest pass that collected statistics."""
        self._adds: bool | None = None  # whether the model adds to tokens between blocks, known after the first extras
        is_filled = bool(self.states)
        self._batch_size = 1 if extras is not None else batch_size(calibration, model.device)
        batches = calibration.split(self._batch_size)
        self.division = Division(len(batches), world)
        for number in self.division.batches:
            ids, beside = batches[number].to(self.device), None if extras is None else extras[number]
            # A start that continues has its inputs on disk: the calls of one pass are all that it needs.
            if beside is None and is_filled and self._passes and len(ids) == self._batch_size:
                self._passes.append(self._passes[0])  # the calls of one pass serve all batches of its shape
            elif beside is None:
                self._enter(model, ids, None, keep=not is_filled)
            else:
                on_device = {name: tensor.to(self.device) for name, tensor in beside.items()}
                self._enter(model, ids, on_device, keep=not is_filled)

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, batch: Any) -> Any:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        return self._entering(self.states[batch], batch)

    def call(self, batch: int) -> BlockCall:
        """The further arguments of the current block for a batch, counted from 0."""
        return self._passes[batch].calls[self.block_index]

    def first_outputs(self, *, is_unchanged: bool = False) -> Tensor:
        """The outputs of the current block for the first batch, without autocast.

        Args:
            is_unchanged: the block is as it was when its statistics were collected, so `seen_outputs` will do.
        """
        if is_unchanged and self.seen_outputs is not None and self.precision == "fp32":
            return self.seen_outputs
        return self.call(0).run(self.blocks[self.block_index], self[0])

    def seconds_per_token(self) -> float:
        """The time of a forward pass of the current block, for each token of the first batch."""
        started = time.perf_counter()
        output = self.run(self[0], 0)
        output.flatten()[0].item()  # waits for an accelerator
        return (time.perf_counter() - started) / output.shape[:-1].numel()

    def run(self, hidden: Tensor, batch: int) -> Tensor:
        """The output of the current block for the hidden states (batch, seq, hidden) of a batch."""
        with autocast(hidden.device, self.precision), ExitStack() as replaced:
            for module, outputs in self._outputs.items():
                replaced.enter_context(_replayed(module, outputs[batch]))
            output = self.call(batch).run(self.blocks[self.block_index], hidden)
        return output.to(hidden.dtype)

    def keep_outputs(self, modules: Iterable[nn.Module]) -> None:
        """Keeps the outputs of modules of the current block in memory, so that later passes over a batch skip them.

        Neither these modules nor what runs before them in the block may change before `advance`.
        """
        for module in modules:
            self._outputs.setdefault(module, [[] for _ in self._passes])

    def dense_outputs(self) -> Sequence[Tensor]:
        """The outputs of the current block, still dense, on the dense model's hidden states, which they replace."""
        for batch, hidden in enumerate(self.dense):
            self.dense[batch] = self.run(self._entering(hidden, batch), batch)
        return self.dense.of_next_block() if isinstance(self.dense, HiddenStates) else self.dense

    def leaving(self, source: Source) -> Iterator[Tensor]:
        """The hidden states that the output head reads, batch by batch: the outputs of the current block, which is the
        last one, behind the model's last norm.
        """
        forward = self.blocks[self.block_index].forward  # of the block in memory
        with source.entering():
            for batch in range(len(self)):
                call = self.call(batch)
                with autocast(self.device, self.precision):
                    output = forward(self[batch], *call.args, **call.kwargs)
                tokens = torch.zeros(_hidden_of(output).shape[:2], dtype=torch.int64, device=self.device)
                with ExitStack() as replaced:
                    for block in self.blocks:  # all return that output, so the tokens do not matter
                        replaced.enter_context(replaced_forward(block, lambda *_, output=output, **__: output))
                    yield backbone(source.model)(input_ids=tokens, use_cache=False)[0]

    def forget_outputs(self) -> None:
        """Ends `keep_outputs`: later passes run all modules of the current block again."""
        self._outputs.clear()

    def advance(self) -> None:
        """Runs the current block on each batch, and moves to the next."""
        for batch, hidden in enumerate(self):
            self.states[batch] = self.run(hidden, batch)
        self.forget_outputs()
        self.seen_outputs = None
        self.block_index += 1

    @property
    def streams(self) -> list[HiddenStates]:
        """The hidden states on disk."""
        return [states for states in (self.states, self.dense) if isinstance(states, HiddenStates)]

    def _entering(self, output: Tensor, batch: int) -> Tensor:
        """The input of the current block, given the `output` of the block before it."""
        if self.block_index not in self._passes[batch].added:
            return output
        tokens, values = self._passes[batch].added[self.block_index]
        entering = output.clone()
        # the only sequence of its batch; Qwen3-VL adds image features to (num_image_tokens, hidden)
        entering[0, tokens] += values
        return entering

    def _enter(self, model: PreTrainedModel, ids: Tensor, extras: dict[str, Tensor] | None, keep: bool) -> None:
        """Runs the model on a batch, and adds its pass; with `keep`, also what enters the first block."""
        first = self._passes[0].calls if self._passes else None
        watch = _BlockHooks(
            type(model).__name__,
            first,
            states=self.states if keep else None,
            may_add=extras is not None,
            is_like_others=extras is None and len(ids) == self._batch_size,
            # A pass with images runs to its end until it is known whether the model adds features between blocks.
            may_stop=not extras or self._adds is False,
        )
        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                before = partial(watch.before, index)
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(block.register_forward_hook(watch.after))
            with suppress(StopForward):
                backbone(model)(input_ids=ids, use_cache=False, **(extras or {}))
        self._passes.append(watch.result(len(self.blocks)))
        if extras and not watch.has_stopped:
            self._adds = bool(watch.added)


@contextmanager
def _replayed(module: nn.Module, outputs: list[Any]) -> Iterator[None]:
    """Inside the context, the calls of `module` return `outputs`, one after another; a call beyond them is added."""
    forward, numbers = module.forward, count()

    def replay(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        if number == len(outputs):
            outputs.append(forward(*args, **kwargs))  # the first pass over the batch
        return outputs[number]

    with replaced_forward(module, replay):
        yield


class _Pass(NamedTuple):
    """A forward pass of a batch."""

    calls: list[BlockCall]  # the call of each block
    added: dict[int, tuple[Tensor, Tensor]]
    """Additions to the hidden states of the only sequence before some blocks, by the block's number: tokens int64
    (num_tokens,) and values (num_tokens, hidden)."""


@dataclass
class _BlockHooks:
    """Hooks on the blocks of a model during one forward pass, which record the calls of the blocks."""

    model: str
    """The class of the model, for messages."""
    first: list[BlockCall] | None
    """The calls of the first pass; None in that pass."""
    states: MutableSequence[Tensor] | None
    """Takes what enters the first block; None if it is known."""
    may_add: bool
    """The model may add to some tokens between blocks, as images are to the only sequence of a batch."""
    is_like_others: bool
    """The arguments of the blocks must be the first pass's."""
    may_stop: bool
    """The pass can end at the first block if its arguments are the first pass's."""
    calls: list[BlockCall] = field(default_factory=list)
    added: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """As in `_Pass`."""
    output: Tensor | None = None
    """The output of the block that ran last."""
    has_stopped: bool = False

    def before(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before block `index`."""
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")  # families differ in how they pass it
        # Block 3 must be the fourth call of a pass; weights shared between blocks, or a loop over them, break the walk.
        if index != len(self.calls):
            raise self.refusal("calls a block twice, or goes back between its blocks")
        self.calls.append(BlockCall(args[1:], rest))
        if index == 0:
            if self.states is not None:
                self.states.append(hidden)
            self._compare_with_first()
        # What enters block 3 must be what left block 2, because the walk hands on nothing else.
        elif not _same(hidden, self.output):
            self._note_addition(index, hidden)

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        """Runs after each block."""
        self.output = _hidden_of(output)

    def _compare_with_first(self) -> None:
        if self.first is None:
            return
        is_same = _same(self.calls[0], self.first[0])
        if self.is_like_others and not is_same:
            raise self.refusal("gives its blocks arguments that change with the text")
        if is_same and self.may_stop:
            self.has_stopped = True
            raise StopForward

    def _note_addition(self, index: int, hidden: Tensor) -> None:
        assert self.output is not None
        tokens = (hidden != self.output)[0].any(dim=-1).nonzero().flatten()
        # Images are added to some tokens; a scaling changes all.
        if not self.may_add or len(tokens) == hidden.shape[1]:
            raise self.refusal("changes hidden states between its blocks")
        self.added[index] = tokens, (hidden - self.output)[0, tokens]

    def result(self, num_blocks: int) -> _Pass:
        """The pass, once it has ended; equal calls of the first pass are held once."""
        if self.first is not None and (self.has_stopped or _same(self.calls, self.first)):
            return _Pass(self.first, self.added)
        if len(self.calls) < num_blocks:
            raise self.refusal(f"runs only {len(self.calls)} of its {num_blocks} blocks")
        return _Pass(self.calls, self.added)

    def refusal(self, why: str) -> InputError:
        return InputError(
            f"{self.model} {why}, which pruning block by block cannot follow: use magnitude without calibration"
        )


def batch_size(calibration: Tensor, device: torch.device) -> int:
    """Sequences per forward pass, for the fewest passes of about equal size; the last may have fewer."""
    num_sequences, seq_len = calibration.shape
    pass_tokens = PASS_TOKENS_CPU if device.type == "cpu" else _PASS_TOKENS_ACCELERATOR
    # 64 sequences of 512 tokens on a CPU: 1024 // 512 = 2 a pass, 32 passes. 63 would be 32 passes of 2, the last of 1.
    num_passes = math.ceil(num_sequences / max(1, pass_tokens // seq_len))
    return math.ceil(num_sequences / num_passes)


def _hidden_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


_COMPARED = bool, int, float, complex, str, bytes, torch.dtype, torch.device


def _same(a: Any, b: Any) -> bool:
    """Equal in every tensor and every plain value that they hold; other objects need only be of one type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)  # the rotary tables are one tensor in most models
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (not isinstance(a, _COMPARED) or a == b)
