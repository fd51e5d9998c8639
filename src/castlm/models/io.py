"""Opens, loads and saves Hugging Face models: what is loaded is complete and finite, and saved as its family stores it.

`open_model` reads and checks config and tokenizer before any weights. transformers fills missing weights with random
numbers and only warns; here they are an error. Its errors, of any type and many lines, become one line. Between load
and save, layers are as `castlm.models.architecture.linearize_` makes them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from castlm.core.errors import InputError, check_finite, check_type, is_panic
from castlm.dtypes import FLOATS, STORED, dtype_name
from castlm.files.weights import Batch, into_files, layout_of, write_weights
from castlm.models.architecture import (
    auto_class,
    check_of_transformers,
    embedding_weight,
    is_vision_language,
    linearize_,
    vocab_size,
)
from castlm.models.gguf import fast_gguf, forget_gguf, num_elements
from castlm.models.locate import Location, find
from castlm.models.stored_layout import StoredLayout, by_block
from castlm.models.weights import OLD_BUFFERS, loading_only, names_no_weights, stored_weights
from castlm_runtime.stored import QUANT_METHOD, StoredTensor, packed_weights, read_header

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
"""Files beside the tokenizer's that the processor of a vision-language model is loaded from."""
MAX_SHARD_BYTES = 50 * 10**9
"""The largest weight file of a model."""
_MAX_LAYERS = 10_000
_NO_TOKENIZER = "{} holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it"


def open_model(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[Location, PretrainedConfig, PreTrainedTokenizerBase]:
    """Location, config and tokenizer of a model, without its weights.

    Raises:
        InputError: the model does not exist, is not a causal language model, is quantized or an adapter, or has no
            tokenizer.
    """
    where = find(name, revision)
    config = load_config(where, trust_remote_code)
    with quiet(where), as_input_error(where):
        tokenizer = AutoTokenizer.from_pretrained(
            where.target, **where.gguf, revision=where.revision, trust_remote_code=trust_remote_code
        )
        token_ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    tokenizer.name_or_path = where.source  # which a record names; the folder of a cached model or a GGUF is no name
    # Without its files, some classes still load, with an empty vocabulary or special tokens alone.
    if not set(token_ids) - set(tokenizer.all_special_ids):
        raise InputError(_NO_TOKENIZER.format(where))
    return where, config, tokenizer


def open_config(name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, which need not have weights or a tokenizer; otherwise as `open_model`."""
    return load_config(find(name, revision, needs_weights=False), trust_remote_code)


def load_config(where: Location, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model at a place; otherwise as `open_config`."""
    with quiet(where), as_input_error(where):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            where.target, **where.gguf, revision=where.revision, trust_remote_code=trust_remote_code
        )
    check_num_layers(config, where)
    if not trust_remote_code:
        check_no_kernels(config, where)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = config.architectures or ([causal] if causal else [])
    if not isinstance(named, list) or not all(isinstance(architecture, str) for architecture in named):
        raise InputError(f"{where} says architectures = {named!r:.200}: a list of names is needed")
    is_causal = any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in named)
    if is_vision_language(config):
        text = config.get_text_config()
        is_known = isinstance(text, PretrainedConfig) and text is not config  # with a language model of its own
    else:
        is_known = remote or (causal is not None and is_causal and not config.is_encoder_decoder)
    if not is_known:
        raise InputError(
            f"{where} is {', '.join(named) or 'a model'} of type {config.model_type}, no causal language model that "
            "transformers loads: give a whole ...ForCausalLM or ...LMHeadModel, or a vision-language model such as "
            "LLaVA or Qwen-VL"
        )
    method = quantization_method(config)
    if method not in (None, QUANT_METHOD):
        raise InputError(f"the weights of {where} are quantized ({method}): give the model before quantization")
    return config


def check_num_layers(config: PretrainedConfig, where: Location | Path) -> None:
    """Raises `InputError` for a number of layers that is absurd and would occupy the machine for hours."""
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if type(num_layers) is not int or not 0 < num_layers <= _MAX_LAYERS:
        raise InputError(f"{where} says num_hidden_layers = {num_layers}: a number from 1 to {_MAX_LAYERS} is needed")


def check_no_kernels(config: PretrainedConfig, where: Location | Path) -> None:
    """Raises `InputError` for a config.json that names attention of the hub, whose code transformers would run."""
    for part in parts_of_config(config):
        for field in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if "/" in str(getattr(part, field, None)):
                raise InputError(
                    f"{where} asks for the code of {getattr(part, field)!r:.200}: take attn_implementation out of its "
                    "config.json, or pass trust_remote_code if you trust it"
                )


def parts_of_config(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The config and those that it holds, at any depth."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts_of_config(value)


_OF_A_COPY = frozenset(
    ["_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config"]
)
"""Entries of a config that differ between two copies of a model, or with how it was loaded."""


def config_hash(config: PretrainedConfig) -> str:
    """A SHA-256 of what a config says about the model, such as its rotary base, the same for each way of loading it."""

    def said(part: Mapping[str, Any]) -> dict[str, Any]:
        entries = {name: value for name, value in part.items() if name not in _OF_A_COPY}
        return {name: said(value) if isinstance(value, Mapping) else value for name, value in entries.items()}

    content = json.dumps(said(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


_OF_A_LOAD = frozenset(["name_or_path", "is_local", "local_files_only", "transformers_version"])
"""Entries of tokenizer_config.json that depend on where a tokenizer was loaded from."""


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 of the files that a tokenizer is saved as, the same for each way of loading it."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.name == "tokenizer_config.json":
                kept = {name: value for name, value in json.loads(content).items() if name not in _OF_A_LOAD}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(f"{file.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def quantization_method(config: PretrainedConfig) -> str | None:
    """`quant_method` of a config; None for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return str(found.get("quant_method", "?") if isinstance(found, dict) else found.quant_method)


def check_loading_info(where: object, info: Mapping[str, Any]) -> None:
    """Raises `InputError` for a weight that is missing or has another shape, by the loading info of transformers."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{name} of {where} is stored as {tuple(stored)}, and its config.json asks for {tuple(expected)}: they do "
            "not belong together"
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{where} lacks {some_of(missing)} that its config.json asks for: fetch or write it again")


def some_of(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


@contextlib.contextmanager
def as_input_error(where: Location) -> Iterator[None]:
    """Turns transformers' errors, of any type and many lines, into one line."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())
        if not reason or isinstance(error, LookupError):
            reason = repr(error)  # str(KeyError("a")) is just 'a'
        raise InputError(_explain(where, reason)) from error


def _explain(where: Location, reason: str) -> str:
    if "Couldn't instantiate the backend tokenizer" in reason:
        return _NO_TOKENIZER.format(where)
    if "trust_remote_code" in reason:
        return f"{where} runs its own code: pass trust_remote_code if you have read it and trust it"
    reason = re.split(r"(?<=[.!?]) ", reason)[0][:240]
    if where.is_hub:
        return f"{where} is neither a local folder nor available on the Hugging Face Hub: {reason}"
    if "not a valid JSON file" in reason:
        reason = f"{reason.rstrip('.')}: fetch it again"
    return f"cannot load {where}: {reason}"


@contextlib.contextmanager
def quiet(where: Location) -> Iterator[None]:
    """Silences transformers' reports, but for the progress of a possible download; reads GGUF files fast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers(progress=where.is_hub))
        if where.gguf:  # dequantization shows a progress bar that cannot be turned off
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(fast_gguf())
        yield


@contextlib.contextmanager
def quiet_transformers(progress: bool = False) -> Iterator[None]:
    """Silences transformers during the block; shows progress bars only with `progress`."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True)
class Loaded:
    """A model ready to train, with its tokenizer and source."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """The folder, hub id (with `@revision` if one was given) or file, for the record of a run."""
    dtype: torch.dtype = torch.float32
    """The dtype of the stored weights; `model` may hold them in another."""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
    unpack: bool = True,
) -> Loaded:
    """Loads a causal language model, or a vision-language model, and its tokenizer.

    The model is on the CPU, in eval mode, and made of layers (`linearize_`).

    Args:
        name: a folder in Hugging Face format, plain or packed (unpacked), a hub id, a `.gguf` file (dequantized) or
            "demo".
        dtype: dtype of the loaded weights; None keeps the stored one.
        trust_remote_code: run the model's own Python code.
        revision: branch, tag or commit of a hub id.
        unpack: turn the layers of a packed folder into dense ones. Otherwise castlm's CPU kernels run them, as in
            `castlm generate`, without gradients.

    Returns:
        A record with `model`, `tokenizer`, `source`, and `dtype` of the stored weights.

    Raises:
        InputError: the model does not exist, is not a causal language model, is quantized or an adapter, has no
            tokenizer, or its weights are pickled, corrupt, missing, left over, of another shape or not finite.
    """
    where, config, tokenizer = open_model(name, trust_remote_code=trust_remote_code, revision=revision)
    stored = stored_dtype(where, config)
    runs_packed = quantization_method(config) == QUANT_METHOD and not unpack
    if unpack:
        unpack_on_load_(config)
    model = load_weights(where, config, dtype=dtype or stored, trust_remote_code=trust_remote_code)
    num_embeddings = vocab_size(config) if runs_packed else len(embedding_weight(model))
    if tokenizer.vocab_size > num_embeddings:
        raise InputError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} entries, its model {num_embeddings}: "
            "they do not belong together"
        )
    if not runs_packed:
        linearize_(model)
    return Loaded(model.eval(), tokenizer, where.source, stored)


def unpack_on_load_(config: PretrainedConfig) -> bool:
    """Makes loading unpack a packed folder to dense layers; returns whether the config describes one."""
    is_packed = quantization_method(config) == QUANT_METHOD
    if is_packed:
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    return is_packed


def load_weights(where: Location, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of an opened location, from safetensors or GGUF alone; `options` go to `from_pretrained`."""
    if quantization_method(config) == QUANT_METHOD:
        from castlm.packed.register import register  # transformers asks for its quantizer while it loads

        register()
    weights: dict[str, Any] = {"use_safetensors": True}
    only: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if where.gguf:
        weights = {**where.gguf, "quantization_config": GgufConfig(dequantize=True)}
    else:
        only = loading_only(weights_of(where, config).values())
    with quiet(where), as_input_error(where), only:
        loaded: Any = auto_class(config).from_pretrained(
            where.target,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loading_info` reports them in one line
            revision=where.revision,
            use_kernels=False,  # code of the hub, which computes other bits
            **weights,
            **options,
        )
    forget_gguf()
    model: PreTrainedModel = loaded[0]
    loading_info: dict[str, Any] = loaded[1]
    check_loading_info(where, loading_info)
    unexpected = sorted(name for name in loading_info["unexpected_keys"] if not OLD_BUFFERS.search(name))
    if unexpected:
        raise InputError(
            f"{type(model).__name__} has no place for {some_of(unexpected)} of {where}: the weights belong to another "
            "config.json"
        )
    for name, param in model.named_parameters():
        check_finite(f"{name} of {where}", param.detach())
    return model


def weights_of(where: Location, config: PretrainedConfig) -> dict[str, StoredTensor]:
    """The stored tensors that transformers loads of an opened location, plain or packed, by name; not of GGUF."""
    if not names_no_weights(named := getattr(config, "transformers_weights", None)):
        raise InputError(f"config.json of {where} names other weights ({named!r:.200}): remove transformers_weights")
    packed = packed_weights(getattr(config, "quantization_config", None), f"config.json of {where}")
    with quiet(where):
        return stored_weights(where.target, packed, where.revision)


def fp32_bytes(name: str, revision: str | None = None) -> int:
    """Bytes of a model in fp32; 0 if it is not on this machine."""
    where = find(name, revision)
    if where.gguf:
        return 4 * num_elements(Path(where.target) / where.gguf["gguf_file"])
    files = [] if where.is_hub else sorted(Path(where.target).glob("*.safetensors"))
    return 4 * sum(math.prod(tensor.shape) for file in files for tensor in read_header(file).values())


def stored_dtype(where: Location, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the stored weights, by the config or else by the largest tensor.

    GGUF counts as bf16: its source had 16 bits in nearly every case, and its own blocks have fewer.
    """
    if where.gguf:
        return torch.bfloat16
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if dtype is None and not where.is_hub:
        stored = weights_of(where, config).values()
        largest = max(stored, key=lambda tensor: math.prod(tensor.shape), default=None)
        dtype = None if largest is None else STORED.get(largest.dtype)
    return dtype if isinstance(dtype, torch.dtype) and dtype in FLOATS.values() else torch.float32


def save_dtype(wanted: str, stored: torch.dtype) -> torch.dtype:
    """The dtype of a result: for "source" the dtype of the source model, otherwise the one of that name."""
    return stored if wanted == "source" else FLOATS[wanted]


@contextlib.contextmanager
def parameters_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Converts the parameters of `model` to `dtype` during the block; afterwards they have their own dtype and rounded
    values.

    Buffers keep their dtype, because rotary frequencies are computed in fp32. None changes nothing.
    """
    before = {p: p.dtype for p in model.parameters() if dtype is not None and p.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, was in before.items():
            parameter.data = parameter.data.to(was)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes safetensors, config, generation config and tokenizer, from which `from_pretrained` loads the same model.

    The weights keep their dtype. The model is not changed and can be trained further. The converted weights of one
    transformer block are in memory at a time.

    Args:
        max_shard_bytes: largest weight file; larger weights are written to several files of whole transformer blocks.

    Raises:
        InputError: weight scaling that is not folded.
    """
    check_of_transformers(model)
    check_tokenizer(tokenizer)
    hidden = next((name for name, _ in model.named_parameters() if "parametrizations" in name.split(".")), None)
    if hidden:
        raise InputError(f"{hidden} cannot be saved under that name: fold_weight_scaling(model) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(progress=False):
        batches = [_batch_of(model, group) for group in by_block(_stored_values(model))]
        write_weights(folder, into_files(batches, max_shard_bytes), num_parameters=model.num_parameters())
    write_all_but_weights(model, tokenizer, folder, model.dtype)


def check_tokenizer(tokenizer: object) -> None:
    """Raises `InputError` for anything but a tokenizer of transformers, which is saved after all weights."""
    what = "tokenizer must be one of transformers"
    check_type(tokenizer, PreTrainedTokenizerBase, what, "pass castlm.load_model(NAME).tokenizer")


def _stored_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model that its files hold, by name; tied ones once."""
    values: dict[str, Tensor] = {}
    persistent = model.state_dict().keys()
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        values |= {f"{prefix}{name}": p.detach() for name, p in module.named_parameters(recurse=False)}
        buffers = {f"{prefix}{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
        values |= {name: buffer for name, buffer in buffers.items() if name in persistent}
    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(values, model)
    return {name: value for name, value in kept.items() if name not in (model._keys_to_ignore_on_save or ())}


def _batch_of(model: PreTrainedModel, values: dict[str, Tensor]) -> Batch:
    """The stored tensors of some values, which are converted when they are written."""
    layout = StoredLayout(model)
    shapes = layout.to_stored({name: value.to("meta") for name, value in values.items()})
    return Batch(layout_of(shapes), lambda: layout.to_stored(values).values())


def write_all_but_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Writes config, generation config, tokenizer and a model's own code beside weights of `dtype`."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype_name(dtype)
    with quiet_transformers(progress=False):
        if model._auto_class is not None:
            noted: Any = config  # a config too, whatever its annotation says
            custom_object_save(model, folder, config=noted)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    copy_processor(config, folder)


def copy_processor(config: PretrainedConfig, folder: str | Path) -> None:
    """Copies the image processor of a vision-language model from its source into `folder`."""
    if not is_vision_language(config) or not config.name_or_path:
        return
    for name in PROCESSOR_FILES:
        if (Path(folder) / name).exists():
            continue
        with contextlib.suppress(OSError):  # transformers' answer for a file that is neither there nor in the cache
            found = cached_file(config.name_or_path, name, local_files_only=True)
            shutil.copyfile(str(found), Path(folder) / name)
