"""Moves a loaded model onto the CPU kernels, in place: `pack_model_`, and the last step of loading a packed folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from castlm.core.errors import InputError
from castlm.core.nm import NM
from castlm.core.sparsify import is_sparse_linear
from castlm.dtypes import FLOAT_NAMES
from castlm.inference import native
from castlm.inference.formats import PackedSpec
from castlm.inference.layers import (
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    pack_linear,
    pack_table,
    prepare_layers_,
    table_spec,
)
from castlm.inference.packed import PackedTensor, cast_weight, pack, pack_integers
from castlm.inference.rounding import round_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def pack_model_(
    model: PreTrainedModel,
    n: int = 2,
    m: int = 4,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head: str | None = None,
    filter_fn: Callable[[nn.Module, str], bool] = is_sparse_linear,
    left_dense: Collection[str] = (),
) -> list[str]:
    """Replaces the linear layers of a model on a CPU by packed ones, and plain embeddings and heads by ones in `dtype`.
    A layer whose width does not divide by m uses the kernels for dense weights.

    The model computes in fp32 afterwards, without gradients, and cannot be trained or saved.

    Args:
        n: kept weights of each group; 0, with m 0, uses the kernels for dense weights.
        m: weights of a group.
        dtype: bf16, fp16 or fp32, which weights are cast to.
        head: "int8" rounds the output head, and an embedding tied to it, to int8 with a scale for each row.
        filter_fn: `filter_fn(module, fqn)` selects the layers to pack.
        left_dense: names of those layers that are not n:m; they use the kernels for dense weights.

    Returns:
        The names of the replaced layers.

    Raises:
        InputError: another dtype, a layer that is not n:m, no layer to replace, or kernels that were not built; nothing
            is replaced then. Also weights that are not finite; some layers may then have been replaced.
    """
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and filter_fn(module, name)
    ]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layer to pack")
    if dtype not in FLOAT_NAMES:
        raise InputError(f"weights cannot be packed as {dtype}: pass torch.bfloat16, torch.float16 or torch.float32")
    native.check_built()
    sparse = [name for name in names if m and name not in left_dense and model.get_submodule(name).in_features % m == 0]
    for name in sparse:
        if violations := NM(n, m).violations(model.get_submodule(name).weight):
            raise InputError(
                f"{name} is not {n}:{m} in {violations:,} of its groups: prune it, or name it in left_dense"
            )
    model.float()  # norms and biases stay so
    for name in names:
        layer = model.get_submodule(name)
        weight = cast_weight(layer.weight.detach(), dtype)
        spec = PackedSpec(*weight.shape, 0, 0, FLOAT_NAMES[dtype])
        packed = pack(weight, n, m) if name in sparse else PackedTensor(spec, weight, None, None)
        model.set_submodule(name, pack_linear(layer, packed))
    if can_pack_tables(model):
        _cast_tables_(model, dtype)
    onto_kernels_(model, torch.float32, head)
    return names


def _cast_tables_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = _is_tied(model)
    for table in (embedding, output):
        if isinstance(table, (nn.Embedding, nn.Linear)):
            table.weight = nn.Parameter(cast_weight(table.weight, dtype), requires_grad=False)
    if tied:
        output.weight = embedding.weight


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) and head.weight is model.get_input_embeddings().weight


def can_pack_tables(model: PreTrainedModel) -> bool:
    """Whether embedding and head are plain layers of torch (the head may be packed already). Layers that scale or cast
    are not replaced.
    """
    head = model.get_output_embeddings()
    return type(model.get_input_embeddings()) is nn.Embedding and type(head) in (type(None), nn.Linear, PackedLinear)


def onto_kernels_(model: PreTrainedModel, dtype: torch.dtype, head_as: str | None = None) -> None:
    """Packs embedding and head if they are plain layers, and prepares all packed layers of `model`.

    Args:
        dtype: dtype of activations.
        head_as: "int8" rounds the head, and an embedding tied to it; None keeps them as they are.
    """
    model.requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = None
    plain = can_pack_tables(model)
    if plain:
        tied = _is_tied(model)
        table = pack_table(_packed_table(embedding.weight.detach(), head_as if tied else None), dtype)
        if tied:
            shared = PackedLinear(table.spec, head.bias)
        model.set_input_embeddings(table)
    elif isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Identity):
        shared = PackedLinear(embedding.spec)  # the tied head of a packed table: see `CastlmQuantizer`
    if shared is not None:
        model.all_tied_weights_keys = {}  # they share a buffer from here on, not a parameter
        model.set_output_embeddings(nn.Identity())
    elif plain and isinstance(head, nn.Linear):
        model.set_output_embeddings(pack_linear(head, _packed_table(head.weight.detach(), head_as)))
    del embedding, head  # so that a table is freed when its layer is prepared
    prepare_layers_({name: module for name, module in model.named_modules() if isinstance(module, PackedModule)})
    if shared is not None:
        shared.share_(model.get_input_embeddings().packed)
        model.set_output_embeddings(shared)


def _packed_table(weight: torch.Tensor, as_values: str | None) -> PackedTensor:
    if as_values == "int8":
        rounded = round_rows(weight, "int8")
        return pack_integers(rounded.codes, rounded.scales, "int8", 0, 0)
    return PackedTensor(table_spec(weight), weight, None, None)
