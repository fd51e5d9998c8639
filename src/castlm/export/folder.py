"""Finds the weight files and layers that transformers loads from a model folder, and refuses other weights beside them.

A folder with two sets of weights is refused: verifying one says nothing about the other, and which one is loaded
depends on the program. The counts of `verify` would also mean nothing if transformers opened other files or filled
layers with random numbers. So transformers itself builds the config and the model, on the meta device, where weights
take no memory. Without a config.json, the blocks of a file are compared with each other.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from castlm.core.blocks import is_block_weight, is_tower, why_stored_dense
from castlm.core.errors import InputError, one_line
from castlm.core.nm import Pattern
from castlm.facts import Facts
from castlm.files.reading import read_json_object, user_path
from castlm.files.record import RESULT
from castlm.files.stored import (
    INDEX,
    PACKED_INDEX,
    PACKED_SINGLE,
    SINGLE,
    StoredTensor,
    check_weight_files,
    read_header,
    read_weight_map,
)
from castlm.formats.table import FORMATS
from castlm.models.layout import QUANT_METHOD, input_axis, names_no_weights, parts_of_config
from castlm.models.locate import check_holds_model
from castlm.models.weights import Place, loading_only, packed_weights, recording_places, stored_weights
from castlm.patterns import parse_pattern

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|npz|pkl|pickle|onnx|tflite|mar|distcp|ot)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index[^/]*\.json$",
    re.IGNORECASE,
)
_NOT_OF_THE_MODEL = re.compile(r"(training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth)$")
"""Files of transformers' Trainer without weights of the model."""


def read_facts(folder: Path) -> Facts:
    """The facts in the castlm.json of a model folder, without any entry if there is none.

    The kind of `rounded`, for a model that was trained with rounded weights, is the name of a format.
    """
    facts = Facts.read(folder)
    kinds = [form.name for form in FORMATS.values() if form.group]
    if facts.rounded is not None and facts.rounded.kind not in kinds:
        raise InputError(
            f"{folder / RESULT}: rounded.kind is {facts.rounded.kind!r:.100}, not {' or '.join(kinds)}: fetch it again"
        )
    return facts


def recorded_pattern(facts: Facts) -> Pattern | None:
    """The pattern in a castlm.json; None for a dense model. Raises `InputError` for a text that is no pattern."""
    return None if facts.pattern is None else parse_pattern(facts.pattern)


def pattern_of_files(path: str | Path) -> Pattern | None:
    """The pattern in the castlm.json of a model folder, or of the folder of a file; None without a castlm.json.

    Raises `InputError` if the file cannot be read, or names no pattern.
    """
    place = user_path(path)
    folder = place.parent if place.is_file() else place
    if not (folder / RESULT).is_file():
        return None
    facts = Facts.read(folder)
    found = recorded_pattern(facts)
    if found is None and facts.schema_version is None:  # no command of castlm made this model
        return None
    if found is None:
        raise InputError(f"{folder / RESULT} names no pattern, as of a dense model: give pattern 2:4 all the same")
    return found


def read_left_dense(folder: Path) -> dict[str, str]:
    """The reason for each dense module or parameter in the castlm.json of a model folder, by name."""
    return dict(read_facts(folder).left_dense)


def left_dense_reason(name: str, left_dense: Mapping[str, str]) -> str | None:
    """Why `name` is left dense, by its own entry or the entry of a module that contains it."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((str(left_dense[owner]) for owner in owners if owner in left_dense), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder; empty without one. Its `model_type`, if any, is a name."""
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
    if not path.is_dir():
        tensors = read_header(path)
        check_weight_files([path])
        for index in (path.parent / INDEX, path.parent / PACKED_INDEX):
            is_whole = path.name in (SINGLE, PACKED_SINGLE)
            if index.is_file() and not is_whole and path.name in read_weight_map(index).values():
                raise InputError(f"{path} is one of several files of a model: verify the folder {path.parent}")
        return tensors
    check_holds_model(path)
    packed = packed_weights(config.get("quantization_config"))
    names = (SINGLE, INDEX) if packed is None else (PACKED_SINGLE, PACKED_INDEX)
    if not any((path / name).exists() for name in names):
        other = _other_weights(path)
        remedy = "name a .safetensors file by its own path, convert others with save_pretrained"
        hint = f"it holds {other}: {remedy}" if other else "is it a model folder?"
        raise InputError(f"{path} holds no {names[0]} and no {names[1]} ({hint})")
    tensors = stored_weights(path, packed)
    read = {tensor.file.name for tensor in tensors.values()}
    if not read & {SINGLE, PACKED_SINGLE}:
        read.add(names[1])
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


def _other_weights(folder: Path, read: Collection[str] = ()) -> str | None:
    """The first file of weights in `folder` that is not among `read`."""
    names = sorted(os.listdir(folder))
    return next((n for n in names if n not in read and _WEIGHTS.search(n) and not _NOT_OF_THE_MODEL.match(n)), None)


# ---- what transformers loads

Config = Mapping[str, Any]

_REDIRECTIONS = ("configuration_files", "transformers_weights", "attribute_map")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
"""Files that transformers takes for a distributed checkpoint before it looks for model.safetensors."""


def check_layers(path: Path, tensors: Mapping[str, StoredTensor], config: Config, ignored: Collection[str] = ()) -> str:
    """Checks that transformers loads `tensors`, and that they are exactly the linear layers of the model.

    Args:
        path: the model folder.
        tensors: the stored tensors.
        config: the content of config.json.
        ignored: names of tensors that may be stored though the model does not have them.

    Returns:
        A description of what the layers were compared with.

    Raises:
        InputError: config.json sends transformers to other weights, or a layer is missing, has no place in the model,
            has another shape, or is made of a tensor that would be counted as something else.
    """
    check_redirections(path, config)
    fields = (field for part in parts_of_config(config) for field in part.items())
    for name, value in fields:  # before anything loops over so many blocks or experts
        count = re.search(
            r"(?:^|_)n(?:um)?_(?:\w+_)?(layer|block|expert)s?(?:_per_\w+)?$|^(?:en|de)coder_(layer)s$", name
        )
        if count is None or type(value) is not int:
            continue
        if value < 0 or value > (65_536 if count[1] == "expert" else max(1000, len(tensors))):
            raise InputError(f"config.json of {path} says {name} = {value}, and it holds {len(tensors)} tensors")
    if config.get("auto_map"):
        import transformers

        named = config.get("architectures")
        is_native = all(hasattr(transformers, str(name)) for name in (named if isinstance(named, list) else []))
        if not is_native or config.get("model_type") not in transformers.CONFIG_MAPPING:
            check_uniform(path, tensors)  # its own code makes its layers
            return "each other"
    from castlm.models.io import some_of

    unexpected = load_on_meta(path, config, tensors)
    linear = [
        name
        for name in sorted(tensors.keys() & unexpected - set(ignored))
        if is_block_weight(name, tensors[name].shape)
    ]
    if linear:
        raise InputError(
            f"{path} holds {some_of(linear)}, which its config.json does not describe: fetch or write it again"
        )
    return "transformers"


def check_redirections(folder: Path, config: Config) -> None:
    """Refuses entries that make transformers read other files than config.json and the weights beside it.

    `configuration_files` names another config.json, `transformers_weights` other weights. An `attribute_map` gives
    fields other names, at any depth.
    """
    for part in parts_of_config(config):
        for key, value in part.items():
            is_redirection = key in _REDIRECTIONS and not names_no_weights(value)
            if is_redirection or (key == "quantization_config" and part is not config):
                raise InputError(f"{folder / 'config.json'} names other weights or fields in {key}: remove that entry")
    if parts := [file.name for file in folder.iterdir() if _DISTRIBUTED.match(file.name)]:
        raise InputError(f"{folder} holds {parts[0]}, a part of a distributed checkpoint: save the whole model")


def load_on_meta(folder: Path, described: Config, tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Loads the model folder without its data, as the class that its config.json names.

    Args:
        described: the content of config.json, which transformers must read alike where it decides about the weights.
        tensors: the stored tensors, whose files transformers must load, all of them and no others.

    Returns:
        The names of the stored tensors that the class does not have.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from castlm.models.io import check_loading_info, check_no_kernels, quiet_transformers
    from castlm.runtime.register import register

    register()  # the class of a packed folder is asked of transformers too
    try:
        with (
            loading_only(tensors.values()),
            recording_places() as places,
            quiet_transformers(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            check_no_kernels(config, folder)
            text = config.get_text_config(decoder=True)
            for key in ("transformers_weights", "quantization_config", "model_type"):
                value = getattr(config, key, None) or getattr(text, key, None) or None
                if value != (described.get(key) or None):
                    raise InputError(
                        f"{folder / 'config.json'}: transformers reads {key} = {value!r:.100}: write it again"
                    )
            named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
            kind = getattr(transformers, str(named[0]), None)
            if not (
                isinstance(kind, type)
                and issubclass(kind, transformers.PreTrainedModel)
                and kind.config_class is type(config)
            ):
                raise InputError(
                    f"{folder}: transformers has no architecture {named[0]!r} of a {config.model_type}: which layers "
                    "it holds is unknown"
                )
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                use_safetensors=True,
            )
            model, info = loaded  # as `output_loading_info` asks
    except InputError:
        raise
    except Exception as error:  # configs fail with errors of any type
        raise InputError(f"transformers cannot say which layers {folder} should hold: {one_line(error)}") from error
    check_loading_info(folder, info)
    _check_places(folder, described, tensors, model, places)
    return set(info["unexpected_keys"])


def _check_places(
    folder: Path, described: Config, tensors: Mapping[str, StoredTensor], model: Any, places: Mapping[str, Place]
) -> None:
    """Refuses a stored tensor whose name hides the layer that it becomes, or the axis of the layer's inputs.

    By its name, a tensor is counted or stays dense; in the model, it may have another one. The tensors of a packed
    folder have no place in `places`, because castlm's own loader reads them and compares them with their layers.
    """
    from transformers.pytorch_utils import Conv1D

    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    dense, dense_there = (why_stored_dense(of) for of in ({name: t.shape for name, t in tensors.items()}, shapes))
    for name, place in places.items():
        if name not in tensors or place.name not in shapes:
            continue
        shape, loaded = tensors[name].shape, shapes[place.name]
        if name in dense and place.name not in dense_there and len(loaded) >= 2:
            raise InputError(
                f"{folder} holds {name}, by its name {dense[name]}, which transformers loads into {place.name}: write "
                "the model again"
            )
        axis = input_axis(described, name, shape) if is_block_weight(name, shape) else None
        if axis is None or len(shape) != len(loaded):
            continue
        module = model.get_submodule(place.name.rpartition(".")[0])
        is_transposed = getattr(module, "is_transposed", None) if len(shape) == 3 else isinstance(module, Conv1D)
        if not isinstance(is_transposed, bool):
            continue  # as in Llama 4, whose experts do not state their order
        is_transposed ^= place.is_turned and not (place.by_shape and shape == loaded)
        if is_transposed != (axis == len(shape) - 2):
            order = "in, out" if is_transposed else "out, in"
            raise InputError(
                f"{name} of {folder} is stored as ({order}), which castlm does not know of a {described['model_type']}"
            )


def check_uniform(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses transformer blocks that differ in their layers, or whose numbers have a gap."""
    blocks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in tensors.items():
        if len(tensor.shape) >= 2 and not is_tower(name) and (match := re.match(r"(|.*?\.)(\d{1,9})\.(.+)", name)):
            blocks[match[1]][int(match[2])].add(match[3])
    for stem, of_index in blocks.items():
        everything = set().union(*of_index.values())
        for index in range(max(of_index) + 1 if len(of_index) > 1 else 0):
            if index not in of_index or (lacking := sorted(everything - of_index[index])):
                what = f"{lacking[0]}, which other blocks have" if index in of_index else "every layer"
                raise InputError(
                    f"{stem}{index} of {path} lacks {what}: without a config.json that names the layers, "
                    "only a checkpoint of equal blocks can be verified"
                )
