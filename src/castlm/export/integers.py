"""Put quantized weights into a packed folder: the codes and scales themselves in place of their rounded products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from castlm.core.errors import InputError
from castlm.core.masks import unpack_mask
from castlm.export.stream import write_safetensors
from castlm.files.atomic_file import atomic_file, atomic_write_json
from castlm.files.reading import read_json_object
from castlm.inference import format
from castlm.inference.format import PackedSpec
from castlm.inference.packed import PackedTensor, pack_integers
from castlm.inference.rounding import Rounded


def store_integers(folder: str | Path, layers: Mapping[str, Rounded]) -> int:
    """Replaces the values of packed layers by integers, file by file. Returns how many layers.

    Args:
        folder: as `pack_folder` wrote it from a model whose weights are those of `layers`, dequantized.
        layers: codes and scales by module name, of `quantize_`: int8 or int4.

    Raises:
        InputError: a layer that is not packed in `folder`, codes where its mask has none, or float8.
    """
    folder, left = Path(folder), dict(layers)
    if any(rounded.kind == "fp8" for rounded in layers.values()):
        raise InputError("the packed format holds int8 and int4: write fp8 as a plain folder")
    for file in sorted(folder.glob("castlm*.safetensors")):
        specs = format.read_specs([file])
        chosen = {name: left.pop(name) for name in specs if name in left}
        if chosen:
            _rewrite(file, specs, chosen)
    if left:
        raise InputError(f"{next(iter(left))} is not packed in {folder}: pack the quantized model first")
    _index(folder)
    return len(layers)


def _rewrite(file: Path, specs: Mapping[str, PackedSpec], chosen: Mapping[str, Rounded]) -> None:
    new = {name: replace(spec, values=chosen[name].kind) if name in chosen else spec for name, spec in specs.items()}
    packed = {f"{name}.{suffix}" for name, spec in specs.items() for suffix in spec.tensors()}
    with safe_open(file, framework="pt") as opened, atomic_file(file) as temporary:
        plain = [key for key in opened.keys() if key not in packed]  # noqa: SIM118
        layout = {key: _entry(opened.get_slice(key)) for key in plain}
        layout |= {f"{name}.{suffix}": entry for name, spec in new.items() for suffix, entry in spec.tensors().items()}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from ((key, opened.get_tensor(key)) for key in plain)
            for name, spec in new.items():
                if name in chosen:
                    mask = opened.get_tensor(f"{name}.mask") if spec.m else None
                    parts = _integers(name, chosen[name], spec, mask).tensors()
                else:
                    parts = {suffix: opened.get_tensor(f"{name}.{suffix}") for suffix in spec.tensors()}
                yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in parts.items())

        write_safetensors(temporary, layout, tensors(), format.to_metadata(new))


def _entry(stored: object) -> tuple[str, tuple[int, ...]]:
    return stored.get_dtype(), tuple(stored.get_shape())  # type: ignore[attr-defined]


def _integers(name: str, rounded: Rounded, spec: PackedSpec, bits: Tensor | None) -> PackedTensor:
    mask = None if bits is None else unpack_mask(bits, spec.columns)
    if mask is not None and bool((rounded.codes.masked_fill(mask, 0) != 0).any()):
        raise InputError(f"{name} has codes where its mask keeps nothing: pack the model that was quantized")
    scales = rounded.scales.to(torch.bfloat16 if rounded.kind == "int4" else torch.float32)
    return pack_integers(rounded.codes, scales, rounded.kind, spec.n, spec.m, mask=mask, transposed=spec.transposed)


def _index(folder: Path) -> None:
    """Lists the new tensors in the index of several files, where there is one."""
    file = folder / format.INDEX
    if not file.is_file():
        return
    weight_map = {}
    for path in sorted(folder.glob("castlm-*.safetensors")):
        with safe_open(path, framework="numpy") as opened:
            weight_map |= dict.fromkeys(opened.keys(), path.name)
    size = sum(path.stat().st_size for path in folder.glob("castlm-*.safetensors"))
    atomic_write_json(file, {**read_json_object(file), "metadata": {"total_size": size}, "weight_map": weight_map})
