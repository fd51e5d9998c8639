"""Writes GGUF from GGUF: rounded layers as Q4_0 or Q8_0, and all else, metadata, tokenizer and tables, as it is.

llama.cpp and the programs around it, such as Ollama and LM Studio, read the file. A block of 32 columns is an fp16
scale d before its codes; a value is d * code:

    Q4_0    d | 16 bytes, of which byte j holds code[j] + 8 in its lower half and code[j + 16] + 8 in its upper half
    Q8_0    d | 32 bytes, code[j] as int8

castlm rounds to Q4_0 as to int4, with a scale for each block; its int8 has one scale for a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from castlm.core.errors import InputError, naming
from castlm.files.atomic_file import atomic_file, flush_file, reporting_full_disk
from castlm.formats.rounding import Rounded
from castlm.models.gguf import GgufWeights, reader_of
from castlm.models.locate import locate
from castlm.oneshot.steps.round import layers_to_round
from castlm.say import Say

ROUNDED_TO = {"int4": "q4_0", "int8": "int8"}
"""The format that the layers of a GGUF file are rounded to, by the option `kind`."""

_TYPES = {"q4_0": "Q4_0", "int8": "Q8_0"}
"""The type of GGUF that holds the codes of a format."""

_COLUMNS = 32
"""Columns of a block."""


def gguf_source(name: str, kind: str, file: Path, overwrite: bool) -> Path:
    """The GGUF file of a model, from which `file` can be written.

    Raises:
        InputError: another model, a format without a type in GGUF, or `file` exists (without `overwrite`).
    """
    if kind not in ROUNDED_TO:
        raise InputError(f"GGUF has no type for {kind}: --gguf goes with --kind {' or '.join(ROUNDED_TO)}")
    where = locate(name)
    if not where.gguf:
        raise InputError(f"{name} is no GGUF file, and --gguf writes GGUF from GGUF: give the .gguf file of the model")
    source = Path(where.target) / where.gguf["gguf_file"]
    if file.suffix != ".gguf":
        raise InputError(f"--gguf {file} does not end in .gguf: name a file")
    if file.exists() and file.samefile(source):
        raise InputError(f"{file} is the file to read: name another file")
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists: name another file, or pass --overwrite")
    return source


def check_layers(weights: GgufWeights, model: PreTrainedModel) -> None:
    """Raises `InputError` for a layer that is not one tensor of the file, or whose width has no whole blocks."""
    for layer in layers_to_round(model):
        shape = weights.shape(f"{layer}.weight")
        if shape is None:
            raise InputError(f"{layer} is not one tensor of {weights.file}: leave --gguf out")
        columns = shape[1]
        if columns % _COLUMNS:
            raise InputError(
                f"{layer} has {columns} columns, and GGUF needs a multiple of {_COLUMNS}: leave --gguf out"
            )


def write_gguf(weights: GgufWeights, layers: Mapping[str, Rounded], file: Path, say: Say) -> None:
    """Writes `file` from the file of `weights`, with other values in the layers; reports scales that fp16 rounds.

    Args:
        layers: codes and scales by the name of the layer.

    Raises:
        InputError: a scale that is infinite in fp16.
    """
    import gguf

    reader = reader_of(weights.file)
    stems = {weights.tensor(f"{layer}.weight").name: layer for layer in layers}
    kind = next(iter(layers.values())).kind
    of_file = getattr(gguf.LlamaFileType, f"MOSTLY_{_TYPES[kind]}")
    of_layer = getattr(gguf.GGMLQuantizationType, _TYPES[kind])
    num_blocks, num_rounded, worst = 0, 0, 0.0
    with reporting_full_disk(file), atomic_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, reader.fields["general.architecture"].contents())
        writer.add_file_type(of_file)
        if reader.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            writer.add_custom_alignment(reader.alignment)
        _copy_metadata(reader, writer)
        for tensor in reader.tensors:
            if tensor.name in stems:
                rows, columns = (int(size) for size in reversed(tensor.shape))
                num_bytes = gguf.quant_shape_to_byte_shape((rows, columns), of_layer)
                writer.add_tensor_info(tensor.name, num_bytes, np.dtype(np.uint8), int(np.prod(num_bytes)), of_layer)
            else:
                data = tensor.data
                writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            if tensor.name not in stems:
                writer.write_tensor_data(tensor.data)
                continue
            with naming(stems[tensor.name]):
                blocks, errors = _blocks(layers[stems[tensor.name]])
            data = np.empty_like(blocks)
            data[weights.row_order(f"{stems[tensor.name]}.weight")] = blocks
            writer.write_tensor_data(data)
            num_blocks += errors.size
            num_rounded += int(np.count_nonzero(errors))
            worst = max(worst, float(errors.max()))
        writer.close()
        flush_file(temporary)
    if num_rounded:
        say(f"fp16 rounds {num_rounded:,} of {num_blocks:,} scales, by up to {worst:.1e} of their size")


def _copy_metadata(reader: Any, writer: Any) -> None:
    import gguf

    of_writer = ("general.architecture", "general.file_type", "general.alignment")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in of_writer:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)


def _blocks(rounded: Rounded) -> tuple[np.ndarray, np.ndarray]:
    """A weight in blocks: uint8 (rows, bytes of a row), and the relative error of each scale, (rows, blocks)."""
    rows, columns = rounded.codes.shape
    codes = rounded.codes.numpy().reshape(rows, -1, _COLUMNS)  # (1536, 576) -> (1536, 18, 32)
    scales = rounded.scales.numpy()[:, :, None]  # (1536, 18) -> (1536, 18, 1)
    if rounded.kind == "int8":
        scales = scales.repeat(columns // _COLUMNS, axis=1)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise InputError(f"a scale of {np.abs(scales).max():.3g} does not fit fp16, which GGUF has: leave --gguf out")
    is_used = codes.any(axis=2)
    errors = np.abs(halves.astype(np.float32) / scales - 1)[:, :, 0] * is_used
    if rounded.kind == "q4_0":
        nibbles = (codes + 8).astype(np.uint8)
        half = _COLUMNS // 2
        stored = nibbles[:, :, :half] | nibbles[:, :, half:] << 4
    else:
        stored = codes.view(np.uint8)
    return np.concatenate([halves.view(np.uint8), stored], axis=2).reshape(rows, -1), errors
