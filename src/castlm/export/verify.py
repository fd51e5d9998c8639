"""Verify that a checkpoint has a pattern, from its bytes on disk, whatever program wrote it.

Counts every group of every linear layer and expert inside the transformer blocks, and checks every float of the
checkpoint for NaN and infinity. The counted weights are those that transformers would load, by transformers' own
account. Further weights beside them, missing layers, and containers that cannot be counted are refused or reported.
Memory stays at a few chunks of a tensor for a model of any size; numpy alone counts, without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from castlm.core.blocks import in_block, is_tower, owners_of_experts, why_dense
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern
from castlm.export.folder import (
    StoredUse,
    check_layers,
    is_packed,
    left_dense_reason,
    read_config,
    read_facts,
    stored_tensors,
)
from castlm.export.verify_report import ALLOW_DENSE, LayerReport, VerifyReport
from castlm.models.weights import OLD_BUFFERS
from castlm.patterns import parse_pattern
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import PackedSpec, read_specs, split_codes
from castlm_runtime.reading import user_path
from castlm_runtime.stored import (
    FLOATS,
    PACKED_SINGLE,
    SINGLE,
    StoredTensor,
    byte_chunks,
    count_non_finite,
    magnitude_chunks,
    non_finite_of,
)

PACKED_SUFFIXES = (".qweight", ".weight_packed", ".compressed", ".bitmask", ".qdata")
"""Suffixes of the names of packed weights, in GPTQ and AWQ, compressed-tensors, and torchao."""


def verify(
    path: str | Path,
    pattern: Pattern | str = "2:4",
    exclude: Iterable[str] = (),
    *,
    allow_dense: float = ALLOW_DENSE,
    trust_remote_code: bool = False,
    uses: Mapping[str, StoredUse] | None = None,
) -> VerifyReport:
    """Counts every n:m group of a Hugging Face checkpoint: a folder, sharded or not, or its model.safetensors.

    The pattern applies to every weight that a product inside the transformer blocks of the language model sums over,
    whatever its name, except routers of experts. Groups run along the axis that the sums run over, which a forward pass
    of the model's class without values shows. Experts are counted one matrix at a time, or as the 3-D tensor of all
    experts of a block. Layers that the folder's castlm.json lists under `left_dense` are counted but may violate the
    pattern, as long as `allow_dense` holds. A weight of which the axis is not known is not counted, and makes the
    answer no. Reads f64, f32, f16, bf16 and f8, where a value of -0.0 is a zero, and castlm's packed format, whose
    masks must keep exactly n of every m.

    Args:
        path: the checkpoint.
        pattern: n:m, at most n non-zeros in every m consecutive weights.
        exclude: globs of tensor names that the pattern does not apply to; the report lists them.
        allow_dense: the largest share of the weights in products of the transformer blocks that may not have the
            pattern, from 0 to 1.
        trust_remote_code: run the code of a model that transformers does not have.
        uses: how the model multiplies by each tensor, where the caller has asked `check_layers` already.

    Returns:
        The counts by layer; `ok` says whether the checkpoint has the pattern.

    Raises:
        InputError: nothing readable at `path`, a corrupt or short file, other weights beside those that transformers
            loads, a missing or an additional layer, weights packed by others or of integers, a bad pattern, or no layer
            that the pattern applies to.
    """
    pattern = parse_pattern(str(pattern))
    path = user_path(path)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    tensors = stored_tensors(path, config)
    packed = take_packed(tensors)
    if packed and path.is_dir() and not is_packed(config):
        raise InputError(f"{next(iter(packed))} is packed, which transformers does not read from a plain folder")
    _refuse_packed(path, tensors, config)
    globs = tuple(exclude)
    excluded = {name for name in tensors if any(fnmatchcase(name, glob) for glob in globs)}
    if uses is None:
        _check_described(path, config)
        uses = check_layers(folder, tensors, config, excluded, trust_remote_code)
    _refuse_integers(tensors, uses)
    report = VerifyReport(str(path), pattern, allow_dense=allow_dense)
    left_dense = read_facts(folder).left_dense
    owners = owners_of_experts(use.parameter for use in uses.values())
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        use = uses.get(name)
        why = "excluded" if name in excluded else _why_dense(tensor, use, owners)
        listed = left_dense_reason(name, left_dense)
        if why is None and use is not None and use.axis is not None:
            check_order(name, packed, use)
            if problem := _why_uncounted(tensor, pattern, use.axis):
                report.uncounted[name] = problem
            else:
                layer = _count(tensor, pattern, use.axis, use.width, packed.get(name))
                layer.left_dense = listed
                report.layers.append(layer)
                continue
        elif why is None and use is not None:
            report.uncounted[name] = use.what
        elif why is not None:
            report.dense[name] = why
        if name in report.uncounted and listed is not None:
            report.dense[name] = listed
            del report.uncounted[name]
        if name in report.uncounted or _is_multiplied(use):
            report.num_dense_elsewhere += math.prod(tensor.shape)
        if num_non_finite := packed[name].num_non_finite() if name in packed else count_non_finite(tensor):
            report.non_finite_elsewhere[name] = num_non_finite
    if not report.sparse_layers and not report.uncounted:
        found = f"{len(tensors)} tensors, {len(report.layers)} left dense, {len(report.dense)} outside the pattern"
        raise InputError(f"{path} has no layer that {pattern} applies to: {found}")
    return report


def _why_dense(tensor: StoredTensor, use: StoredUse | None, owners: Collection[str]) -> str | None:
    """Why a stored tensor with two axes or more is no layer of the pattern; None for layers, and for smaller ones."""
    if len(tensor.shape) < 2:
        return None
    if use is None:
        return "a causal mask" if _is_causal_mask(tensor) else "not a parameter"
    if (why := why_dense(use.parameter.removesuffix(".weight"), owners)) is not None:
        return why
    return None if use.axis is not None or not use.is_known else use.what


def _is_multiplied(use: StoredUse | None) -> bool:
    """Whether products inside the transformer blocks of the language model sum over a tensor."""
    if use is None or not in_block(use.parameter) or is_tower(use.parameter):
        return False
    return use.axis is not None or not use.is_known


def _why_uncounted(tensor: StoredTensor, pattern: Pattern, axis: int) -> str | None:
    """Why the groups of a weight cannot be counted, though its axis is known."""
    shape = "x".join(map(str, tensor.shape))
    if axis < len(tensor.shape) - 2 or len(tensor.shape) > 3:
        return f"{len(tensor.shape)}-D of shape {shape}, with sums over axis {axis}"
    if not isinstance(pattern, NM) and len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D of shape {shape}, which {pattern} does not mask"
    return None


def check_order(name: str, packed: Mapping[str, Packed], use: StoredUse) -> None:
    """Raises `InputError` for a packed tensor that is stored the other way round than the model multiplies by it."""
    if name not in packed:
        return
    spec, parts = packed[name]
    if (use.axis == len(spec.unpacked_shape) - 2) != spec.transposed:
        is_transposed = "is" if spec.transposed else "is not"
        raise InputError(
            f"the castlm metadata of {parts['values'].file} say that {name} {is_transposed} transposed, unlike in the "
            "model: pack the model again"
        )


def _check_described(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses files of which no config.json names the model that multiplies by them."""
    if path.is_dir() and not config:
        raise InputError(f"{path} has no config.json, so its layers are unknown: copy the model's config.json")
    if not path.is_dir() and not (config and path.name == (PACKED_SINGLE if is_packed(config) else SINGLE)):
        raise InputError(
            f"{path} is one file, and only the model knows along which axis it multiplies by a weight: verify a folder "
            f"with its config.json, where the file is {SINGLE}"
        )


def _is_causal_mask(tensor: StoredTensor) -> bool:
    """Whether a tensor is the mask of an attention, which checkpoints of early versions of transformers hold."""
    return tensor.shape[:2] == (1, 1) and OLD_BUFFERS.search(tensor.name) is not None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if re.fullmatch(r"[0-9]{1,18}", part) else (-1, part) for part in name.split(".")]


def _refuse_packed(path: Path, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
    """Refuses quantized and packed tensors, whose zeros are not the zeros of the weights."""
    what, quantization = None, config.get("quantization_config")
    if quantization and not is_packed(config):
        what = f"{path} ({quantization.get('quant_method') if isinstance(quantization, dict) else quantization})"
    for name, tensor in tensors.items():
        if name.endswith(PACKED_SUFFIXES):
            what = f"{name} ({tensor.dtype})"
            break
    if what is not None:
        raise InputError(f"{what} is quantized or packed by another program: verify the model before")


def _refuse_integers(tensors: Mapping[str, StoredTensor], uses: Mapping[str, StoredUse]) -> None:
    """Refuses weights of integers; tables of integers that nothing is multiplied by may be there."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and _is_multiplied(uses.get(name)):
            raise InputError(f"{name} ({tensor.dtype}) is quantized by another program: verify the model before")


def check_ok(report: VerifyReport) -> None:
    """Raises `InputError` unless the pattern holds."""
    if not report.ok:
        raise InputError(report.summary())


def check_dense(folder: Path) -> None:
    """Raises `InputError` unless every value in a plain or packed folder is finite; of a dense model, nothing else can
    be counted.
    """
    config = read_config(folder)
    tensors = stored_tensors(folder, config)
    packed = take_packed(tensors)
    for name, tensor in tensors.items():
        if damaged := packed[name].num_non_finite() if name in packed else count_non_finite(tensor):
            raise InputError(f"{name} of {folder} holds {damaged:,} values that are NaN or infinite")


def _count(tensor: StoredTensor, pattern: Pattern, axis: int, terms: int, packed: Packed | None) -> LayerReport:
    """Counts the values of one tensor, and its groups.

    A pattern of your own counts its violations in the mask of the non-zeros of the whole matrix.
    """
    groups = pattern if isinstance(pattern, NM) else None
    if packed is not None:
        if groups is None:
            raise InputError(f"{tensor.name} is packed, which is for n:m: verify {pattern} before the model is packed")
        return count_packed_layer(tensor, packed, groups)
    layer = LayerReport(tensor.name, tensor.shape, tensor.dtype, axis)
    _count_groups(layer, tensor, groups, terms)
    if groups is None:
        import torch  # counting n:m does not need it

        nonzero = np.concatenate([bits != 0 for bits in magnitude_chunks(tensor)]).reshape(tensor.shape)
        mask = torch.from_numpy(nonzero if layer.axis == 1 else nonzero.T)  # (out, in)
        own = pattern.at(tensor.name.removesuffix(".weight"))
        layer.problem = own.misfit(mask.shape)
        layer.num_groups = mask.numel()
        layer.num_violations = 0 if layer.problem else own.violations(mask)
    return layer


def _count_groups(layer: LayerReport, tensor: StoredTensor, pattern: NM | None, terms: int) -> None:
    """Counts the values, and the groups if the pattern has any, of a 2-D tensor or the 3-D tensor of a block's experts.

    The experts' matrices are read as one tall matrix. If groups run down its columns, none spans two experts, because m
    divides the number of rows of each.

    Args:
        terms: of the sums along the axis; fewer than its length where matrices of experts are stored end to end.
    """
    n, m = (pattern.n, pattern.m) if pattern else (1, 1)
    columns, axis = tensor.shape[-1], layer.axis
    width = math.gcd(tensor.shape[axis], terms)
    axis -= len(tensor.shape) - 2
    step = m if axis == 1 else m * max(1, columns)  # whole groups
    if width % m:
        layer.problem, step = f"its width of {width} does not divide by {m}", 1
    for bits in magnitude_chunks(tensor, step):
        layer.num_non_finite += non_finite_of(bits, tensor.dtype)
        nonzero = bits != 0
        layer.num_zeros += len(nonzero) - int(np.count_nonzero(nonzero))
        if pattern is not None and layer.problem is None:
            counts = _group_counts(nonzero.view(np.uint8), m, columns if axis == 0 else None)
            layer.num_groups += counts.size
            layer.num_violations += int(np.count_nonzero(counts > n))
            layer.max_nonzeros = max(layer.max_nonzeros, int(counts.max()))


def _group_counts(ones: np.ndarray, m: int, columns: int | None = None) -> np.ndarray:
    """The sum of each group of `m` in whole groups of zeros and ones, uint8, along rows, or down `columns` if given."""
    dtype = np.uint8 if m < 256 else np.uint32
    counts: np.ndarray
    if columns is not None:  # stored (in, out)
        counts = np.add.reduce(ones.reshape(-1, m, columns), axis=1, dtype=dtype)  # (144, 4, 1536) -> (144, 1536)
    elif m in (2, 4, 8):
        # The bytes of a group, read as one integer and multiplied by 0x01..01, have their sum in the top byte. This is
        # faster than a reduce.
        word = np.dtype(f"<u{m}").type
        counts = (ones.view(word) * word(int("01" * m, 16))) >> word(8 * (m - 1))
    else:
        counts = np.add.reduce(ones.reshape(-1, m), axis=1, dtype=dtype)  # (221184, 4) -> (221184,)
    return counts


# ---- packed tensors, counted by their stored masks


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

    Returns the packed tensors by that name. In `tensors` they have their unpacked shape. Raises `InputError` as
    `read_specs`, for damaged metadata.
    """
    packed = {}
    for stem, spec in read_specs(tensors).items():
        parts = {suffix: tensors.pop(f"{stem}.{suffix}") for suffix in spec.tensors()}
        name = spec.tensor_name(stem)
        dtype = "F32" if spec.rounded else parts["values"].dtype
        tensors[name] = parts["values"]._replace(name=name, dtype=dtype, shape=spec.unpacked_shape)
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
        num_damaged += int(np.count_nonzero(_group_counts(kept, spec.m) != spec.n))
        counts = _group_counts(kept, pattern.m)
        layer.num_groups += counts.size
        layer.num_violations += int(np.count_nonzero(counts > pattern.n))
        layer.max_nonzeros = max(layer.max_nonzeros, int(counts.max()))
    if num_damaged:
        layer.problem = f"{num_damaged:,} groups of its mask do not keep exactly {spec.n} of {spec.m}"
    return layer


def _nonzeros(spec: PackedSpec, values: StoredTensor) -> int:
    if values.dtype in FLOATS:
        return sum(int(np.count_nonzero(bits)) for bits in magnitude_chunks(values))
    width = FORMATS[spec.values].bits
    if width == 8:
        return sum(int(np.count_nonzero(chunk)) for chunk in byte_chunks(values))
    count = 0
    for chunk in byte_chunks(values, values.shape[1]):
        count += int(np.count_nonzero(split_codes(chunk.reshape(-1, values.shape[1]), width, spec.kept)))
    return count
