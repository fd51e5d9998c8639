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
from castlm.inference.layers import PackedEmbedding, PackedLinear, PackedModule, prepare_layers_
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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and filter_fn(m, name)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer to pack")
    if dtype not in FLOAT_NAMES:
        raise InputError(f"weights cannot be packed as {dtype}: pass torch.bfloat16, torch.float16 or torch.float32")
    native.check_built()
    names: list[str] = []
    sparse = [name for name, layer in layers.items() if m and name not in left_dense and layer.in_features % m == 0]
    for name in sparse:
        if violations := NM(n, m).violations(layers[name].weight):
            raise InputError(
                f"{name} is not {n}:{m} in {violations:,} of its groups: prune it, or name it in left_dense"
            )
    model.float()  # norms and biases stay so
    for name in list(layers):
        layer = layers.pop(name)  # the only reference but the model's
        packed = pack(cast_weight(layer.weight.detach(), dtype), *((n, m) if name in sparse else (0, 0)))
        model.set_submodule(name, PackedLinear(packed.spec, layer.bias).hold_(packed))
        names.append(name)
    onto_kernels_(model, torch.float32, head, dtype)
    return names


def can_pack_tables(model: PreTrainedModel) -> bool:
    """Whether embedding and head are plain layers of torch (the head may be packed already). Layers that scale or cast
    are not replaced.
    """
    head = model.get_output_embeddings()
    return type(model.get_input_embeddings()) is nn.Embedding and type(head) in (type(None), nn.Linear, PackedLinear)


def onto_kernels_(
    model: PreTrainedModel, dtype: torch.dtype, head_as: str | None = None, table_dtype: torch.dtype | None = None
) -> None:
    """Packs embedding and head if they are plain layers, and prepares all packed layers of `model`.

    Args:
        dtype: dtype of activations.
        head_as: the format that the head, and an embedding tied to it, are rounded to; None rounds neither.
        table_dtype: casts embedding and head first; None keeps their dtypes.
    """

    def packed_table(weight: torch.Tensor, values: str | None) -> PackedTensor:
        weight = weight.detach() if table_dtype is None else cast_weight(weight.detach(), table_dtype)
        if values is None:
            return pack(weight, 0, 0)
        rounded = round_rows(weight, values)
        return pack_integers(rounded.codes, rounded.scales, values, 0, 0)

    model.requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = None
    plain = can_pack_tables(model)
    if plain:
        tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
        packed = packed_table(embedding.weight, head_as if tied else None)
        if tied:
            shared = PackedLinear(packed.spec, head.bias)
        model.set_input_embeddings(PackedEmbedding(packed.spec, dtype).hold_(packed))
        del packed
    elif isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Identity):
        shared = PackedLinear(embedding.spec)  # the tied head of a packed table: see `CastlmQuantizer`
    if shared is not None:
        model.all_tied_weights_keys = {}  # they share a buffer from here on, not a parameter
        model.set_output_embeddings(nn.Identity())
    elif plain and isinstance(head, nn.Linear):
        packed = packed_table(head.weight, head_as)
        model.set_output_embeddings(PackedLinear(packed.spec, head.bias).hold_(packed))
        del packed
    del embedding, head  # so that a table is freed when its layer is prepared
    prepare_layers_({name: module for name, module in model.named_modules() if isinstance(module, PackedModule)})
    if shared is not None:
        shared.share_(model.get_input_embeddings().packed)
        model.set_output_embeddings(shared)
