"""Cuts masked channels and heads out of a model: the result is a smaller dense model that loads anywhere as it is.

A unit whose weights are zero adds nothing to the residual stream, so removing it changes the output only by rounding in
shorter sums. Every cut measures that difference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import FilterFn, is_sparse_linear, scope_of, transformer_blocks
from castlm.facts import Cut
from castlm.models.architecture import context_length, eval_mode, linearize_
from castlm.structured.pattern import Heads, Units, sizes_after, sizes_of, units_of

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, between the masked model and the one that is cut, in
fp32."""
_PROBE_TOKENS = 64


def check_cut(model: PreTrainedModel, pattern: Pattern, filter_fn: FilterFn = is_sparse_linear) -> None:
    """Checks before training that the units of `pattern` can be cut out of `model` afterwards; n:m always passes.

    Raises:
        InputError: a family without a config for the smaller model, a block in which the units stay dense, a share that
            keeps all units or none, or a number of heads that the family's config does not allow.
    """
    if not isinstance(pattern, Units):
        return
    _config_after(model, pattern)
    layers = scope_of(model, pattern, filter_fn).layers
    num_blocks, num_found = len(transformer_blocks(model)), len(pattern.unit_layers(layers))
    if num_found != num_blocks:
        raise InputError(
            f"pattern {pattern} needs its units in each of the {num_blocks} transformer blocks, because one config "
            f"describes them all, but {num_found} have them: make all of their layers sparse"
        )
    if type(model).__module__.startswith("transformers_modules"):
        raise InputError(f"pattern {pattern} cannot be cut out of a model with code of its own: use 2:4")


def _config_after(model: PreTrainedModel, pattern: Units) -> PretrainedConfig:
    """The config of the model that is cut; raises `InputError` if transformers refuses it, with shares that fit."""
    sizes = sizes_of(pattern, model.config.to_dict())
    after = sizes_after(pattern, sizes)
    config = _with_sizes(model.config, after)
    if (reason := _refusal(config)) is None:
        return config
    field, number = units_of(sizes)
    assert isinstance(pattern, Heads)  # configs restrict no size but the number of heads
    others = {k: _with_sizes(model.config, sizes_after(Heads(k / number), sizes)) for k in range(1, number)}
    fitting = [k for k, other in others.items() if _refusal(other) is None]
    shares = ", ".join(f"heads:{k / number:.3g}" for k in fitting) or "channels:0.5"
    raise InputError(
        f"pattern {pattern} leaves {after[field]} of {number} KV heads, and transformers has no "
        f"{model.config.model_type} of that size ({reason}): use {shares}"
    )


def _with_sizes(config: PretrainedConfig, sizes: Mapping[str, int]) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def _refusal(config: PretrainedConfig) -> str | None:
    """The reason why transformers refuses a config; None if it accepts it."""
    try:
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        return str(error.__cause__ or error).strip().splitlines()[-1]
    return None


@torch.no_grad()
def cut_model(model: PreTrainedModel, pattern: Pattern) -> tuple[PreTrainedModel, Cut]:
    """Returns a new model without the units of `model` that are zero, with a config of the new sizes.

    Args:
        model: pruned to `pattern` and folded; it stays as it is.
        pattern: one that cuts: channels or heads, alone or with n:m.

    Returns:
        The smaller model, in the dtype and on the device of `model`, and the record of the cut.

    Raises:
        InputError: as `check_cut`, or the logits differ by more than `TOLERANCE` (fp32), because a unit was not zero.
    """
    check_cut(model, pattern)
    scope = scope_of(model, pattern)
    pattern = scope.pattern
    assert isinstance(pattern, Units)
    before = sizes_of(pattern, model.config.to_dict())
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced
        small = AutoModelForCausalLM.from_config(_config_after(model, pattern), dtype=model.dtype)
    linearize_(small)
    layers = scope.layers
    state = model.state_dict()
    for names in pattern.unit_layers(layers):
        weights = [layers[name].weight for name in names]
        kept = pattern.kept_units(weights)
        for name, mask in zip(names, pattern.expand(kept, weights)):
            rows, columns = mask.any(1), mask.any(0)  # of down (576, 1536): all 576 rows, the 768 kept columns
            state[f"{name}.weight"] = state[f"{name}.weight"][rows][:, columns].clone()
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][rows].clone()
    small.load_state_dict(state)
    del state
    small = small.to(model.device)
    small.generation_config = copy.deepcopy(model.generation_config)
    moved = _logits_moved(model, small)
    if model.dtype == torch.float32 and not moved <= TOLERANCE:
        raise InputError(f"cutting {pattern} out moves the logits by {moved:.1g} of the largest: prune the model first")
    return small, Cut(before, sizes_after(pattern, before), moved)


def _logits_moved(model: PreTrainedModel, small: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_TOKENS, context_length(model.config) or _PROBE_TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)

    def logits(of: nn.Module) -> Tensor:
        with eval_mode(of):
            found: Any = of(input_ids=ids, use_cache=False)
        scores: Tensor = found.logits.float()
        return scores

    whole = logits(model)
    return float((logits(small) - whole).abs().max() / whole.abs().max())
