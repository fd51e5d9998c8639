"""Finds the weight files that transformers loads from a model folder, and refuses other weights beside them.

A folder with two sets of weights is refused: verifying one says nothing about the other, and which one is loaded
depends on the program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from castlm.core.errors import InputError
from castlm.files.reading import check_regular, read_json_object
from castlm.files.stored import INDEX, SINGLE, StoredTensor, read_header, read_weight_map, shard_files
from castlm.inference import formats
from castlm.models.layout import QUANT_METHOD

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|npz|pkl|pickle|onnx|tflite|mar|distcp|ot)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index[^/]*\.json$",
    re.IGNORECASE,
)
_NOT_OF_THE_MODEL = re.compile(r"(training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth)$")
"""Files of transformers' Trainer without weights of the model."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The castlm.json of a model folder; empty without one.

    Raises:
        InputError: it is not a JSON object, or its `left_dense` is none.
    """
    file = folder / "castlm.json"
    manifest = read_json_object(file) if file.is_file() else {}
    left_dense = manifest.get("left_dense", {})
    if not isinstance(left_dense, dict):
        raise InputError(f"{file}: left_dense is a {type(left_dense).__name__}, not an object of names and reasons")
    return manifest


def read_left_dense(folder: Path) -> dict[str, str]:
    """The reason for each dense module or parameter in the castlm.json of a model folder, by name."""
    return dict(read_manifest(folder).get("left_dense", {}))


def left_dense_reason(name: str, left_dense: Mapping[str, str]) -> str | None:
    """Why `name` is left dense, by its own entry or the entry of a module that contains it."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((str(left_dense[owner]) for owner in owners if owner in left_dense), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder; empty without one.

    Raises:
        InputError: it is not a JSON object, or its `model_type` is not a name.
    """
    file = folder / "config.json"
    config = read_json_object(file) if file.exists() else {}
    if not isinstance(config.get("model_type"), str | None):
        raise InputError(f"{file}: model_type is {config['model_type']!r}, not a name: fetch or write it again")
    return config


def stored_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that transformers would load from a .safetensors file, or from a folder with one or several.

    Args:
        config: the content of the folder's config.json.

    Raises:
        InputError: the path does not exist, holds no safetensors or more than one set of weights, is one file of
            several, or its index names files or tensors that are missing.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist: name a model folder or a .safetensors file")
    if not path.is_dir():
        return _one_file(path)
    if (path / "adapter_config.json").exists():
        raise InputError(f"{path} holds an adapter, not a model: merge it into its base model first")
    names = (formats.FILE, formats.INDEX) if is_packed(config) else (SINGLE, INDEX)
    single, index = (path / name for name in names)
    if is_packed(config):
        named = config["quantization_config"].get("weights", formats.FILE)
        if named != (single if single.exists() else index).name:
            raise InputError(f"{path / 'config.json'} names the weights {named!r}, which castlm does not write")
    if single.exists():
        tensors, index_read = read_header(single), ()
    elif index.exists():
        tensors, index_read = _sharded(index), (index.name,)
    else:
        other = _other_weights(path)
        remedy = "name a .safetensors file by its own path, convert others with save_pretrained"
        hint = f"it holds {other}: {remedy}" if other else "is it a model folder?"
        raise InputError(f"{path} holds no {single.name} and no {index.name} ({hint})")
    read = {*index_read, *(tensor.file.name for tensor in tensors.values())}
    if other := _other_weights(path, read):
        raise InputError(
            f"{path} holds {other} beside {max(read)}: only one of them would be verified, and a program may load the "
            "other; move one away"
        )
    return tensors


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a folder in castlm's packed format."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _one_file(file: Path) -> dict[str, StoredTensor]:
    tensors = read_header(file)
    for index in (file.parent / INDEX, file.parent / formats.INDEX):
        is_whole = file.name in (SINGLE, formats.FILE)
        if index.is_file() and not is_whole and file.name in read_weight_map(index).values():
            raise InputError(f"{file} is one of several files of a model: verify the folder {file.parent}")
    return tensors


def _other_weights(folder: Path, read: Collection[str] = ()) -> str | None:
    """The first file of weights in `folder` that is not among `read`."""
    names = sorted(os.listdir(folder))
    return next((n for n in names if n not in read and _WEIGHTS.search(n) and not _NOT_OF_THE_MODEL.match(n)), None)


def _sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_weight_map(index)
    shards = {file: read_header(check_regular(index.parent / file)) for file in shard_files(index, weight_map)}
    absent = [name for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        first = f"{absent[0]} in {weight_map[absent[0]]}"
        raise InputError(f"{index} names {len(absent)} tensors that its files lack, first {first}")
    tensors: dict[str, StoredTensor] = {}
    for file, shard in shards.items():
        if twice := sorted(tensors.keys() & shard.keys()):
            raise InputError(f"{twice[0]} is stored in {tensors[twice[0]].file.name} and in {file}: remove one of them")
        tensors |= shard
    return tensors
