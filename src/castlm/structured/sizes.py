"""The fields of config.json that hold the sizes a cut changes, by family. Imports neither torch nor transformers.

A family that is not listed has no config for a model without some of its channels or heads, or none that was tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.structured.pattern import Channels, Units

_GATED = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "granite", "seed_oss", "ernie4_5"),
    *("helium", "hunyuan_v1_dense", "cwm", "gemma", "gemma2", "gemma3_text", "vaultgemma"),
    *("olmo", "olmo2", "olmo3", "exaone4", "cohere", "cohere2", "stablelm"),
)
CHANNELS: dict[str, str] = {
    **dict.fromkeys((*_GATED, "phi", "gpt_neox", "starcoder2"), "intermediate_size"),
    "opt": "ffn_dim",
    "gpt2": "n_inner",
}
"""The field that holds the number of MLP channels, by `model_type`."""
HEADS = frozenset(_GATED) - {"helium", "olmo", "olmo2", "olmo3", "cohere", "stablelm"}
"""The families whose config has a head size of its own, and whose norms do not run across heads."""


def check_family(pattern: Pattern, model_type: object) -> None:
    """Raises `InputError` if models of the family have no config without the units that `pattern` cuts out."""
    if not isinstance(pattern, Units):
        return
    families = CHANNELS if isinstance(pattern, Channels) else HEADS
    if model_type not in families:
        raise InputError(
            f"pattern {pattern}: castlm cannot cut {pattern.kind} out of {model_type}, only out of "
            f"{', '.join(sorted(families))}; use 2:4"
        )


def sizes_of(pattern: Pattern, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes in config.json that the cut of `pattern` changes or fixes, the number of units first.

    Raises:
        InputError: a family that cannot be cut.

    Examples:
        >>> sizes_of(Channels(0.5), {"model_type": "llama", "intermediate_size": 172})
        {'intermediate_size': 172}
    """
    check_family(pattern, config.get("model_type"))
    if isinstance(pattern, Channels):
        field = CHANNELS[str(config["model_type"])]
        value = config.get(field)
        if value is None and field == "n_inner":
            value = 4 * config.get("n_embd", 0)
        return {field: value}
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (heads or 1)
    return {"num_key_value_heads": kv_heads, "num_attention_heads": heads, "head_dim": head_dim}


def sizes_after(pattern: Pattern, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of `sizes_of` in the model that is cut.

    Examples:
        >>> from castlm.structured.pattern import Heads
        >>> sizes_after(Heads(0.5), {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8})
        {'num_key_value_heads': 2, 'num_attention_heads': 4, 'head_dim': 8}
    """
    assert isinstance(pattern, Units)
    (units, number), *rest = sizes.items()
    kept = pattern.num_kept(number)
    return {units: kept, **{name: n // number * kept if name == "num_attention_heads" else n for name, n in rest}}
