"""What `castlm pack` does with a model: which tensors it packs, how, and into which files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from castlm.core.blocks import is_block_linear, is_stacked_experts
from castlm.core.errors import InputError
from castlm.dtypes import FLOATS, STORED, STORED_NAMES
from castlm.export.folder import read_config, stored_tensors
from castlm.export.layers import check_layers
from castlm.export.verify import left_dense_reason, read_left_dense
from castlm.files.stored import StoredTensor
from castlm.inference import format
from castlm.inference.convert import can_pack_tables
from castlm.inference.format import PackedSpec
from castlm.models.architecture import shape_model
from castlm.models.conversion import as_stored, possible_names
from castlm.models.layout import experts_input_axis, guess_model_type, stored_transposed
from castlm.models.opening import open_config


@dataclass(frozen=True)
class PackPlan:
    """What is packed, how, and into which files."""

    stored: Mapping[str, StoredTensor]
    specs: Mapping[str, PackedSpec]
    """By the name of the tensor in the source."""
    files: list[tuple[Path, str, list[str]]]
    """Of each file its path, its new name and the names of its tensors."""
    cast: torch.dtype | None

    def layout(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is written of the tensor `name`."""
        spec = self.specs.get(name)
        if spec is not None:
            return {f"{spec.stem(name)}.{suffix}": entry for suffix, entry in spec.tensors().items()}
        stored = self.stored[name]
        is_float = STORED[stored.dtype].is_floating_point
        return {name: (STORED_NAMES[self.cast] if self.cast and is_float else stored.dtype, stored.shape)}


def plan_pack(source: Path, n: int, m: int, dtype: str | None, head: str | None) -> PackPlan:
    """What `pack_folder` does with the model in `source`.

    Raises:
        InputError: no model there, packed or quantized already, or a tensor or head that cannot be packed.
    """
    config, stored = _read_source(source)
    if not config.get("auto_map"):  # of code of its own nobody here knows the layers
        check_layers(source, stored, config)
    model_type = config.get("model_type") or guess_model_type({name: t.shape for name, t in stored.items()})
    left_dense = read_left_dense(source / "castlm.json")
    cast = None if dtype is None else FLOATS[dtype]
    specs: dict[str, PackedSpec] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in STORED:
            raise InputError(f"{name} of {source} is stored as {tensor.dtype}, which cannot be packed")
        stacked = is_stacked_experts(name, tensor.shape)
        if not (stacked or is_block_linear(name, tensor.shape)) or left_dense_reason(name, left_dense) is not None:
            continue
        experts = tensor.shape[0] if stacked else 0
        transposed = _transposed(name, tensor, {**config, "model_type": model_type})
        rows, columns = tensor.shape[:-3:-1] if transposed else tensor.shape[-2:]
        if columns % m:
            raise InputError(f"{name} has a width of {columns}, which does not divide by m = {m}: choose another m")
        specs[name] = PackedSpec(max(1, experts) * rows, columns, n, m, dtype or _values(tensor), transposed, experts)
    if not specs:
        raise InputError(f"{source} has no linear layer inside transformer blocks to pack")
    if head == "int8":
        table = _table(source, stored)
        specs[table] = PackedSpec(*stored[table].shape, 0, 0, "int8")
    paths = sorted({tensor.file for tensor in stored.values()})
    count = len(paths)
    files = []
    for i, path in enumerate(paths, 1):
        new = format.FILE if count == 1 else f"castlm-{i:05d}-of-{count:05d}.safetensors"
        files.append((path, new, [name for name, tensor in stored.items() if tensor.file == path]))
    return PackPlan(stored, specs, files, cast)


def _table(source: Path, stored: Mapping[str, StoredTensor]) -> str:
    """The name of the weight of the output head, or of the embedding that it is tied to.

    Raises:
        InputError: the model has no plain head, or its files and its config do not agree on whether it is tied.
    """
    opened = open_config(source)
    model = shape_model(opened)
    if not can_pack_tables(model):
        raise InputError(
            f"the embedding or head of {opened.model_type} does more than look up and multiply: leave --head out"
        )
    tables = [module for module in (model.get_output_embeddings(), model.get_input_embeddings()) if module is not None]
    paths = {module: path for path, module in model.named_modules() if module in tables}
    found = []
    for module in tables:
        names = as_stored(model, f"{paths[module]}.weight", module.weight)
        found += [name for known in names for name in possible_names(model, known) if name in stored][:1]
    if not found:
        raise InputError(f"{source} stores no output head and no embedding: leave --head out")
    if opened.tie_word_embeddings and len(set(found)) > 1:
        raise InputError(f"{source} stores {found[0]}, which its config ties to the embedding: leave --head out")
    if opened.tie_word_embeddings and getattr(tables[0], "bias", None) is not None:
        raise InputError(f"the head of {opened.model_type} is tied and has a bias: leave --head out")
    return found[0]


def _transposed(name: str, tensor: StoredTensor, config: Mapping[str, Any]) -> bool:
    """Whether the last axis of a tensor is that of its outputs."""
    if len(tensor.shape) == 2:
        return stored_transposed(config["model_type"], name)
    experts, rows, columns = tensor.shape
    axis = experts_input_axis(config, name, (experts, rows, columns))
    if axis is None:
        raise InputError(f"which axis of {name} is its input is not known: name it in left_dense of castlm.json")
    return axis == 1


def _read_source(source: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    config = read_config(source)
    if not config:
        raise InputError(f"{source} has no config.json: give a model folder in Hugging Face format")
    if config.get("quantization_config"):
        raise InputError(f"{source} is packed or quantized already: give the model that was")
    return config, stored_tensors(source, config)


def _values(tensor: StoredTensor) -> str:
    names = {stored: values for values, stored in format.DTYPES.items() if values in FLOATS}
    if tensor.dtype not in names:
        raise InputError(
            f"{tensor.name} is stored as {tensor.dtype}, which cannot be packed: pass dtype bf16 to cast it"
        )
    return names[tensor.dtype]
