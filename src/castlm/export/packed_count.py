"""Counts the groups of a packed tensor from its stored mask, by numpy alone, with a few chunks in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from castlm.core.nm import NM
from castlm.export.report import LayerReport
from castlm.files.stored import FLOATS, StoredTensor, byte_chunks, count_non_finite, magnitude_chunks
from castlm.inference.formats import FORMATS, PackedSpec, read_specs


class Packed(NamedTuple):
    """A packed tensor: its spec, and its stored tensors by suffix."""

    spec: PackedSpec
    parts: Mapping[str, StoredTensor]

    def num_non_finite(self) -> int:
        """Number of NaN and infinite values and scales, and of scales that make the largest integer infinite."""
        found = sum(map(count_non_finite, self.parts.values()))
        if found or "scales" not in self.parts:
            return found
        scales = self.parts["scales"]
        bits = np.concatenate([chunk.astype(np.uint32) for chunk in magnitude_chunks(scales)])
        magnitudes = (bits if scales.dtype == "F32" else bits << 16).view(np.float32)
        largest = np.float64(np.finfo(np.float32).max) / (FORMATS[self.spec.values].largest + 1)
        return int(np.count_nonzero(magnitudes > largest))


def take_packed(tensors: dict[str, StoredTensor]) -> dict[str, Packed]:
    """Replaces, in place, the parts of each packed tensor in `tensors` by one entry under its own name.

    Returns:
        The packed tensors by that name. In `tensors` they have their unpacked shape.

    Raises:
        InputError: as `castlm.inference.formats.read_specs`.
    """
    packed = {}
    for stem, spec in read_specs(sorted({tensor.file for tensor in tensors.values()})).items():
        parts = {suffix: tensors.pop(f"{stem}.{suffix}") for suffix in spec.tensors()}
        shape, name = spec.unpacked_shape, spec.tensor_name(stem)
        dtype = "F32" if spec.rounded else parts["values"].dtype
        tensors[name] = parts["values"]._replace(name=name, dtype=dtype, shape=shape)
        packed[name] = Packed(spec, parts)
    return packed


def count_packed_layer(tensor: StoredTensor, packed: Packed, pattern: NM) -> LayerReport:
    """Counts a layer from its mask; a kept value that is zero counts as a zero.

    Every group of the tensor's own pattern must keep exactly `spec.n`, with no bit set past the last column; otherwise
    the values would belong to other columns than in the mask.
    """
    spec = packed.spec
    layer = LayerReport(tensor.name, tensor.shape, spec.values, axis=len(tensor.shape) - (2 if spec.transposed else 1))
    layer.num_non_finite = packed.num_non_finite()
    if not spec.m:
        layer.problem = "dense: packed without a mask"
        return layer
    layer.num_zeros = spec.rows * spec.columns - _nonzeros(spec, packed.parts["values"])
    if spec.columns % pattern.m:
        layer.problem = f"its width of {spec.columns} does not divide by {pattern.m}"
        return layer
    num_damaged, width = 0, packed.parts["mask"].shape[1]
    for chunk in byte_chunks(packed.parts["mask"], width):
        bits = np.unpackbits(spec.mask_to_bits(chunk.reshape(-1, width)), axis=1, bitorder="little")
        kept = np.ascontiguousarray(bits[:, : spec.columns])
        num_damaged += int(np.count_nonzero(bits[:, spec.columns :]))
        num_damaged += int(np.count_nonzero(_sums(kept, spec.m) != spec.n))
        counts = _sums(kept, pattern.m)
        layer.num_groups += counts.size
        layer.num_violations += int(np.count_nonzero(counts > pattern.n))
        layer.max_nonzeros = max(layer.max_nonzeros, int(counts.max()))
    if num_damaged:
        layer.problem = f"{num_damaged:,} groups of its mask do not keep exactly {spec.n} of {spec.m}"
    return layer


def _sums(kept: np.ndarray, m: int) -> np.ndarray:
    return np.add.reduce(kept.reshape(-1, m), axis=1, dtype=np.uint32)


def _nonzeros(spec: PackedSpec, values: StoredTensor) -> int:
    if values.dtype in FLOATS:
        return sum(int(np.count_nonzero(bits)) for bits in magnitude_chunks(values))
    if FORMATS[spec.values].bits == 8:
        return sum(int(np.count_nonzero(chunk)) for chunk in byte_chunks(values))
    count = 0
    for chunk in byte_chunks(values, values.shape[1]):  # two values in a byte, the last of a row in its low half
        rows = chunk.reshape(-1, values.shape[1])
        count += int(np.count_nonzero(rows & 15)) + int(np.count_nonzero(rows[:, : spec.kept // 2] >> 4))
    return count
