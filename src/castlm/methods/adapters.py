"""PEFT adapters whose merge keeps every zero of a sparse model: SHiRA on kept positions, and LoRA under the mask.

The merge of plain LoRA adds a dense matrix to the weight, which fills its zeros. SHiRA (Bhardwaj et al. 2024, arXiv
2406.13175) trains single weights at fixed positions; here these are positions that the pattern keeps. PEFT saves them
with the adapter, so that it loads and merges it without castlm. peft is imported when a config is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.keep import KeptPattern
from castlm.core.pattern import Pattern, as_pattern
from castlm.core.sparsify import FilterFn
from castlm.methods.keep import adapted_layers, check_pattern, pattern_layers, plain_name

if TYPE_CHECKING:
    from peft import LoraConfig, ShiraConfig


def shira_config(
    model: nn.Module,
    r: int = 16,
    *,
    pattern: Pattern | str = "2:4",
    filter_fn: FilterFn | None = None,
    random_seed: int = 0,
    **options: Any,
) -> ShiraConfig:
    """A `peft.ShiraConfig` for a sparse model, whose adapter trains kept weights and therefore keeps every zero.

    `peft.get_peft_model(model, config)` adds the adapter; PEFT saves, loads and merges it on its own. SHiRA (arXiv
    2406.13175) trains single weights at fixed positions; here they are drawn from those that are kept.

    Args:
        model: n:m sparse.
        r: size of the adapter. Each layer (out, in) trains r * (out + in) of its kept weights, as many parameters as
            LoRA of rank r has, and at most all of them.
        pattern: as for `keep_pattern_`.
        filter_fn: as for `keep_pattern_`.
        random_seed: of the draw of the positions.
        options: further fields of `ShiraConfig`.

    Raises:
        InputError: peft is not installed, the model is not n:m sparse, or r is below 1 or larger than the smallest
            layer allows.

    Examples::

        config = castlm.shira_config(model, r=16)
        peft_model = peft.get_peft_model(model, config)
        ...  # train
        peft_model.save_pretrained("adapter")
        model = peft_model.merge_and_unload()
    """
    peft = _peft()
    layers = _sparse_layers(model, pattern, filter_fn)
    if r < 1:
        raise InputError(f"r = {r} is out of range: it must be at least 1")
    kept = {name: int(layer.weight.count_nonzero()) for name, layer in layers.items()}
    per_rank = {name: sum(layer.weight.shape) for name, layer in layers.items()}
    tightest = min(layers, key=lambda name: kept[name] // per_rank[name])
    if r * per_rank[tightest] > kept[tightest]:
        at_most = kept[tightest] // per_rank[tightest]
        raise InputError(
            f"r = {r} asks for {r * per_rank[tightest]:,} weights of {tightest}, which keeps {kept[tightest]:,}: "
            + (f"use r <= {at_most} (lora_r of castlm finetune), or " if at_most else "")
            + "train all kept weights, without an adapter"
        )
    config = peft.ShiraConfig(r=r, target_modules=list(layers), **options)
    config.mask_fn = kept_positions(torch.Generator().manual_seed(random_seed))
    return config


def masked_lora_config(
    model: nn.Module,
    r: int = 16,
    *,
    pattern: Pattern | str = "2:4",
    filter_fn: FilterFn | None = None,
    **options: Any,
) -> LoraConfig:
    """A `peft.LoraConfig` for a sparse model whose update is `mask * (B A)`, so that its merge keeps every zero.

    LoRA is that of arXiv 2106.09685; the mask is that of the zeros of each weight.

    PEFT saves such an adapter as LoRA, without the mask: pass a config of this function to `PeftModel.from_pretrained`
    when it is loaded, with the options that the adapter was trained with. PEFT reads none of them from the folder then,
    and another `lora_alpha` would scale the update without an error.

    Args:
        model: n:m sparse.
        r: rank.
        pattern: as for `keep_pattern_`.
        filter_fn: as for `keep_pattern_`.
        options: further fields of `LoraConfig`, without dropout, without the variants of LoRA (DoRA), and
            with an `init_lora_weights` that leaves the weights of the model as they are.

    Raises:
        InputError: peft is not installed, the model is not n:m sparse, or an option that is not possible under a mask.

    Examples::

        peft_model = peft.get_peft_model(model, castlm.masked_lora_config(model, r=16))
        peft_model.save_pretrained("adapter")
        ...
        peft_model = peft.PeftModel.from_pretrained(model, "adapter", config=castlm.masked_lora_config(model, r=16))
    """
    peft = _peft()
    layers = _sparse_layers(model, pattern, filter_fn)
    if options.get("lora_dropout"):
        raise InputError(f"lora_dropout = {options['lora_dropout']} is not possible under a mask: leave it at 0")
    if (initial := options.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise InputError(f"init_lora_weights = {initial!r} fills the zeros of the model: leave it out, or use gaussian")
    from castlm.methods.masked_lora import MaskedLoraLinear

    config = peft.LoraConfig(r=r, target_modules=list(layers), **{"lora_alpha": r, **options})
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    return config


def add_adapter_(model: nn.Module, config: Any) -> Any:
    """`peft.get_peft_model`: replaces layers of `model` in place, and returns the `PeftModel` around it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        torch.sparse_coo_tensor(torch.zeros(2, 1), torch.zeros(1), (1, 1))  # torch warns once about those of SHiRA
        return _peft().get_peft_model(model, config)


def check_adapters(model: nn.Module, kept: KeptPattern) -> None:
    """Raises `InputError` if an adapter of `model` would fill zeros of a layer in `kept` when it is merged."""
    masks = None
    for fqn, layer in adapted_layers(model).items():
        name = plain_name(fqn)
        if name not in kept.weights:
            continue
        masks = masks or kept.masks()
        if not _keeps(layer, masks[name]):
            raise InputError(
                f"the {type(layer).__name__} adapter of {name} fills the zeros of a sparse layer when it is merged: "
                "make its config with castlm.shira_config(model)"
            )


def _keeps(layer: nn.Module, mask: Tensor) -> bool:
    """Whether the update of an adapted layer is zero where `mask` is False."""
    from peft.tuners.shira.layer import ShiraLayer

    from castlm.methods.masked_lora import MaskedLoraLinear

    if isinstance(layer, ShiraLayer):
        return all(bool(mask[tuple(at.long().to(mask.device))].all()) for at in layer.shira_indices.values())
    return isinstance(layer, MaskedLoraLinear)


def kept_positions(generator: torch.Generator) -> Callable[..., Tensor]:
    """A `mask_fn` of PEFT's SHiRA: r * (out + in) positions drawn from the kept ones of a layer."""

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        weight = base_layer.get_parameter("weight")
        kept = weight.detach().flatten().nonzero().squeeze(1).cpu()
        chosen = kept[torch.randperm(len(kept), generator=generator)[: r * sum(weight.shape)]]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        return mask.view(weight.shape).to(weight.device)

    return mask_fn


def _sparse_layers(model: nn.Module, pattern: Pattern | str, filter_fn: FilterFn | None) -> dict[str, nn.Linear]:
    pattern = as_pattern(pattern).for_model(model)
    layers = pattern_layers(model, pattern, filter_fn)
    check_pattern(layers, pattern)
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}  # PEFT adapts no experts


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft: pip install '.[peft]' in the clone of castlm") from None
    return peft
