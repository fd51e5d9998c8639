"""Hugging Face models in and out: what a user names becomes a whole, finite model, and goes back in the layout it had.

transformers warns and goes on with random numbers where weights are missing; here that is an error. GPT-2's Conv1D are
`nn.Linear` between load and save, so that nothing above has to know of them.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from castlm.core.errors import InputError
from castlm.core.head import OutputHead
from castlm.layout import stored_transposed
from castlm.locate import Location, find

# Causal masks and rotary tables that old checkpoints carry and today's models compute.
OLD_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
PACKED = "castlm"
"""`quant_method` of a packed folder, which `load_model` unpacks."""
_NO_TOKENIZER = "{} holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it"


@dataclass(frozen=True)
class Loaded:
    """A model ready to train, with where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """The folder, hub id (with `@revision` where one was asked for) or file, for the record of a run."""
    dtype: torch.dtype = torch.float32
    """What the weights are stored in, whatever `model` holds them in."""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Loaded:
    """A causal language model and its tokenizer, on CPU, in eval mode, with every Conv1D made an `nn.Linear`.

    Args:
        name: a folder in Hugging Face format, plain or packed (unpacked), a hub id, a `.gguf` file (dequantized) or
            "demo".
        dtype: of the weights, whatever they are stored in; None keeps what they are stored in.
        trust_remote_code: run the model's own Python code.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: nothing there, not a causal language model, quantized, an adapter, pickled or corrupt weights,
            weights that are missing, left over, of another shape or not finite, or no tokenizer.
    """
    where, config, tokenizer = open_model(name, trust_remote_code=trust_remote_code, revision=revision)
    stored = stored_dtype(where, config)
    options = {"trust_remote_code": trust_remote_code, "revision": revision, **where.local}
    if quantization_method(config) == PACKED:
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    weights: dict[str, Any] = {"use_safetensors": True}
    if where.gguf:
        weights = {**where.gguf, "quantization_config": GgufConfig(dequantize=True)}
    with quiet(where), _as_input_error(where):
        # Mismatched sizes are let through here, to be named by `_check_weights` in one line.
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            where.target,
            config=config,
            dtype=dtype or stored,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **weights,
            **options,
        )
    _check_weights(where, model, loading_info)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > num_embeddings:
        raise InputError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} entries, its model {num_embeddings}: "
            "they do not belong together"
        )
    linearize_conv1d_(model)
    source = f"{where.source}@{revision}" if where.is_hub and revision else where.source
    return Loaded(model.eval(), tokenizer, source, stored)


SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the dtypes that a result can be written in."""


def stored_dtype(where: Location, config: PretrainedConfig) -> torch.dtype:
    """What the weights of a model are stored in, by its config, or else by the largest tensor of its first file.

    GGUF counts as bf16: what it was made of had 16 bits in nearly every case, and its own blocks have fewer.
    """
    if where.gguf:
        return torch.bfloat16
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    files = [] if where.is_hub else sorted(Path(where.target).glob("*.safetensors"))
    if dtype is None and files:
        with safe_open(files[0], "pt") as opened:
            slices = [opened.get_slice(key) for key in opened.keys()]  # noqa: SIM118
            largest = max(slices, key=lambda found: math.prod(found.get_shape()), default=None)
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(largest.get_dtype() if largest else "")
    return dtype if dtype in SAVE_DTYPES.values() else torch.float32


def save_dtype(wanted: str, stored: torch.dtype) -> torch.dtype:
    """The dtype of a result: that of the source model for "source", else the one of `SAVE_DTYPES`."""
    return stored if wanted == "source" else SAVE_DTYPES[wanted]


@contextlib.contextmanager
def parameters_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block the parameters of `model` are in `dtype`; after it in what they were, with the values rounded.

    Buffers stay: rotary frequencies are computed in fp32, whatever the weights are in. None changes nothing.
    """
    before = {p: p.dtype for p in model.parameters() if dtype is not None and p.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, was in before.items():
            parameter.data = parameter.data.to(was)


def open_model(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[Location, PretrainedConfig, PreTrainedTokenizerBase]:
    """What `load_model` knows of a model before it reads the weights.

    Raises:
        InputError: nothing there, not a causal language model, quantized, an adapter, or no tokenizer.
    """
    where = find(name, revision)
    options = {"trust_remote_code": trust_remote_code, "revision": revision, **where.local}
    with quiet(where), _as_input_error(where):
        config = AutoConfig.from_pretrained(where.target, **where.gguf, **options)
    _check_config(where, config)
    return where, config, _load_tokenizer(where, options)


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer alone, by the same names as `load_model`.

    Raises:
        InputError: nothing there, or no tokenizer in it.
    """
    where = find(name, revision)
    return _load_tokenizer(where, {"trust_remote_code": trust_remote_code, "revision": revision, **where.local})


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    max_shard_size: int | str = "50GB",
) -> None:
    """Writes safetensors, config, generation config and tokenizer; `from_pretrained` gives the same model back.

    The weights keep their dtype. The model stays as it is and can be trained on.

    Args:
        max_shard_size: largest weight file, in bytes or as "5GB"; above it the weights are cut into several.

    Raises:
        InputError: weight scaling that is not folded.
    """
    state_dict = restored_state_dict(model)
    with _silent_transformers(progress=False):
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)


def restored_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict in the layout of the model's family on disk: Linear that were Conv1D are (in, out) again, copied.

    Raises:
        InputError: a parametrized weight, such as an unfolded weight scaling.
    """
    state_dict = model.state_dict()
    hidden = next((name for name in state_dict if "parametrizations" in name.split(".")), None)
    if hidden:
        raise InputError(f"{hidden} cannot be saved under that name: fold_weight_scaling(model) first")
    for name, tensor in state_dict.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear) and stored_transposed(model.config.model_type, name):
            state_dict[name] = tensor.T.contiguous()
    return state_dict


@torch.no_grad()
def linearize_conv1d_(model: PreTrainedModel) -> list[str]:
    """Replaces every transformers `Conv1D` by an `nn.Linear` of the same function, in place.

    A weight (in, out) becomes (out, in), contiguous; dtype, device, `requires_grad` and sharing between layers stay.

    Returns:
        The names of the replaced layers.

    Raises:
        InputError: a Conv1D in a family where saving could not tell it from a Linear.
    """
    linear_of: dict[Conv1D, nn.Linear] = {}
    transposed: dict[nn.Parameter, nn.Parameter] = {}
    names = [name for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, Conv1D)]
    for name in names:
        if not stored_transposed(model.config.model_type, f"{name}.weight"):
            raise InputError(f"{name} is a Conv1D, unknown in the family {model.config.model_type}: not supported")
    for name in names:
        old = model.get_submodule(name)
        if old not in linear_of:
            if old.weight not in transposed:
                weight = nn.Parameter(old.weight.T.contiguous(), requires_grad=old.weight.requires_grad)
                transposed[old.weight] = weight
            linear_of[old] = nn.Linear(*old.weight.shape, device="meta").train(old.training)
            linear_of[old].weight, linear_of[old].bias = transposed[old.weight], old.bias
        model.set_submodule(name, linear_of[old])
    return names


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: maps input ids (batch, seq) to an output whose `last_hidden_state` the head reads.

    Raises:
        InputError: an architecture without such a module.
    """
    if model.base_model is model:
        raise InputError(f"{type(model).__name__} is not supported: it has no backbone beside its output head")
    return model.base_model


def output_head(model: PreTrainedModel) -> OutputHead:
    """What the model makes logits of hidden states with; the weight is the model's own Parameter, tied or not.

    Raises:
        InputError: an architecture whose head is not one `nn.Linear`.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError(f"{type(model).__name__} is not supported: its output head is a {type(linear).__name__}")
    fields = model.config.to_dict()
    scale = fields.get("logit_scale") or 1.0  # Cohere
    scale /= fields.get("logits_scaling") or 1.0  # Granite
    return OutputHead(linear.weight, linear.bias, fields.get("final_logit_softcapping"), scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Proves on 12 random tokens that `output_head` of `backbone` is the model, and that no position sees a later one.

    Raises:
        InputError: an architecture that does anything else: the loss would be another model's.
    """
    name, head, was_training = type(model).__name__, output_head(model), model.training
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(head.weight.shape[0], (1, 12), generator=generator).to(model.device)
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % head.weight.shape[0]
    model.eval()
    logits = model(input_ids=input_ids, use_cache=False).logits
    logits_changed = model(input_ids=changed, use_cache=False).logits
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    model.train(was_training)

    rebuilt = F.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        rebuilt = head.softcap * torch.tanh(rebuilt / head.softcap)
    is_wide = hidden.dtype == logits.dtype == torch.float32  # the head's product is not, in bf16 autocast
    tolerance = (1e-5 if is_wide else 2e-2) * logits.abs().max().item()
    difference = (rebuilt - logits).abs().max().item()
    if not difference <= tolerance:
        raise InputError(
            f"{name} is not supported: its logits differ by up to {difference:.3g} from output head times hidden state"
        )
    leak = (logits_changed - logits)[:, :-1].abs().max().item()
    if not leak <= tolerance:
        raise InputError(f"{name} is not a causal language model: a token changes the logits before it by {leak:.3g}")


def _check_config(where: Location, config: PretrainedConfig) -> None:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    named = config.architectures or ([causal] if causal else [])
    is_causal = any(architecture.endswith(("ForCausalLM", "LMHeadModel")) for architecture in named)
    if not remote and (causal is None or not is_causal or config.is_encoder_decoder):
        raise InputError(
            f"{where} is not a causal language model but {', '.join(named) or config.model_type}: "
            "give one whose architecture is named ...ForCausalLM or ...LMHeadModel"
        )
    method = quantization_method(config)
    if method not in (None, PACKED):
        raise InputError(f"the weights of {where} are quantized ({method}): give the model that was quantized")


def quantization_method(config: PretrainedConfig) -> str | None:
    """`quant_method` of a config; None of a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return str(found.get("quant_method", "?") if isinstance(found, dict) else found.quant_method)


def _check_weights(where: Location, model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    def some(names: list[str]) -> str:
        return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]

    architecture = type(model).__name__
    mismatched = sorted(loading_info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{some([entry[0] for entry in mismatched])} of {where} does not fit its config.json: "
            f"{name} is stored as {tuple(stored)}, expected {tuple(expected)}"
        )
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise InputError(f"the weights of {where} lack {some(missing)} for {architecture}: fetch them again")
    unexpected = sorted(name for name in loading_info["unexpected_keys"] if not OLD_BUFFERS.search(name))
    if unexpected:
        raise InputError(
            f"{architecture} has no place for {some(unexpected)} of {where}: the weights belong to another config.json"
        )
    for name, param in model.named_parameters():
        if param.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(param.detach())):
            raise InputError(f"{name} of {where} holds NaN or infinity: the checkpoint is damaged")


def _load_tokenizer(where: Location, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    with quiet(where), _as_input_error(where):
        tokenizer = AutoTokenizer.from_pretrained(where.target, **where.gguf, **options)
        token_ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    # Without its files, some classes come up all the same, with no vocabulary or with the special tokens alone.
    if not set(token_ids) - set(tokenizer.all_special_ids):
        raise InputError(_NO_TOKENIZER.format(where))
    return tokenizer


@contextlib.contextmanager
def _as_input_error(where: Location) -> Iterator[None]:
    """transformers' errors, of many lines and any type, as one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not reason or isinstance(error, LookupError):
            reason = repr(error)  # str(KeyError("a")) is 'a'
        raise InputError(_explain(where, reason)) from error


def _explain(where: Location, reason: str) -> str:
    if "Couldn't instantiate the backend tokenizer" in reason:
        return _NO_TOKENIZER.format(where)
    if "trust_remote_code" in reason:
        return f"{where} runs code of its own: pass trust_remote_code if you have read it and trust it"
    if "use_safetensors" in reason:
        return f"{where} has no safetensors on the hub, and pickles are not loaded: convert it first"
    reason = re.split(r"(?<=[.!?]) ", reason)[0][:240]
    if where.is_hub and not where.is_cached:
        return f"{where} is no folder here and cannot be had from the Hugging Face hub: {reason}"
    return f"cannot load {where}: {reason}"


@contextlib.contextmanager
def quiet(where: Location) -> Iterator[None]:
    """No reports from transformers; a progress bar only where something may be downloaded."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silent_transformers(progress=where.is_hub and not where.is_cached))
        if where.gguf:  # its dequantization draws a bar that no switch turns off
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _silent_transformers(progress: bool) -> Iterator[None]:
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
