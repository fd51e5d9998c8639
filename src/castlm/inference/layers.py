"""The layers of a model whose weights are packed: a linear layer, and an embedding that shares its table with the head.

A layer holds the stored tensors first (`values`, `mask`, `scales`, as a file has them) or knows the file that does,
then, after `prepare_`, the one buffer in the order in which this processor reads it; never both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.dtypes import FLOAT_NAMES, STORED
from castlm.files.stored import StoredTensor, read_bytes
from castlm.inference import native
from castlm.inference.format import PackedSpec
from castlm.inference.op import packed_linear
from castlm.inference.packed import PackedTensor, unpack

_ALIGNMENT = 64


class PackedModule(nn.Module):
    """What packed layers share: the stored tensors of a spec, then the buffer made of them."""

    dtype = torch.float32
    """Of activations."""

    def __init__(self, spec: PackedSpec, device: torch.device | str = "meta"):
        super().__init__()
        self.spec = spec
        self.source: Mapping[str, StoredTensor] = {}
        for suffix, (dtype, shape) in spec.tensors().items():
            self.register_buffer(suffix, torch.empty(shape, dtype=STORED[dtype], device=device))

    @property
    def stored(self) -> PackedTensor:
        """The tensors of the file, before `prepare_`."""
        named = {suffix: _read(tensor) for suffix, tensor in self.source.items()} or dict(self.named_buffers())
        return PackedTensor(self.spec, named["values"], named.get("mask"), named.get("scales"))

    def hold_(self, packed: PackedTensor) -> None:
        """Takes the stored tensors of `packed`."""
        for suffix, tensor in packed.tensors().items():
            setattr(self, suffix, tensor)

    def read_from_(self, source: Mapping[str, StoredTensor]) -> None:
        """Lets go of the stored tensors, to read them from `source` when they are needed.

        Args:
            source: where a file has each of them, by suffix.
        """
        self._drop_stored()
        self.source = source

    def _drop_stored(self) -> None:
        self.source = {}
        for suffix in self.spec.tensors():
            self._buffers.pop(suffix, None)

    @property
    def weight(self) -> Tensor:
        """Nothing, where the weight is and in the dtype of activations, for code of a model that asks for the two."""
        held = next(self.buffers(recurse=False), None)
        return torch.empty(0, dtype=self.dtype, device="meta" if held is None else held.device)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if "packed" in self._buffers:
            raise InputError(
                "a packed model has no weights to save: copy its folder, or save the model that was packed"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def num_bytes(self) -> int:
        """Of the buffer that `prepare_` fills."""
        return native.packed_bytes(self.spec.values, self.spec.n, self.spec.m, self.spec.rows, self.spec.columns)

    def prepare_(self, buffer: Tensor) -> None:
        """Makes the buffer of the stored tensors, in `buffer` (num_bytes(),), and lets go of them.

        Raises:
            InputError: a mask that does not keep exactly n of every m, or a value that is not finite.
        """
        spec, stored = self.spec, self.stored
        floats = [x for x in (stored.values, stored.scales) if x is not None and x.is_floating_point()]
        if not all(math.isfinite(bound) for tensor in floats for bound in tensor.aminmax()):
            raise InputError("the packed weights hold NaN or infinity: the checkpoint is damaged")
        native.repack_(buffer, stored.values, stored.mask, stored.scales, spec.values, spec.n, spec.m, spec.columns)
        self.share_(buffer)

    def share_(self, buffer: Tensor) -> None:
        """Takes a buffer that another layer of the same spec has prepared."""
        self._drop_stored()
        self.register_buffer("packed", buffer, persistent=False)

    def extra_repr(self) -> str:
        spec = self.spec
        pattern = f"{spec.n}:{spec.m}" if spec.m else "dense"
        return f"in_features={spec.columns}, out_features={spec.rows}, {pattern} {spec.values}"


def _read(tensor: StoredTensor) -> Tensor:
    return torch.from_numpy(read_bytes(tensor)).view(STORED[tensor.dtype]).view(tensor.shape)


class PackedLinear(PackedModule):
    """`nn.Linear` over a packed weight; x (..., in) in fp32, bf16 or fp16 on a CPU, without gradients."""

    def __init__(self, spec: PackedSpec, bias: nn.Parameter | None = None, device: torch.device | str = "meta"):
        super().__init__(spec, device)
        self.in_features, self.out_features = spec.columns, spec.rows
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        out = packed_linear(x, self._buffers["packed"], self.out_features)  # `self.packed` is a slower search
        bias = self._parameters["bias"]
        return out if bias is None else out + bias.to(out.dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The layer that the model had, from the stored tensors: `nn.Linear`, or transformers' `Conv1D`."""
        weight = unpack(self.stored, dtype)
        if self.spec.transposed:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(self.spec.rows, 0)
            weight = weight.T.contiguous()
        else:
            layer = nn.Linear(self.spec.columns, self.spec.rows, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)  # it trains as a plain model does
        layer.bias = self.bias
        return layer.train(self.training)


class PackedEmbedding(PackedModule):
    """`nn.Embedding` over the packed table of an output head: rows are looked up in the buffer that the head reads."""

    def __init__(self, spec: PackedSpec, dtype: torch.dtype, device: torch.device | str = "meta"):
        super().__init__(spec, device)
        self.dtype = dtype  # of what is looked up

    def forward(self, input_ids: Tensor) -> Tensor:
        spec = self.spec
        if input_ids.numel() and not torch.compiler.is_compiling():  # a graph has no branch for it
            low, high = (int(bound) for bound in input_ids.aminmax())
            if low < 0 or high >= spec.rows:
                raise IndexError(f"token ids from {low} to {high}: the table has {spec.rows} rows")
        table, scales = native.dense_table(self.packed, spec.values, spec.rows, spec.columns)
        tile_rows = table.shape[2]
        rows = table[input_ids // tile_rows, :, input_ids % tile_rows]  # (..., blocks, 64)
        found = rows.flatten(-2)[..., : spec.columns].to(self.dtype)
        return found if scales is None else found * scales[input_ids].to(self.dtype).unsqueeze(-1)

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """`nn.Embedding` of the stored tensors."""
        return nn.Embedding.from_pretrained(unpack(self.stored, dtype), freeze=False)


def table_spec(weight: Tensor) -> PackedSpec:
    """The spec of a dense table (rows, columns) as it is, bf16, fp16 or fp32."""
    rows, columns = weight.shape
    return PackedSpec(rows, columns, 0, 0, FLOAT_NAMES[weight.dtype])


def prepare_layers_(layers: Mapping[str, PackedModule]) -> None:
    """Makes the buffers of all layers in one allocation on huge pages, a layer at a time.

    Raises:
        InputError: the kernels were not built, or a mask or a value of the named layer is damaged.
    """
    sizes = {name: -(-layer.num_bytes() // _ALIGNMENT) * _ALIGNMENT for name, layer in layers.items()}
    arena, offset = native.allocate(sum(sizes.values())), 0
    for name, layer in layers.items():
        try:
            layer.prepare_(arena[offset : offset + layer.num_bytes()])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        offset += sizes[name]
    native.trim_memory()


def pack_linear(layer: nn.Linear, packed: PackedTensor) -> PackedLinear:
    """A `PackedLinear` with the stored tensors of `packed` and the bias of `layer`; `prepare_layers_` comes next."""
    if (layer.out_features, layer.in_features) != (packed.spec.rows, packed.spec.columns):
        raise InputError(f"a packed weight of {packed.spec.rows} x {packed.spec.columns} does not fit {layer}")
    made = PackedLinear(packed.spec, layer.bias)
    made.hold_(packed)
    return made


def pack_table(packed: PackedTensor, dtype: torch.dtype) -> PackedEmbedding:
    """A `PackedEmbedding` with the stored tensors of `packed`, whose rows are looked up in `dtype`."""
    made = PackedEmbedding(packed.spec, dtype)
    made.hold_(packed)
    return made
