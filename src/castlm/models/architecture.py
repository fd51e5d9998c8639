"""The parts of a loaded model: class, context length, backbone, output head and linear layers.

GPT-2's Conv1D layers become `nn.Linear` and 3-D expert weights `ExpertLinear`, so other modules need not handle them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from castlm.core.distill import OutputHead
from castlm.core.errors import InputError, check_type
from castlm.core.experts import linearize_experts_
from castlm.core.sparsify import LinearOfConv1D, check_model
from castlm.models.products import stacks_of


def check_of_transformers(model: object) -> None:
    """Raises `InputError` for anything but a model of transformers in memory, which may be wrapped, as by PEFT."""
    check_model(model)
    config = getattr(model, "config", None)
    check_type(
        config,
        PretrainedConfig,
        f"model must be of transformers; the config of this {type(model).__name__} must be a PretrainedConfig",
        "pass castlm.load_model(NAME).model",
    )


def is_vision_language(config: PretrainedConfig) -> bool:
    """Whether the config describes a vision-language model (`AutoModelForImageTextToText`)."""
    named = config.architectures[0] if config.architectures else None
    of_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return of_images is not None and named in (of_images, None) and not config.is_encoder_decoder


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """The auto class of transformers that loads the model of a config."""
    return AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM


def move_(model: nn.Module, device: torch.device | str) -> None:
    """Moves a model to a device, as `model.to` does, whose type a decorator of transformers hides."""
    model.to(device)


def generating(model: PreTrainedModel) -> GenerationMixin:
    """The model, as one whose `generate` continues text.

    Raises:
        InputError: its class, which may be a model's own code, cannot.
    """
    if not isinstance(model, GenerationMixin):
        raise InputError(f"{type(model).__name__} is no GenerationMixin of transformers, so it generates no text")
    return model


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The weight (vocab, hidden) of the input embeddings, (49152, 576) in SmolLM2-135M."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def shape_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds the model of a config on the meta device, linearized, to read its shapes and classes.

    To read weights into a model, use `castlm.models.loading.empty_model`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    linearize_(model)
    return model


def vocab_size(config: PretrainedConfig) -> int:
    """The vocabulary size of a model; for a vision-language model, of its language model."""
    return int(config.get_text_config().vocab_size)


def check_context(config: PretrainedConfig, num_prompt: int, num_new: int) -> None:
    """Raises `InputError` if a prompt and its continuation, in tokens, exceed the context of the model."""
    longest = context_length(config)
    if longest is not None and num_prompt + num_new > longest:
        remedy = "lower max_new_tokens" if num_prompt < longest else "shorten the prompt"
        raise InputError(
            f"{num_prompt} tokens of prompt and {num_new} new ones exceed the model's context of {longest}: {remedy}"
        )


def linearize_(model: PreTrainedModel) -> None:
    """Replaces each `Conv1D` by an `nn.Linear`, and holds each weight of experts as an `ExpertLinear`, in place."""
    linearize_conv1d_(model)
    linearize_experts_(model)
    linearize_experts_(model, stacks_of(model))


@torch.no_grad()
def linearize_conv1d_(model: PreTrainedModel) -> list[str]:
    """Replaces every transformers `Conv1D` by an equivalent `nn.Linear`, in place.

    A weight (in, out) becomes (out, in), contiguous, of the same dtype, device and `requires_grad`, shared as before.

    Returns:
        The names of the replaced layers.
    """
    linear_of: dict[Conv1D, LinearOfConv1D] = {}
    transposed: dict[nn.Parameter, nn.Parameter] = {}
    names = [name for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, Conv1D)]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, Conv1D)
        if old not in linear_of:
            if old.weight not in transposed:
                weight = nn.Parameter(old.weight.T.contiguous(), requires_grad=old.weight.requires_grad)
                transposed[old.weight] = weight
            linear_of[old] = LinearOfConv1D(old.nx, old.nf, device="meta").train(old.training)
            linear_of[old].weight, linear_of[old].bias = transposed[old.weight], old.bias
        model.set_submodule(name, linear_of[old])
    return names


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode during the block, then restores the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Runs `forward` in place of the `forward` of `module` during the block."""
    own = vars(module).get("forward")  # some libraries replace the method of the class
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model takes (`max_position_embeddings`); None where its config sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: maps input ids (batch, seq) to an output with `last_hidden_state`."""
    if model.base_model is not model:
        return model.base_model
    # Llama 4 names the prefix of its vision-language model.
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1 or model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} is not supported: it has no backbone beside its output head")
    return inside[0]


def output_head(model: PreTrainedModel) -> OutputHead:
    """The layer that maps hidden states to logits; its weight is the model's own Parameter, tied or not."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError(f"{type(model).__name__} is not supported: its output head is a {type(linear).__name__}")
    scale, softcap = logit_scale(model.config)
    return OutputHead(linear.weight, linear.bias, softcap, scale)


def logit_scale(config: PretrainedConfig) -> tuple[float, float | None]:
    """The factor that a model applies to its logits, and their bound; see `OutputHead`."""
    config = config.get_text_config()  # its `to_dict` is a deep copy, which each step would make twice
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def check_head(model: PreTrainedModel, whole: AbstractContextManager[OutputHead] | None = None) -> None:
    """Checks on 12 random tokens that `output_head` of `backbone` gives the logits, and that the model is causal.

    Args:
        whole: a context with the head, for one whose weight is sharded outside of its forward pass.

    Raises:
        InputError: the architecture computes something else, so castlm would compute the loss of another model.
    """
    name, vocab = type(model).__name__, len(output_head(model).weight)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab, (1, 12), generator=generator).to(model.device)
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocab
    with eval_mode(model):
        logits = model(input_ids=input_ids, use_cache=False).logits
        logits_changed = model(input_ids=changed, use_cache=False).logits
        hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state

    with whole or nullcontext(output_head(model)) as head:
        rebuilt = F.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        rebuilt = head.softcap * torch.tanh(rebuilt / head.softcap)
    is_wide = hidden.dtype == logits.dtype == torch.float32  # bf16 autocast rounds the product of the head
    tolerance = (1e-5 if is_wide else 2e-2) * logits.abs().max().item()
    difference = (rebuilt - logits).abs().max().item()
    if not difference <= tolerance:
        raise InputError(
            f"{name} is not supported: its logits differ by up to {difference:.3g} from output head times hidden state"
        )
    leak = (logits_changed - logits)[:, :-1].abs().max().item()
    if not leak <= tolerance:
        raise InputError(f"{name} is not a causal language model: a token changes the logits before it by {leak:.3g}")
