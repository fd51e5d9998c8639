"""The weights of a model: the files that transformers' own resolver names, and nothing else while they are loaded.

Which files a model is loaded from depends on config.json, on what lies beside it, and on the version of transformers.
Predicting this has been wrong; so every reader of weights (`verify`, loading, sharded loading, packing) asks here, and
`loading_only` compares the answer with the files that transformers is about to open.

Neither torch nor transformers is imported before a function needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from castlm.core.errors import InputError, one_line
from castlm.models.locate import check_holds_model
from castlm_runtime.stored import (
    INDEX,
    PACKED_INDEX,
    SINGLE,
    StoredTensor,
    check_weight_files,
    check_weight_name,
    read_headers,
    read_weight_map,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LOADING = threading.RLock()


def stored_weights(
    target: str | Path, packed: str | None = None, revision: str | None = None
) -> dict[str, StoredTensor]:
    """The tensors that transformers loads from a model folder or a hub repository, by name.

    A hub repository is downloaded into the cache.

    Args:
        target: the folder, or the id.
        packed: `packed_weights` of its config.json.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: there are no weights in safetensors, or an index names other files than those, missing files, or
            tensors that are not stored exactly once, where it says.
    """
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    index = Path(target, packed or INDEX)
    if index.name in (INDEX, PACKED_INDEX) and index.is_file() and (packed or not Path(target, SINGLE).exists()):
        read_weight_map(index)  # reports a damaged index better than transformers
    try:
        resolved, sharded = _get_resolved_checkpoint_files(
            pretrained_model_name_or_path=str(target),
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=packed,
            download_kwargs={"revision": revision},
        )
    except Exception as error:  # of any type
        where, lacks = index if index.is_file() else target, "it lacks " if isinstance(error, KeyError) else ""
        raise InputError(f"transformers finds no weights in {where}: {lacks}{one_line(error)}") from error
    files = [Path(file) for file in resolved or ()]
    weight_map: Mapping[str, Any] = (sharded or {}).get("weight_map", {})
    for name in [*weight_map.values(), *(file.name for file in files)]:
        check_weight_name(name, target)
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(f"{index} names {len(missing)} missing files, first {missing[0]}: the folder is not complete")
    check_weight_files(files, Path(target) if Path(target).is_dir() else None)
    return read_headers(files, weight_map, index)


class PlaceInModel(NamedTuple):
    """The place of a stored tensor in a model."""

    name: str
    """In the model's state dict; a tensor for which the model has no place keeps its own name, or gets one."""
    is_turned: bool
    """Whether its last two axes are swapped while it is loaded."""
    is_known: bool
    """Whether its axes keep their order and their parts; where they may not, as in a permutation, no axis is known."""


def places_in(model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]]) -> dict[str, PlaceInModel]:
    """Where `from_pretrained` loads each stored tensor of a model.

    transformers renames tensors by patterns, of which many match more names than those that a family writes. So its own
    function is asked for each name.

    Args:
        model: as its class makes it, on the meta device.
        stored: the shapes of the tensors, by name.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keeps_axes = (loading.MergeModulelist, loading.Concatenate, loading.SplitModulelist, loading.Chunk, loading.Split)
    prefix, inside = model.base_model_prefix, model.state_dict()
    places: dict[str, PlaceInModel] = {}
    for key, shape in stored.items():
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, inside)
        if name not in inside and key in inside:
            name, pattern = loading.rename_source_key(key, [], [], prefix, inside)
        operations = [step for each in converters if pattern in each.source_patterns for step in each.operations]
        turns = [step for step in operations if isinstance(step, loading.Transpose)]
        others = [step for step in operations if step not in turns and not isinstance(step, keeps_axes)]
        # Some transpose only a tensor that has another shape than the parameter.
        is_turned = any(not (step.check_dims and shape == shapes.get(name)) for step in turns)
        of_last = all({step.dim0, step.dim1} in ({1, 2}, {-1, -2}) or len(shape) == 2 for step in turns)
        places[key] = PlaceInModel(name, is_turned, len(turns) <= 1 and of_last and not others)
    return places


@contextlib.contextmanager
def loading_only(stored: Iterable[StoredTensor]) -> Iterator[None]:
    """Makes `from_pretrained`, in this thread and inside the context, load the files of `stored` and no others.

    Raises:
        InputError: transformers was about to read another list of files, before it read one; or it loaded weights in
            another way, after it did.
    """
    from transformers import PreTrainedModel

    wanted = {os.path.abspath(tensor.file) for tensor in stored}
    thread = threading.get_ident()
    compared = False

    def load_compared(model: Any, state_dict: Any, checkpoint_files: Any, *rest: Any, **named: Any) -> Any:
        nonlocal compared
        if threading.get_ident() == thread:
            files = [Path(file) for file in checkpoint_files or ()]
            check_weight_files(files)
            if {os.path.abspath(file) for file in files} != wanted:
                raise InputError(
                    f"transformers would load {', '.join(map(str, files)) or 'no file'}, not {min(wanted, default='')}:"
                    " remove what names other weights from the model's config.json and folder"
                )
            check_holds_model(files[0].parent)  # beside which an adapter would be loaded
            compared = True
        return load(model, state_dict, checkpoint_files, *rest, **named)

    with _LOADING:
        load = PreTrainedModel._load_pretrained_model  # once no other thread's is in its place
        PreTrainedModel._load_pretrained_model = staticmethod(load_compared)  # type: ignore[method-assign]
        try:
            yield
        finally:
            PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
    if not compared:
        raise InputError(f"transformers loaded other weights than {min(wanted, default='')}: save the model again")


PACKED_NOTICE = (
    "castlm's packed format: install castlm and call castlm.register() before from_pretrained, or castlm unpack it"
)
"""`transformers_weights` of a packed folder. It names no file: transformers without castlm quotes it in its error."""


def names_no_weights(transformers_weights: object) -> bool:
    """Whether the entry `transformers_weights` of a config.json is absent, or the notice of any version of castlm."""
    return transformers_weights is None or str(transformers_weights).startswith(PACKED_NOTICE.partition(":")[0])


OLD_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Causal masks and rotary tables that old checkpoints store and today's models compute."""


def parts_of_config(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content of a config.json and of all configs in it, such as `text_config`, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts_of_config(value)
