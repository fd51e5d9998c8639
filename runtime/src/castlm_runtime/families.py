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

_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
"""The engine's activations, by transformers' names."""


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
    routed: tuple[bool, ...]
    """For each layer whether it has experts."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    is_parallel: bool = False
    """Whether the MLP of a block reads what its attention reads."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    normalizes_experts: bool = False
    """Whether the shares of a token's experts add up to 1."""


@dataclass(frozen=True)
class Experts:
    """The experts of a family.

    Attributes:
        layouts: the ways in which files have them: names in a block, and the parts of each, as `Family.matrices`. {} is
            the number of an expert; a name without it is a tensor of all experts. The first name tells the layout.
        intermediate_key: key of the config with their width.
        normalizes: whether the shares of a token's experts add up to 1.
        routed: whether a layer has experts.
    """

    layouts: tuple[Mapping[str, tuple[str, ...]], ...]
    intermediate_key: str = "intermediate_size"
    normalizes: Callable[[Config], bool] = lambda config: True
    routed: Callable[[Config, int], bool] = lambda config, layer: True


_ATTENTION = {f"self_attn.{part}_proj": (part,) for part in "qkvo"}
_MLP = {f"mlp.{part}_proj": (part,) for part in ("gate", "up", "down")}


@dataclass(frozen=True)
class Family:
    """How a family differs from LLaMA.

    Attributes:
        defaults: values of its configuration class for keys that config.json may lack.
        root: the name of the backbone; `embedding` and `norm` are in it, the head is not.
        heads: the names that files have for the head.
        matrices: names of the matrices of a block, and the parts whose rows follow each other in each.
        interleaves_heads: whether they are stored head by head: q, k and v of the first head come first.
        experts: of the blocks that have them in place of an MLP.
        norms: names in a block: before attention, before the MLP, after attention, after the MLP; None for none.
        norm_offset: is added to the weights of norms.
        has_layer_norms: whether they subtract the mean, and have biases.
        epsilon_key: key of the config with their epsilon.
        is_parallel: whether the MLP of a block reads what its attention reads.
        wide_head_norms: whether the norms of queries and keys run over all heads together.
        windows: the windows of the layers.
        rope_of: the parameters of the rotary embedding of a layer; None where it has none.
        scales: of attention, embedding, residual and logits, where they are not LLaMA's.
        refused: keys of a config that the engine cannot compute where they are set.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    root: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head",)
    matrices: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ATTENTION | _MLP)
    interleaves_heads: bool = False
    experts: Experts | None = None
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        "post_attention_layernorm",
        None,
        None,
    )
    norm_offset: float = 0.0
    has_layer_norms: bool = False
    epsilon_key: str = "rms_norm_eps"
    is_parallel: Callable[[Config], bool] = lambda config: False
    wide_head_norms: bool = False
    activation_key: str = "hidden_act"
    windows: Callable[[Config], list[int]] = lambda config: [0] * config["num_hidden_layers"]
    rope_of: Callable[[Config, int], Mapping[str, Any] | None] = lambda config, layer: _rope_parameters(config)
    scales: Callable[[Config], Mapping[str, float]] = lambda config: {}
    refused: tuple[str, ...] = ()

    @property
    def is_fused(self) -> bool:
        """Whether a stored matrix has several parts, outside experts."""
        return any(len(parts) > 1 for parts in self.matrices.values())


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


def _window_if_used(config: Config) -> list[int]:
    return _every_layer(config if config["use_sliding_window"] else {**config, "sliding_window": None})


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


def _neox_rope(config: Config, layer: int) -> dict[str, Any]:
    """Older files have names of their own."""
    own = {
        "rope_theta": config.get("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
    }
    return _rope_parameters({**own, **config})


def _gemma3_rope(config: Config, layer: int) -> dict[str, Any]:
    """Layers with a window have a rotary embedding of their own."""
    is_local = _gemma3_windows(config)[layer] > 0
    nested = config.get("rope_parameters") or {}
    rope = dict(nested.get("sliding_attention" if is_local else "full_attention") or {})
    if not is_local:
        rope.update(config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    theta = config.get("rope_local_base_freq", 10_000.0) if is_local else config.get("rope_theta", 1_000_000.0)
    rope.setdefault("rope_theta", theta)
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


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
_ONE_NORM = ("input_layernorm", "input_layernorm", None, None)
_PHI3 = {"self_attn.qkv_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",)}
_PHI3_MLP = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}
_EXPERTS_APART = {f"mlp.experts.{{}}.{part}_proj": (part,) for part in ("gate", "up", "down")} | {
    "mlp.gate": ("router",)
}
_EXPERTS_STACKED = {
    "mlp.experts.gate_up_proj": ("gate", "up"),
    "mlp.experts.down_proj": ("down",),
    "mlp.gate": ("router",),
}
"""The names that transformers 5 has in memory, and in files of `save_pretrained(save_original_format=False)`."""
_GRANITE_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def _granite_scales(config: Config) -> dict[str, float]:
    return {
        "attention_scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": 1 / config["logits_scaling"],
    }


def _qwen_routed(config: Config, layer: int) -> bool:
    is_left_out = layer in (config.get("mlp_only_layers") or ())
    return not is_left_out and (layer + 1) % int(config["decoder_sparse_step"]) == 0


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
    "phi3": Family({"rms_norm_eps": 1e-5, "sliding_window": None}, matrices=_PHI3 | _PHI3_MLP, windows=_every_layer),
    "olmo2": Family({"rms_norm_eps": 1e-5}, norms=_AFTER, wide_head_norms=True),
    "granite": Family(_GRANITE_DEFAULTS, scales=_granite_scales),
    "mixtral": Family(
        {
            **{"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1_000_000.0},
            **{"num_local_experts": 8, "num_experts_per_tok": 2},
        },
        experts=Experts(
            (
                {
                    "block_sparse_moe.experts.{}.w1": ("gate",),
                    "block_sparse_moe.experts.{}.w3": ("up",),
                    "block_sparse_moe.experts.{}.w2": ("down",),
                    "block_sparse_moe.gate": ("router",),
                },
                _EXPERTS_STACKED,
            ),
        ),
        windows=_every_layer,
    ),
    "qwen3_moe": Family(
        {
            **{"rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "norm_topk_prob": False},
            **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1},
        },
        experts=Experts(
            (_EXPERTS_APART, _EXPERTS_STACKED),
            intermediate_key="moe_intermediate_size",
            normalizes=lambda config: bool(config["norm_topk_prob"]),
            routed=_qwen_routed,
        ),
        windows=_window_if_used,
    ),
    "olmoe": Family(
        {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        experts=Experts(
            (_EXPERTS_APART, _EXPERTS_STACKED),
            normalizes=lambda config: bool(config["norm_topk_prob"]),
        ),
        wide_head_norms=True,
        refused=("clip_qkv",),
    ),
    "granitemoe": Family(
        {**_GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
        experts=Experts(
            (
                {
                    "block_sparse_moe.input_linear.weight": ("gate", "up"),
                    "block_sparse_moe.output_linear.weight": ("down",),
                    "block_sparse_moe.router.layer": ("router",),
                },
                {
                    "block_sparse_moe.experts.gate_up_proj": ("gate", "up"),
                    "block_sparse_moe.experts.down_proj": ("down",),
                    "block_sparse_moe.router": ("router",),
                },
            ),
        ),
        scales=_granite_scales,
    ),
    "gpt_neox": Family(
        {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True},
        root="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        heads=("embed_out", "lm_head"),
        matrices={
            "attention.query_key_value": ("q", "k", "v"),
            "attention.dense": ("o",),
            "mlp.dense_h_to_4h": ("up",),
            "mlp.dense_4h_to_h": ("down",),
        },
        interleaves_heads=True,
        has_layer_norms=True,
        epsilon_key="layer_norm_eps",
        is_parallel=lambda config: bool(config["use_parallel_residual"]),
        rope_of=_neox_rope,
    ),
    "phi": Family(
        {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        norm="final_layernorm",
        matrices={
            **{f"self_attn.{part}_proj": (part,) for part in "qkv"},
            "self_attn.dense": ("o",),
            "mlp.fc1": ("up",),
            "mlp.fc2": ("down",),
        },
        norms=_ONE_NORM,
        has_layer_norms=True,
        epsilon_key="layer_norm_eps",
        is_parallel=lambda config: True,
        refused=("qk_layernorm",),
    ),
    "stablelm": Family(
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        has_layer_norms=True,
        epsilon_key="layer_norm_eps",
        refused=("qk_layernorm", "use_parallel_residual"),
    ),
    "starcoder2": Family(
        {
            **{"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
            **{"sliding_window": None, "tie_word_embeddings": True},
        },
        matrices=_ATTENTION | {"mlp.c_fc": ("up",), "mlp.c_proj": ("down",)},
        has_layer_norms=True,
        epsilon_key="norm_epsilon",
        windows=_every_layer,
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
        experts = _experts(family, config)
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
            epsilon=float(config[family.epsilon_key]),
            activation=_ACTIVATIONS[name],
            is_tied=bool(config["tie_word_embeddings"]),
            windows=tuple(family.windows(config)),
            ropes=tuple(of_layers),
            is_parallel=family.is_parallel(config),
            **experts,
            **{"attention_scale": head_dim**-0.5, **family.scales(config)},
        )
    except KeyError as error:
        raise InputError(f"config.json lacks {error}: fetch the model again") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config.json is damaged ({error}): fetch the model again") from error


def _experts(family: Family, config: Config) -> dict[str, Any]:
    """The fields of a description on experts. transformers has two names for their number, and older files either."""
    layers = range(int(config["num_hidden_layers"]))
    if family.experts is None:
        return {"routed": (False,) * len(layers)}
    count = int(config.get("num_local_experts", config.get("num_experts")))
    each = int(config["num_experts_per_tok"])
    if not 1 <= each <= count:
        raise InputError(
            f"config.json has {each} of {count} experts for a token: castlm-runtime needs at least 1 of each"
        )
    return {
        "routed": tuple(family.experts.routed(config, layer) for layer in layers),
        "num_experts": count,
        "experts_per_token": each,
        "expert_intermediate": int(config[family.experts.intermediate_key]),
        "normalizes_experts": family.experts.normalizes(config),
    }
