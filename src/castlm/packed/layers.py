"""The layers with packed weights: a linear layer, and an embedding that shares its table with the head.

`pack_model_` puts them in place of a model's own.

At first a layer holds the stored tensors (`values`, `mask`, `scales`, as in a file), or the file to read them from.
`prepare_` replaces them by one buffer in the order in which this processor reads it.

`torch.ops.castlm.packed_linear` multiplies activations by that buffer, with a shape that `torch.compile` can trace: by
castlm's kernels where they are fastest; otherwise, for many rows of x, by the library's GEMM, unpacking one part of the
weight at a time to an fp32 scratch that stays in the cache. `torch.ops.castlm.packed_rows` looks up rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from castlm.core.errors import InputError, check_finite, naming
from castlm.core.nm import NM
from castlm.core.sparsify import check_model, filter_for, is_sparse_linear
from castlm.dtypes import FLOAT_NAMES, STORED
from castlm.formats.rounding import round_table
from castlm.packed import native
from castlm.packed.tensor import PackedTensor, cast_weight, pack, pack_integers, read_packed, unpack
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import PackedSpec
from castlm_runtime.stored import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64

DIRECT_ROWS = 128
"""Rows of x that the kernels always multiply. More rows take the library's GEMM where `native.rows_at_a_time` says that
it is faster."""

_SCRATCH_BYTES = 2 << 20
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = torch.library.Library("castlm", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor packed, int out_features) -> Tensor")
_LIBRARY.define("packed_rows(Tensor rows, Tensor packed, int columns) -> Tensor")


@torch.library.impl(_LIBRARY, "packed_linear", "CPU")
def _packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    assert x.dtype.is_floating_point, x.dtype
    num_rows = math.prod(x.shape[:-1])
    if num_rows == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if num_rows > DIRECT_ROWS and x.numel():  # `multiply` refuses rows without columns
        most = native.rows_at_a_time(packed)
        if num_rows > most:
            rows = x.reshape(num_rows, -1)
            if most:  # `most` rows at a time bound the kernels' scratch memory
                out = x.new_empty(num_rows, out_features)
                for part, of_part in zip(rows.split(most), out.split(most)):
                    of_part.copy_(_by_kernels(part, packed, out_features))
            else:
                out = multiply_by_gemm(rows, packed, out_features)
            return out.view(*x.shape[:-1], out_features)
    return _by_kernels(x, packed, out_features)


def _by_kernels(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    if x.dtype not in _KERNEL_DTYPES:
        return native.multiply(x.float().contiguous(), packed, out_features).to(x.dtype)
    return native.multiply(x.contiguous(), packed, out_features)


def multiply_by_gemm(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """Multiplies x (rows, in) in fp32: a CPU without units for 16-bit products is slower in any other dtype."""
    wide = x.float()
    out = wide.new_empty(len(x), out_features)
    step = max(1, _SCRATCH_BYTES // (4 * x.shape[1] * 8)) * 8  # whole tiles
    scratch = wide.new_empty(min(step, out_features), x.shape[1])
    for first in range(0, out_features, step):
        part = scratch[: min(step, out_features - first)]
        native.unpack(packed, first, first + len(part), part)
        torch.mm(wide, part.T, out=out[:, first : first + len(part)])
    return out.to(x.dtype)


@torch.library.impl(_LIBRARY, "packed_linear", "Meta")
def _shape_of_packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(_LIBRARY, "packed_rows", "CPU")
def _packed_rows(rows: Tensor, packed: Tensor, columns: int) -> Tensor:
    return native.gather(packed, rows.long().contiguous(), columns)


@torch.library.impl(_LIBRARY, "packed_rows", "Meta")
def _shape_of_packed_rows(rows: Tensor, packed: Tensor, columns: int) -> Tensor:
    return torch.empty(*rows.shape, columns, device="meta")


def packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """`x @ W.T`, (..., in) -> (..., out) in the dtype of x; `packed` is the buffer of W (out, in).

    A plain tensor on a CPU is multiplied without a detour through the dispatcher: 5.6 us a call instead of 7.9 us.
    Tracers and transforms (`torch.compile`, `make_fx`, `torch.jit.trace`, `torch.func`) see the operator.

    Raises:
        InputError: x needs a gradient, which packed weights do not propagate.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("packed layers have no gradients: train the model that was packed, or castlm unpack it")
    if (
        type(x) is Tensor
        and x.is_cpu
        and not (is_compiling() or _len_torch_dispatch_stack() or peek_interpreter_stack() or _get_tracing_state())
    ):
        return _packed_linear(x, packed, out_features)
    out: Tensor = torch.ops.castlm.packed_linear.default(x, packed, out_features)
    return out


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if hasattr(module, "packed"):
        raise InputError("a packed model has no weights to save: copy its folder, or save the model that was packed")


class PackedModule(nn.Module):
    """Base of the packed layers: the stored tensors of a spec, then the buffer made from them."""

    dtype = torch.float32
    """The dtype of activations."""
    packed: Tensor
    """The buffer that `prepare_` fills and `share_` keeps."""

    def __init__(self, spec: PackedSpec):
        super().__init__()
        self.spec = spec
        self.source: Mapping[str, StoredTensor] = {}
        for suffix, (dtype, shape) in spec.tensors().items():
            self.register_buffer(suffix, torch.empty(shape, dtype=STORED[dtype], device="meta"))
        self.register_state_dict_pre_hook(_refuse_to_save)

    @property
    def stored(self) -> PackedTensor:
        """The tensors of the file, before `prepare_`."""
        if self.source:
            return read_packed(self.spec, self.source)
        named = dict(self.named_buffers())
        return PackedTensor(self.spec, named["values"], named.get("mask"), named.get("scales"))

    def hold_(self, packed: PackedTensor) -> Self:
        """Keeps the stored tensors of `packed`; returns the layer. Call `prepare_layers_` next."""
        for suffix, tensor in packed.tensors().items():
            setattr(self, suffix, tensor)
        return self

    def read_from_(self, source: Mapping[str, StoredTensor]) -> None:
        """Drops the stored tensors, to read them from `source` when they are needed.

        Args:
            source: the stored tensors in their file, by suffix.
        """
        self._drop_stored()
        self.source = source

    def _drop_stored(self) -> None:
        self.source = {}
        for suffix in self.spec.tensors():
            if hasattr(self, suffix):
                delattr(self, suffix)

    @property
    def weight(self) -> Tensor:
        """An empty tensor on the layer's device in the activations' dtype, for model code that asks for either."""
        held = next(self.buffers(recurse=False), None)
        return torch.empty(0, dtype=self.dtype, device="meta" if held is None else held.device)

    def num_bytes(self) -> int:
        """Bytes of the buffer that `prepare_` fills."""
        return native.packed_bytes(self.spec.values, self.spec.n, self.spec.m, self.spec.rows, self.spec.columns)

    def prepare_(self, buffer: Tensor) -> None:
        """Writes the stored tensors to `buffer` (num_bytes(),) in the kernels' order, and drops them.

        Raises:
            InputError: a mask that does not keep exactly n of every m, or a value that is not finite.
        """
        spec, stored = self.spec, self.stored
        # The largest integer times a scale must be finite too.
        floats = stored.values if stored.scales is None else stored.scales.float() * (FORMATS[spec.values].largest + 1)
        check_finite("a packed weight", floats)
        stored.repack_(buffer)
        self.share_(buffer)

    def share_(self, buffer: Tensor) -> None:
        """Uses the buffer that another layer of the same spec prepared."""
        self._drop_stored()
        self.register_buffer("packed", buffer, persistent=False)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"in_features={spec.columns}, out_features={spec.rows}, {spec.pattern} {spec.values}"


class PackedLinear(PackedModule):
    """`nn.Linear` over a packed weight; x (..., in) in fp32, bf16 or fp16 on a CPU, without gradients."""

    bias: nn.Parameter | None

    def __init__(self, spec: PackedSpec, bias: nn.Parameter | None = None):
        super().__init__(spec)
        self.in_features, self.out_features = spec.columns, spec.rows
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        out = packed_linear(x, self.packed, self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """Rebuilds the dense layer from the stored tensors: `nn.Linear`, or transformers' `Conv1D`."""
        weight = unpack(self.stored, dtype)
        if self.spec.transposed:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(self.spec.rows, 0)
            weight = weight.T.contiguous()
        else:
            layer = nn.Linear(self.spec.columns, self.spec.rows, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)  # it trains as a plain model does
        layer.bias = self.bias  # type: ignore[assignment]
        return layer.train(self.training)


class PackedEmbedding(PackedModule):
    """`nn.Embedding` over a packed table: rows are looked up in the buffer, which a tied head multiplies by."""

    def __init__(self, spec: PackedSpec, dtype: torch.dtype):
        super().__init__(spec)
        self.dtype = dtype  # of the looked-up rows

    def forward(self, input_ids: Tensor) -> Tensor:
        rows: Tensor = torch.ops.castlm.packed_rows.default(input_ids, self.packed, self.spec.columns)
        return rows.to(self.dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """`nn.Embedding` of the stored tensors."""
        table: nn.Embedding = nn.Embedding.from_pretrained(unpack(self.stored, dtype), freeze=False)
        return table


def prepare_layers_(layers: Mapping[str, PackedModule]) -> None:
    """Prepares all layers, one at a time, in one allocation on huge pages.

    Raises:
        InputError: the kernels were not built, or a mask or a value of the named layer is damaged.
    """
    sizes = {name: -(-layer.num_bytes() // _ALIGNMENT) * _ALIGNMENT for name, layer in layers.items()}
    arena, offset = native.allocate(sum(sizes.values())), 0
    for name, layer in layers.items():
        with naming(name):
            layer.prepare_(arena[offset : offset + layer.num_bytes()])
        offset += sizes[name]
    native.trim_memory()


# ---- a model onto the kernels


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
        head: "int8", "int6" or "int4" rounds the output head and the embedding, tied or not.
        filter_fn: `filter_fn(module, fqn)` selects the layers to pack.
        left_dense: names of those layers that are not n:m; they use the kernels for dense weights.

    Returns:
        The names of the replaced layers.

    Raises:
        InputError: a layer that is not n:m, no layer to replace, another dtype, or kernels that were not built;
            nothing is replaced then. Also weights that are not finite; some layers may then have been replaced.
    """
    check_model(model)
    chooses = filter_for(model, filter_fn)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and chooses(m, name)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer to pack")
    if dtype not in FLOAT_NAMES:
        raise InputError(f"dtype is {dtype}: give torch.bfloat16, torch.float16 or torch.float32")
    native.built()
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
        head_as: the format that head and embedding are rounded to; None rounds neither.
        table_dtype: casts embedding and head first; None keeps their dtypes.
    """

    def packed_table(weight: torch.Tensor) -> PackedTensor:
        weight = weight.detach() if table_dtype is None else cast_weight(weight.detach(), table_dtype)
        if head_as is None:
            return pack(weight, 0, 0)
        rounded = round_table(weight, head_as)
        return pack_integers(rounded.codes, rounded.scales, head_as, 0, 0)

    model.requires_grad_(False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = None
    plain = can_pack_tables(model)
    if plain:
        tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
        packed = packed_table(embedding.get_parameter("weight"))
        if tied:
            shared = PackedLinear(packed.spec, head.bias)
        model.set_input_embeddings(PackedEmbedding(packed.spec, dtype).hold_(packed))
        del packed
    elif isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Identity):
        shared = PackedLinear(embedding.spec)  # the tied head of a packed table: see `CastlmQuantizer`
    if shared is not None:
        # They share a buffer from here on, not a parameter, also for `tie_weights`, which lm-eval calls.
        model.all_tied_weights_keys, model._tied_weights_keys = {}, {}
        model.set_output_embeddings(nn.Identity())
    elif plain and isinstance(head, nn.Linear):
        packed = packed_table(head.weight)
        model.set_output_embeddings(PackedLinear(packed.spec, head.bias).hold_(packed))
        del packed
    del embedding, head  # so that a table is freed when its layer is prepared
    prepare_layers_({name: module for name, module in model.named_modules() if isinstance(module, PackedModule)})
    if shared is not None:
        shared.share_(model.get_input_embeddings().get_buffer("packed"))
        model.set_output_embeddings(shared)
