"""Opens a Hugging Face model: finds it and reads and checks its config and tokenizer, before any weights.

Errors of transformers, of any type and many lines, become one line.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from castlm.core.errors import InputError
from castlm.models.architecture import is_vision_language
from castlm.models.layout import QUANT_METHOD
from castlm.models.locate import Location, find

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
"""Files beside the tokenizer's that the processor of a vision-language model is loaded from."""
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
    config, options = _load_config(where, trust_remote_code, revision)
    return where, config, _load_tokenizer(where, options)


def open_config(name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """The config of a model, which need not have weights or a tokenizer.

    Raises:
        InputError: as `open_model`, except for weights and tokenizer.
    """
    where = find(name, revision, needs_weights=False)
    return _load_config(where, trust_remote_code, revision)[0]


def _load_config(
    where: Location, trust_remote_code: bool, revision: str | None
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a model, and the keyword arguments to load its other parts."""
    options = {"trust_remote_code": trust_remote_code, "revision": revision, **where.local}
    with quiet(where), as_input_error(where):
        config = AutoConfig.from_pretrained(where.target, **where.gguf, **options)
    _check_config(where, config)
    return config, options


def check_num_layers(config: PretrainedConfig, where: Location | Path) -> None:
    """Raises `InputError` for a number of layers that is absurd and would occupy the machine for hours."""
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if type(num_layers) is not int or not 0 < num_layers <= _MAX_LAYERS:
        raise InputError(f"{where} says num_hidden_layers = {num_layers}: a number from 1 to {_MAX_LAYERS} is needed")


def _check_config(where: Location, config: PretrainedConfig) -> None:
    check_num_layers(config, where)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = config.architectures or ([causal] if causal else [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{where} says architectures = {named}: a list of class names is needed")
    is_causal = any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in named)
    if is_vision_language(config):
        if not isinstance(config.get_text_config(), PretrainedConfig) or config.get_text_config() is config:
            raise InputError(
                f"{where} is a {config.model_type} without a language model of its own: give a LLaVA or Qwen-VL"
            )
    elif not remote and causal is None and is_causal:
        raise InputError(
            f"{where} is {', '.join(named)} of type {config.model_type}, which transformers' AutoModelForCausalLM does "
            "not load: give the whole model that it is a part of"
        )
    elif not remote and (causal is None or not is_causal or config.is_encoder_decoder):
        raise InputError(
            f"{where} is not a causal language model but {', '.join(named) or config.model_type}: "
            "give one whose architecture is named ...ForCausalLM or ...LMHeadModel, or one of a vision-language model"
        )
    method = quantization_method(config)
    if method not in (None, QUANT_METHOD):
        raise InputError(f"the weights of {where} are quantized ({method}): give the model before quantization")


def quantization_method(config: PretrainedConfig) -> str | None:
    """`quant_method` of a config; None for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return str(found.get("quant_method", "?") if isinstance(found, dict) else found.quant_method)


def _load_tokenizer(where: Location, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    with quiet(where), as_input_error(where):
        tokenizer = AutoTokenizer.from_pretrained(where.target, **where.gguf, **options)
        token_ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    # Without its files, some classes still load, with an empty vocabulary or special tokens alone.
    if not set(token_ids) - set(tokenizer.all_special_ids):
        raise InputError(_NO_TOKENIZER.format(where))
    return tokenizer


def check_loading_info(where: object, info: Mapping[str, Any]) -> None:
    """Raises `InputError` for a weight that is missing or has another shape, by the loading info of transformers, which
    only warns of them.
    """
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
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # from a library in Rust
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
    if "use_safetensors" in reason:
        return f"{where} has no safetensors on the hub, and pickles are never loaded: convert it first"
    reason = re.split(r"(?<=[.!?]) ", reason)[0][:240]
    if where.is_hub and not where.is_cached:
        return f"{where} is neither a local folder nor available on the Hugging Face Hub: {reason}"
    if "not a valid JSON file" in reason:
        reason = f"{reason.rstrip('.')}: fetch it again"
    return f"cannot load {where}: {reason}"


@contextlib.contextmanager
def quiet(where: Location) -> Iterator[None]:
    """Silences transformers' reports; a progress bar is shown only where a download may happen."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers(progress=where.is_hub and not where.is_cached))
        if where.gguf:  # dequantization shows a progress bar that cannot be turned off
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
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
