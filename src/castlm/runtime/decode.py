"""Decodes a packed model with one call of `decoder.cpp` per token, as a `custom_generate` of transformers' `generate`.

transformers prepares logits processors and stopping criteria. In a small model its Python code between the layers takes
longer than the multiplications; none of it runs for a new token, and for a prompt only where its GEMM is faster.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from castlm.core.errors import InputError
from castlm.runtime import native
from castlm.runtime.layers import PackedEmbedding, PackedLinear
from castlm.say import Say, silent

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "cwm", "seed_oss", "smollm3")
"""Model types of transformers whose layers `decoder.cpp` can compute."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the length of the sequence
_MODULES = {f"transformers.models.{family}.modeling_{family}" for family in FAMILIES}

# `decoder.cpp` writes fp32 to CPU memory, under any default dtype and device.
_HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

ONE_SEQUENCE = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
"""Options of `generate` to return the tokens of one sequence, overriding the model's generation config."""


def decoding_method(
    model: PreTrainedModel,
    streamer: BaseStreamer | None = None,
    say: Say = silent,
    **options: Any,
) -> Callable[..., Tensor] | None:
    """The `custom_generate` of `generate` for one sequence without padding: `decode` if `model` allows it.

    None for other models: `generate(custom_generate=None)` decodes in transformers' loop, to the same tokens.

    Args:
        streamer: receives the tokens; transformers does not pass the streamer of `generate` to a `custom_generate`.
        say: called with a line if a packed model must use transformers' loop, with the reason.
        options: further options of `generate`, which override the model's generation config.
    """
    reason = _why_not(model, options)
    if reason is None:
        return functools.partial(decode, streamer=streamer)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        say(f"castlm's decoder is not used, which makes decoding slower: {reason}")
    return None


class FiniteLogits(LogitsProcessor):
    """Refuses logits from which no token can be chosen: finite weights may be too large for a finite product."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax().isfinite()):  # -inf alone is a token that is left out
            raise InputError("the logits of the model are not finite: its weights are damaged, or too large")
        return scores


class TokenTimes(BaseStreamer):
    """A streamer that records the times of the prompt and of each new token, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def prompt_seconds(self) -> float:
        """Seconds until the first new token."""
        return self.times[1] - self.times[0]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first one, which comes with the prompt; 0 for a single token."""
        seconds = self.times[-1] - self.times[1]
        return (len(self.times) - 2) / seconds if seconds > 0 else 0.0


def greedy(model: PreTrainedModel, ids: Tensor, num_tokens: int, streamer: BaseStreamer | None = None) -> Tensor:
    """Continues `ids` (1, num_prompt) by exactly `num_tokens` as `castlm generate` does, for timing.

    No token ends the sequence. `min_new_tokens` would do the same, but searches the vocabulary twice for each token.
    """
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        eos_token_id=None,
        do_sample=False,
        stop_strings=None,
        pad_token_id=0,
        **ONE_SEQUENCE,
        streamer=streamer,
        custom_generate=decoding_method(model, streamer, **ONE_SEQUENCE),
    )


def _why_not(model: Any, options: dict[str, Any]) -> str | None:
    """Why `decode` cannot run a model; None if it can."""
    if native.kernels() is None:
        return native.NOT_BUILT
    if type(model).__module__ not in _MODULES:
        return f"it has the layers of {', '.join(FAMILIES)}, not those of {type(model).__name__}"
    config = model.config
    inner = model.model
    packed = [layer.self_attn.get_submodule(name) for layer in inner.layers for name in _ATTENTION]
    packed += [layer.mlp.get_submodule(name) for layer in inner.layers for name in _MLP]
    rope = getattr(inner.rotary_emb, "rope_type", None)
    parameters = [*model.parameters()]
    modules = [*model.modules()]
    wanted = copy.deepcopy(model.generation_config)
    wanted.update(**options)
    if not all(isinstance(layer, PackedLinear) for layer in (*packed, model.lm_head)):
        return "some layers are not packed"
    if not isinstance(inner.embed_tokens, PackedEmbedding):
        return "its embedding is not packed"
    if config.hidden_act != "silu":
        return f"it computes silu, not {config.hidden_act}"
    if rope not in _STATIC_ROPE:
        return f"the {rope} rotary embedding changes with the length of the sequence"
    is_fp32 = all(tensor.dtype == torch.float32 for tensor in (*parameters, inner.embed_tokens.weight))
    if not is_fp32 or any(tensor.device.type != "cpu" for tensor in (*model.buffers(), *parameters)):
        return "the parameters are not all in fp32 on a CPU"
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "some modules have forward hooks"
    is_one = wanted.num_return_sequences in (None, 1) and not wanted.return_dict_in_generate
    is_plain = wanted.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    # Stop strings need the tokenizer, which transformers does not pass on.
    if not (is_one and is_plain) or wanted.stop_strings:
        return "it takes one sequence, greedy or sampled, without stop strings"
    return None


class _Weight(ctypes.Structure):
    _fields_ = [
        ("packed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "rows", "columns")),
        ("bias", ctypes.c_void_p),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "keys", "values")),
        ("window", ctypes.c_int64),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate", "capacity")
        ),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("head", _Weight),
    ]


def _weight(layer: PackedLinear) -> _Weight:
    bias = None if layer.bias is None else layer.bias.data_ptr()
    packed = layer.packed
    return _Weight(packed.data_ptr(), packed.numel(), layer.out_features, layer.in_features, bias)


def _norm(module: Any) -> int | None:
    return None if module is None else module.weight.data_ptr()


class DecoderState:
    """A model and its cache, which holds the keys and values of up to `capacity` tokens in fp32.

    Args:
        model: a model that `decoding_method` supports.
        cache: transformers' `Cache` of the tokens so far, which is copied; None where there are none.
    """

    def __init__(self, model: Any, cache: Any, capacity: int):
        config, layers = model.config, model.model.layers
        attention = layers[0].self_attn
        head_dim = attention.head_dim
        num_kv_heads = attention.k_proj.out_features // head_dim
        self.model, self.length = model, 0 if cache is None else cache.get_seq_length()
        self._keys, self._values = torch.empty(2, len(layers), num_kv_heads, capacity, head_dim, **_HOST).unbind(0)
        for i, layer in enumerate(() if cache is None else cache.layers):
            first = self.length - layer.keys.shape[2]  # a sliding window holds the last tokens alone
            self._keys[i, :, first : self.length] = layer.keys[0]
            self._values[i, :, first : self.length] = layer.values[0]
        if cache is None:
            cache = DynamicCache(config=config)  # for the sliding windows
        assert len(cache.layers) == len(layers)
        angles = model.model.rotary_emb(self._keys, torch.arange(capacity, device="cpu")[None])
        self._cosines, self._sines = (part[0].float().contiguous() for part in angles)
        assert self._cosines.shape == (capacity, head_dim)
        self._layers = (_Layer * len(layers))()
        for i, layer in enumerate(cache.layers):
            self._layers[i] = self._layer(i, window=getattr(layer, "sliding_window", 0))
        self._of = _Decoder(
            num_layers=len(layers),
            hidden=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
            capacity=capacity,
            epsilon=model.model.norm.variance_epsilon,
            scale=attention.scaling,
            layers=self._layers,
            norm=_norm(model.model.norm),
            head=_weight(model.lm_head),
        )

    def _layer(self, index: int, window: int) -> _Layer:
        layer = self.model.model.layers[index]
        attention = layer.self_attn
        has_rope = getattr(attention, "use_rope", True)  # SmolLM3 has layers without
        return _Layer(
            q=_weight(attention.q_proj),
            k=_weight(attention.k_proj),
            v=_weight(attention.v_proj),
            o=_weight(attention.o_proj),
            gate=_weight(layer.mlp.gate_proj),
            up=_weight(layer.mlp.up_proj),
            down=_weight(layer.mlp.down_proj),
            attention_norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            q_norm=_norm(getattr(attention, "q_norm", None)),
            k_norm=_norm(getattr(attention, "k_norm", None)),
            cosines=self._cosines.data_ptr() if has_rope else None,
            sines=self._sines.data_ptr() if has_rope else None,
            keys=self._keys[index].data_ptr(),
            values=self._values[index].data_ptr(),
            window=window,
        )

    def read(self, ids: Tensor) -> Tensor:
        """Logits (1, vocabulary) in fp32 after `ids` (1, num_tokens), which join the cache; it must have room.

        Takes `prompt_rows` tokens at once.
        """
        assert self.length + ids.shape[1] <= self._of.capacity
        logits = torch.empty(1, self.model.lm_head.out_features, **_HOST)
        for part in ids[0].split(prompt_rows(self.model) or ids.shape[1]):
            embeddings = self.model.model.embed_tokens(part).contiguous()
            native.read_prompt(ctypes.addressof(self._of), self.length, embeddings, logits)
            self.length += len(part)
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Logits (1, vocabulary) in fp32 after `token` (1,), which joins the cache; it must have room."""
        return step_together([self], token)


def prompt_rows(model: Any) -> int:
    """Tokens that `DecoderState.read` takes at once, for a model that `decoding_method` supports; see
    `native.rows_at_a_time`.

    0 where the library's GEMM, in transformers' forward, reads a prompt faster, as for 2:4 floats with AVX2.
    """
    return min(native.rows_at_a_time(m.packed) for m in model.model.layers.modules() if isinstance(m, PackedLinear))


class PromptReader:
    """Reads a prompt in parts, by `DecoderState.read` or by transformers' forward, whichever is the fastest.

    Args:
        model: a model that `decoding_method` supports.
        capacity: as for `DecoderState`.
    """

    def __init__(self, model: Any, capacity: int):
        self.model, self.capacity = model, capacity
        self._state = DecoderState(model, None, capacity) if prompt_rows(model) else None
        self._cache: Cache | None = None  # transformers'

    def read(self, ids: Tensor) -> Tensor:
        """Logits (1, vocabulary) in fp32 after `ids` (1, num_tokens), the next part of the prompt."""
        if self._state is not None:
            return self._state.read(ids)
        output = self.model(ids, use_cache=True, logits_to_keep=1, **{cache_keyword(self.model): self._cache})
        self._cache = cache_of(output)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def finish(self) -> DecoderState:
        """The state after the parts that were read."""
        return self._state or DecoderState(self.model, self._cache, self.capacity)


def cache_keyword(model: PreTrainedModel) -> str:
    """The name by which a model's forward takes a cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache in the output of a model's forward, under either name."""
    return next(value for value in output.values() if isinstance(value, Cache))


def step_together(states: Sequence[DecoderState], tokens: Tensor) -> Tensor:
    """Logits (count, vocabulary) in fp32 after one of `tokens` (count,) in each of the sequences of one model.

    The weights are read once for all sequences. Each token joins the cache of its sequence. Kernels for one row and for
    several may sum in different orders, so the logits equal those of `step` up to rounding.
    """
    model = states[0].model
    logits = torch.empty(len(states), model.lm_head.out_features, **_HOST)
    embeddings = model.model.embed_tokens(tokens).contiguous()
    assert all(state.length < state._of.capacity for state in states)
    addresses = [ctypes.addressof(state._of) for state in states]
    native.decode(addresses, [state.length for state in states], embeddings, logits)
    for state in states:
        state.length += 1
    return logits


def decode(
    model: PreTrainedModel,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor:
    """Continues one sequence (1, num_tokens) without padding, greedily or by sampling, by its generation config; called
    by `generate`.
    """
    mask = inputs.get("attention_mask")
    assert input_ids.shape[0] == 1
    assert mask is None or bool(mask.all()), "the sequence is padded"
    assert inputs.get("inputs_embeds") is None
    prompt = PromptReader(model, generation_config.max_length)
    logits = prompt.read(input_ids)
    state = prompt.finish()
    while True:
        scores = logits_processor(input_ids, logits)
        token = torch.multinomial(scores.softmax(-1), 1)[0] if generation_config.do_sample else scores.argmax(-1)
        input_ids = torch.cat([input_ids, token[None]], dim=1)
        if streamer is not None:
            streamer.put(token)
        if bool(stopping_criteria(input_ids, scores).all()):
            break
        logits = state.step(token)
    if streamer is not None:
        streamer.end()
    return input_ids
