"""A packed model of transformers as the C++ engine takes it (`engine.h`), for tests of the engine by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Parts
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from castlm.core.sparsify import prune_
from castlm.packed import native
from castlm.packed.layers import pack_model_
from castlm.packed.tensor import pack
from tests.tiny import tiny_model

KINDS = {"bf16": 0, "int8": 1, "fp32": 2}
BLOCK = 64
ERRORS = {"fp32": 1e-5, "bf16": 6e-3, "int8": 3e-2}  # of all logits together, beside their size

_pointer, _size, _float, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
_WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm")
_SIZES = ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary")
_EXPERTS = ("num_experts", "experts_per_token", "expert_intermediate")
_CHOICES = ("activation", "wide_head_norms", "layer_norms", "is_parallel", "normalizes_experts")
_SCALES = ("epsilon", "attention_scale", "embedding_scale", "residual_scale", "logit_scale", "logit_cap")


class WeightRef(ctypes.Structure):
    _fields_ = [("packed", _pointer), *((name, _size) for name in ("bytes", "rows", "columns")), ("bias", _pointer)]


class LayerSpec(ctypes.Structure):
    _fields_ = [
        *((name, WeightRef) for name in _WEIGHTS),
        *((name, _pointer) for name in (*_NORMS, "cosines", "sines")),
        ("window", _size),
        ("router", WeightRef),
        ("experts", _pointer),
    ]


class ModelSpec(ctypes.Structure):
    _fields_ = [
        *((name, _size) for name in (*_SIZES, "max_positions", "rotary_dim", *_EXPERTS)),
        *((name, _int) for name in _CHOICES),
        *((name, _float) for name in _SCALES),
        ("layers", ctypes.POINTER(LayerSpec)),
        ("norm", _pointer),
        *((name, WeightRef) for name in ("head", "embedding")),
    ]


class SequenceSpec(ctypes.Structure):
    _fields_ = [
        ("tokens", _pointer),
        *((name, _size) for name in ("count", "position")),
        *((name, _pointer) for name in ("blocks", "logits")),
        ("all_logits", _size),
    ]


def packed_model(family: str, n: int = 2, m: int = 4, **over: Any) -> PreTrainedModel:
    """A tiny model with packed layers."""
    model = tiny_model(family, **over)
    prune_(model)
    pack_model_(model, n, m, dtype=torch.float32)
    return model


def ids_of(count: int, seed: int = 0) -> Tensor:
    """Random tokens (count,)."""
    return torch.randint(264, (count,), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, exact: Tensor) -> float:
    """The size of the error of all numbers together, beside theirs."""
    return float((found - exact).norm() / exact.norm())


def library() -> ctypes.CDLL:
    found = native.built()
    found.castlm_model_new.argtypes = [_pointer, _pointer]
    found.castlm_cache_new.argtypes = [_pointer, ctypes.c_int, _size, _pointer]
    found.castlm_forward.argtypes = [_pointer, _pointer, _pointer, _size, ctypes.c_int]
    found.castlm_cache_block_bytes.argtypes, found.castlm_cache_block_bytes.restype = [_pointer, ctypes.c_int], _size
    found.castlm_model_barriers.argtypes, found.castlm_model_barriers.restype = [_pointer], _size
    found.castlm_cache_release.argtypes = [_pointer, _pointer, _size]
    for name in ("castlm_model_free", "castlm_cache_free"):
        getattr(found, name).argtypes = [_pointer]
    return found


class RefusedError(Exception):
    """A pass returned an error code."""


class Engine:
    """A model and a cache of `num_blocks` blocks. `model` has packed layers and an embedding of any kind."""

    def __init__(self, model: Any, kind: str = "fp32", num_blocks: int = 64, max_positions: int = 1024, **over: Any):
        config, inner = model.config, model.model
        self.library, self.model = library(), model
        attention = inner.layers[0].self_attn
        dim, vocabulary = attention.head_dim, model.lm_head.out_features
        angles = inner.rotary_emb(torch.zeros(1, 1), torch.arange(max_positions)[None])
        self.cosines, self.sines = (part[0, :, : part.shape[-1] // 2].float().contiguous() for part in angles)
        table = pack(inner.embed_tokens(torch.arange(vocabulary)).float(), 0, 0)
        self.table = native.allocate(native.packed_bytes("fp32", 0, 0, vocabulary, config.hidden_size))
        table.repack_(self.table)
        self.layers = (LayerSpec * len(inner.layers))()
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in DynamicCache(config=config).layers]
        for i, layer in enumerate(inner.layers):
            self.layers[i] = self._layer(layer, windows[i])
        fields = {
            "num_layers": len(inner.layers),
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": attention.k_proj.out_features // dim,
            "head_dim": dim,
            "intermediate": config.intermediate_size,
            "vocabulary": vocabulary,
            "max_positions": max_positions,
            "rotary_dim": 2 * self.cosines.shape[1],
            "activation": 0,
            "epsilon": inner.norm.variance_epsilon,
            "attention_scale": attention.scaling,
            "embedding_scale": 1,
            "residual_scale": 1,
            "logit_scale": 1,
            "layers": self.layers,
            "norm": inner.norm.weight.data_ptr(),
            "head": _weight(model.lm_head),
            "embedding": WeightRef(self.table.data_ptr(), self.table.numel(), vocabulary, config.hidden_size, None),
        }
        self.spec = ModelSpec(**fields | over)
        self.handle, self.cache = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.library.castlm_model_new(ctypes.byref(self.spec), ctypes.byref(self.handle)) == 0
        code = self.library.castlm_cache_new(self.handle, KINDS[kind], num_blocks, ctypes.byref(self.cache))
        assert code == 0

    def _layer(self, layer: Any, window: int) -> LayerSpec:
        attention, mlp = layer.self_attn, layer.mlp
        turns = getattr(attention, "use_rope", True)
        weights = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        weights += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return LayerSpec(
            *map(_weight, weights),
            *(None if norm is None else norm.weight.data_ptr() for norm in norms),
            cosines=self.cosines.data_ptr() if turns else None,
            sines=self.sines.data_ptr() if turns else None,
            window=window,
        )

    def forward(
        self, parts: Parts[tuple[Tensor, int, list[int]]], threads: int = 1, every: bool = False
    ) -> list[Tensor]:
        """The logits of each part: (tokens, position, blocks); of every token, or of the last one."""
        specs, kept, logits = (SequenceSpec * len(parts))(), [], []
        for i, (tokens, position, blocks) in enumerate(parts):
            ids, numbers = tokens.to(torch.int32).contiguous(), torch.tensor(blocks, dtype=torch.int32)
            out = torch.full((len(ids) if every else 1, self.spec.vocabulary), torch.nan)
            kept += [ids, numbers]
            logits.append(out)
            specs[i] = SequenceSpec(ids.data_ptr(), len(ids), position, numbers.data_ptr(), out.data_ptr(), every)
        code = self.library.castlm_forward(self.handle, self.cache, specs, len(parts), threads)
        if code:
            raise RefusedError(code)
        return logits

    def read(self, ids: Tensor, lengths: Parts[int], blocks: list[int], threads: int = 1) -> Tensor:
        """The logits of every token of `ids`, read in parts of `lengths`, in a pass of its own each."""
        found, position = [], 0
        for length in lengths:
            found += self.forward([(ids[position : position + length], position, blocks)], threads, every=True)
            position += length
        assert position == len(ids)
        return torch.cat(found)

    def barriers(self) -> int:
        return int(self.library.castlm_model_barriers(self.handle))

    def __del__(self) -> None:
        self.library.castlm_cache_free(self.cache)
        self.library.castlm_model_free(self.handle)


def _weight(layer: Any) -> WeightRef:
    bias = None if layer.bias is None else layer.bias.data_ptr()
    return WeightRef(layer.packed.data_ptr(), layer.packed.numel(), layer.out_features, layer.in_features, bias)
