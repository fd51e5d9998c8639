"""Finds the weight files and layers that transformers loads from a model folder, and refuses other weights beside them.

A folder with two sets of weights is refused: verifying one says nothing about the other, and which one is loaded
depends on the program. The counts of `verify` would also mean nothing if transformers opened other files or filled
layers with random numbers. So transformers itself builds the config and the model, on the meta device, where weights
take no memory, and the model is asked how it multiplies by each of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castlm.core.blocks import in_block
from castlm.core.errors import InputError, one_line
from castlm.core.nm import Pattern
from castlm.facts import Facts
from castlm.files.record import RESULT
from castlm.models.locate import check_holds_model
from castlm.models.weights import (
    OLD_BUFFERS,
    loading_only,
    names_no_weights,
    parts_of_config,
    places_in,
    stored_weights,
)
from castlm.patterns import parse_pattern
from castlm_runtime.formats import FORMATS, PACKABLE
from castlm_runtime.reading import read_json_object, user_path
from castlm_runtime.stored import (
    INDEX,
    PACKED_INDEX,
    PACKED_SINGLE,
    QUANT_METHOD,
    SINGLE,
    StoredTensor,
    check_weight_files,
    packed_weights,
    read_header,
    read_weight_map,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    kinds = [name for name in PACKABLE if FORMATS[name].group]
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
        raise InputError(f"{folder / RESULT} names no pattern, as the model is dense: pass the pattern to count")
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
    packed = packed_weights(config.get("quantization_config"), f"config.json of {path}")
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


@dataclass(frozen=True)
class StoredUse:
    """How a model multiplies by a stored tensor."""

    parameter: str
    """The parameter that is made of it, or a part of it."""
    axis: int | None
    """The axis of the stored tensor that products sum over; None if there is no product, or if it is not known."""
    width: int
    """The number of terms of a sum; fewer than the length of the axis where the tensor holds several matrices."""
    what: str
    """The uses in words."""
    is_known: bool
    can_pack: bool
    """Whether a packed layer can take the place of the module that multiplies by it."""


def check_layers(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: Config,
    ignored: Collection[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, StoredUse]:
    """Checks that transformers loads `tensors`, and that they are exactly the weights of the model.

    Args:
        path: the model folder.
        tensors: the stored tensors; of a packed folder by their names and shapes in a plain one.
        config: the content of config.json.
        ignored: names of tensors that may be stored though the model does not have them.
        trust_remote_code: run the code of a model that transformers does not have.

    Returns:
        How the model multiplies by each tensor with two axes or more that becomes a parameter, by the tensor's name.

    Raises:
        InputError: config.json sends transformers to other weights, the model has code of its own that is not trusted,
            or a weight is missing, has no place in the model, or has another shape.
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
    if not trust_remote_code and has_own_code(config):
        raise InputError(
            f"{path} has its own code, which alone says how its weights are multiplied by: pass trust_remote_code "
            "if you have read it and trust it"
        )
    from castlm.models.io import some_of

    model, unexpected = load_on_meta(path, config, tensors, trust_remote_code)
    unknown = [
        name
        for name in sorted(tensors.keys() & unexpected - set(ignored))
        if len(tensors[name].shape) >= 2 and in_block(name) and not OLD_BUFFERS.search(name)
    ]
    if unknown:
        raise InputError(
            f"{path} holds {some_of(unknown)}, which its config.json does not describe: fetch or write it again"
        )
    return _stored_uses(model, tensors)


def _stored_uses(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredUse]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from castlm.models.products import uses_of

    shapes = {name: tensor.shape for name, tensor in tensors.items() if len(tensor.shape) >= 2}
    places, uses = places_in(model, shapes), uses_of(model)
    stored_uses: dict[str, StoredUse] = {}
    for name, shape in shapes.items():
        place = places[name]
        if (use := uses.get(place.name)) is None:
            continue
        module = model.get_submodule(place.name.rpartition(".")[0])
        axis = use.axis
        if axis is not None and place.is_turned and axis in (-1, -2):
            axis = -3 - axis
        is_counted = axis is not None and -axis <= len(shape) and place.is_known
        # A packed layer takes the place of one that has the whole stored matrix, neither more nor less.
        is_whole = sorted(shape) == sorted(model.get_parameter(place.name).shape)
        is_layer = is_whole and type(module) in (nn.Linear, Conv1D)
        is_layer = is_layer or isinstance(getattr(module, "is_transposed", None), bool)
        stored_uses[name] = StoredUse(
            place.name,
            len(shape) + axis if axis is not None and is_counted else None,
            use.width,
            str(use) if place.is_known else f"{use}, in another order than in the file",
            is_counted if use.summed else use.is_known,
            is_layer and is_counted and use.is_called,
        )
    return stored_uses


def has_own_code(config: Config) -> bool:
    """Whether config.json names code of the model's own, and a class or a family that transformers does not have."""
    if not config.get("auto_map"):
        return False
    import transformers

    named = config.get("architectures")
    is_native = all(hasattr(transformers, str(name)) for name in (named if isinstance(named, list) else []))
    return not is_native or config.get("model_type") not in transformers.CONFIG_MAPPING


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


def load_on_meta(
    folder: Path, described: Config, tensors: Mapping[str, StoredTensor], trust_remote_code: bool = False
) -> tuple[PreTrainedModel, set[str]]:
    """Loads the model folder without its data, as the class that its config.json names.

    Args:
        described: the content of config.json, which transformers must read alike where it decides about the weights.
        tensors: the stored tensors, whose files transformers must load, all of them and no others.

    Returns:
        The model on the meta device, plain if the folder is packed, and the names of the stored tensors that the class
        does not have.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from castlm.models.architecture import auto_class
    from castlm.models.io import check_loading_info, check_no_kernels, quiet_transformers
    from castlm.packed.register import register

    register()  # the class of a packed folder is asked of transformers too
    try:
        with loading_only(tensors.values()), quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            check_no_kernels(config, folder)
            text = config.get_text_config(decoder=True)
            for key in ("transformers_weights", "quantization_config", "model_type"):
                value = getattr(config, key, None) or getattr(text, key, None) or None
                if value != (described.get(key) or None):
                    raise InputError(
                        f"{folder / 'config.json'}: transformers reads {key} = {value!r:.100}: write it again"
                    )
            of_family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
            named = str((config.architectures or [of_family])[0])
            kind: Any = getattr(transformers, named, None)
            # Families such as EXAONE 3 have a config of their own and another family's class.
            is_of_config = (
                isinstance(kind, type)
                and issubclass(kind, transformers.PreTrainedModel)
                and (kind.config_class is type(config) or named == of_family)
            )
            remote: dict[str, Any] = {}
            if trust_remote_code and getattr(config, "auto_map", None):
                kind, is_of_config, remote = auto_class(config), True, {"trust_remote_code": True}
            if not is_of_config:
                raise InputError(
                    f"{folder}: transformers has no architecture {named!r} of a {config.model_type}: which layers "
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
                use_kernels=False,  # of the hub: none computes on meta
                **remote,
            )
            model, info = loaded  # as `output_loading_info` asks
            if is_packed(described):  # its layers are packed ones
                del config.quantization_config
                with torch.device("meta"):
                    model = type(model)(config)
    except InputError:
        raise
    except Exception as error:  # configs fail with errors of any type
        raise InputError(f"transformers cannot say which layers {folder} should hold: {one_line(error)}") from error
    check_loading_info(folder, info)
    return model, set(info["unexpected_keys"])
