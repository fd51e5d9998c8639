"""Shards a model with FSDP2, which splits rows and so keeps groups of m whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import PreTrainedModel

from castlm.core.blocks import is_tower
from castlm.core.rounding import rounded_layers
from castlm.core.shards import local
from castlm.core.sparsify import SparseLayer, transformer_blocks
from castlm.world import World


def shard_(module: nn.Module, world: World, precision: str = "fp32") -> None:
    """Shards every transformer block of `module`, untied embeddings and heads, then the rest, in place.

    Does nothing in a single process. A head is gathered in its forward pass, and elsewhere by `gathered`.

    Parametrize first: `fully_shard` before that fails. A vision tower is sharded with the rest, which is gathered in
    every forward pass: a rank without an image in its batch does not call the tower, and the others would wait.

    Args:
        precision: the precision of the forward pass. Under "bf16", the fp32 linear layers of the blocks are gathered in
            bf16, as the embeddings and heads of `separate_ends`, and the forward pass must run under autocast; all
            other parameters are gathered as they are stored. Gradients are summed in fp32.
    """
    if world.mesh is None:
        return
    for block in sharded_blocks(module):
        if precision == "bf16" and is_gathered_narrow(block):
            wide = beside_linears(block)
            if wide:
                # A group of their own for norms and scales, gathered in fp32; the matrices of the block follow in bf16.
                fully_shard(wide, mesh=world.mesh)
            fully_shard(block, mesh=world.mesh, mp_policy=_NARROW)
        else:
            fully_shard(block, mesh=world.mesh)
        if may_skip_modules(block):  # else ranks that called different experts would sum gradients of different ones
            assert isinstance(block, FSDPModule)
            block.set_reduce_scatter_unused_params(True)
    for end in separate_ends(module):
        narrow = precision == "bf16" and any(p.dtype == torch.float32 for p in end.parameters())
        fully_shard(end, mesh=world.mesh, mp_policy=_NARROW_END if narrow else MixedPrecisionPolicy())
    fully_shard(module, mesh=world.mesh)  # the root: what is left, such as the last norm and tied ends
    assert isinstance(module, FSDPModule)


def separate_ends(module: nn.Module) -> list[nn.Module]:
    """The input embeddings and output heads that are gathered only while they are used, of models that do not tie them.

    In a 70B model with 128,000 tokens they are 8.4 GB in fp32, and 4.2 GB of the teacher in bf16.
    """
    ends: dict[nn.Module, None] = {}
    for model in module.modules():
        if not isinstance(model, PreTrainedModel) or model.base_model is model:
            continue
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(embeddings) is nn.Embedding and type(head) is nn.Linear and embeddings.weight is not head.weight:
            ends |= {embeddings: None, head: None}
    return list(ends)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside the context, the parameters of a module with a shard of its own are whole, outside of its forward pass."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def sharded_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks that `shard_` shards one by one."""
    return [block for name, block in transformer_blocks(module).items() if not is_tower(name)]


def free_blocks_(module: nn.Module) -> None:
    """Frees the weights of sharded transformer blocks that are never called again.

    FSDP2 keeps references to the tensors, so their storage is resized to 0. Parameters outside the blocks stay, because
    the root gathers them.
    """
    for block in sharded_blocks(module):
        for parameter in block.parameters():
            local(parameter).untyped_storage().resize_(0)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard_` has sharded `module`; otherwise each rank holds all of it."""
    return isinstance(module, FSDPModule)


def reshard_(module: nn.Module) -> None:
    """Frees the whole parameters of the root, which FSDP leaves there after a forward pass."""
    if isinstance(module, FSDPModule):
        module.reshard()


def sum_over_replicas_(module: nn.Module, now: bool) -> None:
    """Sets whether backward passes of a sharded module sum the gradients over its replicas.

    If not, FSDP2 keeps the sums of each replica until a pass that does, so that accumulated batches need one such sum.
    Experts in a list always sum: each batch may reach different ones, and FSDP2 would add up the gradients that it
    keeps as if they belonged to the same experts.
    """
    if not isinstance(module, FSDPModule):
        return
    blocks = transformer_blocks(module).values()
    module.set_requires_all_reduce(now or any(map(may_skip_modules, blocks)))


def average_gradients_(module: nn.Module, parameters: Iterable[Tensor], world: World) -> None:
    """Averages the gradients over ranks that each hold all of `module`. FSDP does it for a sharded module.

    Args:
        parameters: the parameters, in the same order on all ranks; frozen ones are skipped.
    """
    if world.mesh is None or is_sharded(module):
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    # One sum of all gradients: a collective for each tensor would cost its latency some hundred times.
    together = world.sum(torch.cat([gradient.flatten() for gradient in gradients])) / world.size
    for parameter, part in zip(trained, together.split([gradient.numel() for gradient in gradients])):
        parameter.grad = part.view_as(parameter)


# Inputs are not cast: FSDP would round the residual stream, which autocast leaves in fp32.
_NARROW = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


# The embeddings' output starts the residual stream, which stays fp32; a head is rounded to bf16 in the loss anyway.
_NARROW_END = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32, cast_forward_inputs=False)


def is_gathered_narrow(block: nn.Module) -> bool:
    """Whether a transformer block can be gathered in bf16 and has fp32 parameters.

    A block with a list of experts cannot: some experts may not be called, and FSDP's group of modules waits for each.
    Nor can one with trained rounding: weights near the middle of two codes would be rounded to others than are stored.
    """
    cannot = may_skip_modules(block) or any(True for _ in rounded_layers(block))
    return not cannot and any(p.dtype == torch.float32 for p in block.parameters())


def may_skip_modules(block: nn.Module) -> bool:
    """Whether a transformer block has a list of modules, some of which may not be called."""
    return any(isinstance(m, nn.ModuleList) and not isinstance(m, ParametrizationList) for m in block.modules())


def beside_linears(block: nn.Module) -> list[nn.Module]:
    """The modules of a block whose parameters autocast does not cast: norms, and the scales of weight scaling.

    bf16 would round scales near 1 to steps of 0.4 to 0.8 %.
    """
    cast = SparseLayer | ParametrizationList
    return [m for m in block.modules() if any(True for _ in m.parameters(False)) and not isinstance(m, cast)]


def compile_blocks_(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles every transformer block of `module` separately, in place: blocks of one shape share the code.

    torch gives every parametrized module its own class. Code is compiled again for each class, and no longer after 8
    times, so layers with the same parametrization get the same class here.
    """
    classes: dict[Any, type[nn.Module]] = {}
    for layer in _parametrized(module):
        layer.__class__ = classes.setdefault((*type(layer).__bases__, *layer.parametrizations), type(layer))
    for block in transformer_blocks(module).values():
        block.compile(backend=backend)


def uncompile_blocks_(module: nn.Module) -> None:
    """Undoes `compile_blocks_`, for passes on another device or in another precision."""
    for block in transformer_blocks(module).values():
        block._compiled_call_impl = None
    for layer in _parametrized(module):  # its own class again: removing the parametrization deletes an attribute of it
        shared = type(layer)
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _parametrized(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if is_parametrized(layer)]
