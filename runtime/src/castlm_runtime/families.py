"""The families of models that the engine runs: one table, by the `model_type` of config.json.

A family is a record of where its weights lie and of what its blocks compute beside what LLaMA's do. `describe` reads a
config with it, as the configuration classes of transformers read one; tests compare the two for every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from castlm_runtime.errors import InputError

Config = Mapping[str, Any]

_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: angle i of position p is p * frequencies[i]; cosines and sines are multiplied by `factor`."""

    frequencies: np.ndarray[Any, np.dtype[np.float32]]  # (rotary dimensions of a head / 2,)
    factor: float = 1.0


@dataclass(frozen=True)
class Description:
    """What the engine needs to know of a model, beside its weights."""

    family: Family
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    epsilon: float
    activation: str
    attention_scale: float
    is_tied: bool
    """Whether the embedding is the output head."""
    windows: tuple[int, ...]
    """For each layer the positions that attention reads, its own among them; 0 for all."""
    ropes: tuple[Rope | None, ...]
    """For each layer; None without rotary embedding."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0


@dataclass(frozen=True)
class Family:
    """How a family differs from LLaMA.

    Attributes:
        defaults: values of its configuration class for keys that config.json may lack.
        norms: names in a block: before attention, before the MLP, after attention, after the MLP; None for none.
        norm_offset: is added to the weights of norms.
        wide_head_norms: whether the norms of queries and keys run over all heads together.
        fused: whether q, k, v are one stored matrix, and gate and up are one.
        windows: the windows of the layers.
        rope_of: the parameters of the rotary embedding of a layer; None where it has none.
        scales: of attention, embedding, residual and logits, where they are not LLaMA's.
        refused: keys of a config that the engine cannot compute where they are set.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        "post_attention_layernorm",
        None,
        None,
    )
    norm_offset: float = 0.0
    wide_head_norms: bool = False
    fused: bool = False
    activation_key: str = "hidden_act"
    windows: Callable[[Config], list[int]] = lambda config: [0] * config["num_hidden_layers"]
    rope_of: Callable[[Config, int], Mapping[str, Any] | None] = lambda config, layer: _rope_parameters(config)
    scales: Callable[[Config], Mapping[str, float]] = lambda config: {}
    refused: tuple[str, ...] = ()


# ---- windows


def _layer_types(config: Config, default: Callable[[int], bool]) -> list[int]:
    """The windows by `layer_types`; without them, `default` says whether a layer has one."""
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if default(i) else "full_attention" for i in range(config["num_hidden_layers"])]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != config["num_hidden_layers"]:
        raise InputError(f"layer_types of config.json is {types!r:.200}: castlm-runtime has full and sliding attention")
    window = config.get("sliding_window") or 0
    return [window if kind == "sliding_attention" else 0 for kind in types]


def _every_layer(config: Config) -> list[int]:
    return [config["sliding_window"] or 0] * config["num_hidden_layers"]


def _qwen_windows(config: Config) -> list[int]:
    if not config["use_sliding_window"]:
        config = {**config, "sliding_window": None}
    has_window = config["sliding_window"] is not None
    return _layer_types(config, lambda i: has_window and i >= config["max_window_layers"])


def _has_rope(config: Config, layer: int) -> bool:
    """SmolLM3: every fourth layer has no rotary embedding, unless the config lists the layers."""
    listed = config.get("no_rope_layers")
    if listed is not None:
        return bool(listed[layer])
    return (layer + 1) % int(config["no_rope_layer_interval"]) != 0


def _smollm3_windows(config: Config) -> list[int]:
    if not config["use_sliding_window"]:
        return [0] * config["num_hidden_layers"]
    has_window = config["sliding_window"] is not None
    return _layer_types(config, lambda i: has_window and not _has_rope(config, i))


# ---- rotary embeddings


def _rope_parameters(config: Config) -> dict[str, Any]:
    """The parameters of transformers 5 (`rope_parameters`), or those of 4 (`rope_theta`, `rope_scaling`)."""
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    if config.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def _gemma3_rope(config: Config, layer: int) -> dict[str, Any]:
    """Layers with a window have a rotary embedding of their own."""
    is_local = _gemma3_windows(config)[layer] > 0
    nested = config.get("rope_parameters") or {}
    found = dict(nested.get("sliding_attention" if is_local else "full_attention") or {})
    if not is_local:
        found.update(config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.get("type", "default"))
    theta = config.get("rope_local_base_freq", 10_000.0) if is_local else config.get("rope_theta", 1_000_000.0)
    found.setdefault("rope_theta", theta)
    found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def _gemma3_windows(config: Config) -> list[int]:
    return _layer_types(config, lambda i: (i + 1) % config.get("sliding_window_pattern", 6) != 0)


def make_rope(parameters: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """The frequencies of a rotary embedding in fp32, as transformers' `modeling_rope_utils` computes them.

    Raises:
        InputError: a type whose frequencies change with the length of the sequence, or a lacking parameter.
    """
    kind = parameters["rope_type"]
    try:
        if kind in _ROPES:
            dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
            exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
            base = np.float32(1.0) / np.float32(parameters["rope_theta"]) ** exponents
            return _ROPES[kind](parameters, base, dim, context)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"the rotary embedding of config.json lacks {error}: {dict(parameters)!r:.200}") from error
    raise InputError(
        f"the rotary embedding {kind!r} is none of {', '.join(_ROPES)}: castlm generate runs it with transformers"
    )


def _default(parameters: Mapping[str, Any], base: np.ndarray, dim: int, context: int) -> Rope:
    return Rope(base)


def _linear(parameters: Mapping[str, Any], base: np.ndarray, dim: int, context: int) -> Rope:
    return Rope((base / np.float32(parameters["factor"])).astype(np.float32))


def _llama3(parameters: Mapping[str, Any], base: np.ndarray, dim: int, context: int) -> Rope:
    """Long waves are slowed down by `factor`, short ones stay, and those between are mixed of both."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    length = parameters["original_max_position_embeddings"]
    wave = np.float32(2 * math.pi) / base
    slowed = np.where(wave > length / low, base / np.float32(factor), base)
    smooth = (np.float32(length) / wave - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * slowed / np.float32(factor) + smooth * slowed
    is_between = ~(wave < length / high) & ~(wave > length / low)
    return Rope(np.where(is_between, mixed, slowed).astype(np.float32))


def _yarn(parameters: Mapping[str, Any], base: np.ndarray, dim: int, context: int) -> Rope:
    """YaRN (arXiv 2309.00071): a ramp over the dimensions between interpolated and extrapolated frequencies."""
    length, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]
    factor = parameters["factor"] if parameters.get("factor") is not None else context / length

    def scale(stretch: float, by: float = 1.0) -> float:
        return 1.0 if stretch <= 1 else 0.1 * by * math.log(stretch) + 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = scale(factor, one) / scale(factor, all_dims) if one and all_dims else scale(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    kept = 1 - np.clip(ramp, 0, 1)
    return Rope((base / np.float32(factor) * (1 - kept) + base * kept).astype(np.float32), float(attention))


_ROPES: dict[str, Callable[[Mapping[str, Any], np.ndarray, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


# ---- the table

_SANDWICH = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
_AFTER = (None, None, "post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "llama": Family({"rms_norm_eps": 1e-6}),
    "mistral": Family({"rms_norm_eps": 1e-6, "sliding_window": 4096}, windows=_every_layer),
    "ministral": Family(
        {"rms_norm_eps": 1e-6, "sliding_window": 4096},
        windows=lambda config: _layer_types(config, lambda i: config["sliding_window"] is not None),
    ),
    "qwen2": Family(
        {"rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        windows=_qwen_windows,
    ),
    "qwen3": Family(
        {
            "rms_norm_eps": 1e-6,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows=_qwen_windows,
    ),
    "cwm": Family(
        {"rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": 8192, "rope_theta": 1_000_000.0},
        windows=lambda config: _layer_types(config, lambda i: i % 4 != 0),
    ),
    "seed_oss": Family({"rms_norm_eps": 1e-6, "head_dim": 128}),
    "smollm3": Family(
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
            "rope_theta": 2_000_000.0,
        },
        windows=_smollm3_windows,
        rope_of=lambda config, layer: _rope_parameters(config) if _has_rope(config, layer) else None,
    ),
    "phi3": Family({"rms_norm_eps": 1e-5, "sliding_window": None}, fused=True, windows=_every_layer),
    "olmo2": Family({"rms_norm_eps": 1e-5}, norms=_AFTER, wide_head_norms=True),
    "granite": Family(
        {
            "rms_norm_eps": 1e-6,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        scales=lambda config: {
            "attention_scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": 1 / config["logits_scaling"],
        },
    ),
    "gemma3_text": Family(
        {
            "rms_norm_eps": 1e-6,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        norms=_SANDWICH,
        norm_offset=1.0,
        activation_key="hidden_activation",
        windows=_gemma3_windows,
        rope_of=_gemma3_rope,
        scales=lambda config: {
            "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
            "embedding_scale": config["hidden_size"] ** 0.5,
            "logit_cap": config.get("final_logit_softcapping") or 0.0,
        },
        refused=("attn_logit_softcapping", "use_bidirectional_attention"),
    ),
}
"""The families, by `model_type`. A new one is a record, as long as its blocks are made of the engine's steps."""

_DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "hidden_act": "silu", "head_dim": None}


def why_not(config: Config) -> str | None:
    """Why the engine does not run the model of a config.json; None where it does, as far as the config tells."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return f"its family is {kind!r}, and castlm-runtime has {', '.join(FAMILIES)}"
    try:
        describe(config)
    except InputError as error:
        return str(error)
    return None


def describe(config: Config) -> Description:
    """What a config.json says of a model.

    Raises:
        InputError: a family or an option that the engine does not have, or a key that is missing or makes no sense.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"the model is a {kind!r}, and castlm-runtime has {', '.join(FAMILIES)}: castlm generate runs it with "
            "transformers"
        )
    family = FAMILIES[kind]
    config = {**_DEFAULTS, **family.defaults, **config}
    try:
        for key in family.refused:
            if config.get(key):
                raise InputError(f"{key} of config.json is {config[key]!r}: castlm generate runs it with transformers")
        name = config[family.activation_key]
        if name not in _ACTIVATIONS:
            raise InputError(
                f"{family.activation_key} of config.json is {name!r}, and castlm-runtime has {', '.join(_ACTIVATIONS)}"
                ": castlm generate runs the model with transformers"
            )
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        hidden = int(config["hidden_size"])
        head_dim = int(config["head_dim"] or hidden // heads)
        context = int(config["max_position_embeddings"])
        ropes: dict[str, Rope] = {}
        of_layers: list[Rope | None] = []
        for layer in range(layers):
            parameters = family.rope_of(config, layer)
            if parameters is None:
                of_layers.append(None)
                continue
            text = repr(sorted(parameters.items(), key=lambda item: item[0]))
            if text not in ropes:
                ropes[text] = make_rope(parameters, head_dim, context)
            of_layers.append(ropes[text])
        return Description(
            family=family,
            num_layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            context=context,
            epsilon=float(config["rms_norm_eps"]),
            activation=name,
            is_tied=bool(config["tie_word_embeddings"]),
            windows=tuple(family.windows(config)),
            ropes=tuple(of_layers),
            **{"attention_scale": head_dim**-0.5, **family.scales(config)},
        )
    except KeyError as error:
        raise InputError(f"config.json lacks {error}: fetch the model again") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config.json is damaged ({error}): fetch the model again") from error
