"""Finds the axes of a model family that a change of basis acts on: attention values and MLP neurons.

All matrices are views of the model's own parameters, so fused layers (GPT-2's `c_attn`, fused experts) and separate
ones look alike to `basis.py`, which changes them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.models.architecture import is_vision_language


@dataclass(frozen=True)
class Matrix:
    """A linear map, or a block of rows or columns of one."""

    layer: str  # name of its module; for an expert, the name of the projection and the number of the expert
    weight: Tensor  # (out, in), a view of the parameter
    bias: Tensor | None = None  # (out,), a view of the parameter

    def rows(self, rows: slice) -> Matrix:
        """Some rows of the matrix, such as v of a layer that computes q, k and v."""
        return Matrix(self.layer, self.weight[rows], None if self.bias is None else self.bias[rows])

    def parts(self, num_rows: int) -> list[Matrix]:
        """The matrix in parts of `num_rows` rows, such as gate and up of a fused layer."""
        return [self.rows(slice(at, at + num_rows)) for at in range(0, len(self.weight), num_rows)]


@dataclass(frozen=True)
class Attention:
    """The value path of one attention layer: each head averages outputs of `value` over tokens, for `output`."""

    value: Matrix  # (num_kv_heads * head_dim, hidden)
    output: Matrix  # (hidden, num_heads * head_dim)
    head_dim: int

    @property
    def num_kv_heads(self) -> int:
        return self.value.weight.shape[0] // self.head_dim

    @property
    def kv_head_of(self) -> list[int]:
        """The KV head that each head of `output` reads."""
        num_heads = self.output.weight.shape[1] // self.head_dim
        # 9 heads, 3 KV heads: 0 0 0 1 1 1 2 2 2
        return [head * self.num_kv_heads // num_heads for head in range(num_heads)]


@dataclass(frozen=True)
class Mlp:
    """One MLP or expert: neuron i is row i of every matrix in `inner` and column i of `down`."""

    inner: tuple[Matrix, ...]
    down: Matrix


@dataclass
class Block:
    """A transformer block."""

    attention: Attention
    mlps: list[Mlp]


@dataclass(frozen=True)
class Layout:
    """The names of a family's modules; names inside a block are relative to the block."""

    stack: str = "model.layers"
    attention: str = "self_attn"
    value: str = "v_proj"
    """Relative to the attention; the layer may compute q, k and v, in this order."""
    output: str = "o_proj"
    """Relative to the attention."""
    inner: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """One name if there is no gate, or if a single layer computes gate and up."""
    down: str = "mlp.down_proj"


def describe(model: PreTrainedModel) -> list[Block]:
    """The blocks of a model whose `Conv1D` are `nn.Linear` already, as `castlm.models.io.load_model` makes them.

    Raises:
        InputError: a family that is not in `LAYOUTS`, or a variant with other blocks.
    """
    sees_images = is_vision_language(model.config)
    family = (model.config.get_text_config() if sees_images else model.config).model_type
    layout, reason = LAYOUTS.get(family, Layout()), None
    if family not in LAYOUTS or (sees_images and layout.stack != Layout.stack):
        reason = "it is not among the families that docs/models.md lists"
    elif sees_images and not hasattr(model.base_model, "language_model"):
        reason = "it has no model.language_model"
    if reason:
        of_images = " in a vision-language model" if sees_images else ""
        raise InputError(
            f"the basis of {family}{of_images} cannot be changed: {reason}; use rotate off and permute off"
        )
    stack = f"model.language_model.{layout.stack.removeprefix('model.')}" if sees_images else layout.stack
    num_blocks = len(list(model.get_submodule(stack).children()))
    return [_block(model, f"{stack}.{index}", layout) for index in range(num_blocks)]


def _block(model: nn.Module, name: str, layout: Layout) -> Block:
    attention: Any = model.get_submodule(f"{name}.{layout.attention}")
    output = _matrix(model, f"{name}.{layout.attention}.{layout.output}")
    value = _matrix(model, f"{name}.{layout.attention}.{layout.value}")
    num_queries = output.weight.shape[1]
    if len(value.weight) > num_queries:
        # The rows are q, k, v; q has as many as o has columns, and k as many as v, which has no more than q.
        num_values = (len(value.weight) - num_queries) // 2  # GPT-2: (2304 - 768) // 2 = 768
        value = value.rows(slice(-num_values, None))
    return Block(Attention(value, output, attention.head_dim), _feed_forward(model, name, layout))


def _matrix(model: nn.Module, name: str) -> Matrix:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return Matrix(name, layer.weight.data, None if layer.bias is None else layer.bias.data)


def _feed_forward(model: nn.Module, block: str, layout: Layout) -> list[Mlp]:
    """The MLPs of a block, each expert among them."""
    name = f"{block}.mlp"
    module: Any = getattr(model.get_submodule(block), "mlp", None)
    if not hasattr(module, "experts"):
        return [_mlp(model, block, layout.inner, layout.down)]
    mlps = []
    stored = {projection.removesuffix(".weight"): p.data for projection, p in module.experts.named_parameters()}
    for expert, (gate_up, down) in enumerate(zip(stored["gate_up_proj"], stored["down_proj"])):
        # gate and up of one expert: (2816, 2048) -> 2 x (1408, 2048)
        inner = Matrix(f"{name}.experts.gate_up_proj.{expert}", gate_up).parts(down.shape[1])
        mlps.append(Mlp(tuple(inner), Matrix(f"{name}.experts.down_proj.{expert}", down)))
    for shared in ("shared_expert", "shared_experts"):
        if hasattr(module, shared):
            mlps.append(_mlp(model, f"{name}.{shared}", ("gate_proj", "up_proj"), "down_proj"))
    return mlps


def _mlp(model: nn.Module, name: str, inner: tuple[str, ...], down: str) -> Mlp:
    """An MLP. If one layer computes gate and up, each half is a matrix."""
    last = _matrix(model, f"{name}.{down}")
    num_neurons = last.weight.shape[1]
    parts = [part for layer in inner for part in _matrix(model, f"{name}.{layer}").parts(num_neurons)]
    return Mlp(tuple(parts), last)


_LLAMA = Layout()
_UNGATED = Layout(inner=("mlp.up_proj",))
_FUSED_GATE = Layout(inner=("mlp.gate_up_proj",))
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "granite"), _LLAMA),
    **dict.fromkeys(("seed_oss", "ernie4_5", "helium", "hunyuan_v1_dense", "cwm", "stablelm"), _LLAMA),
    **dict.fromkeys(("gemma", "vaultgemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _LLAMA),
    **dict.fromkeys(("cohere", "cohere2"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1"), _LLAMA),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _LLAMA),
    **dict.fromkeys(("arcee", "apertus", "nemotron"), _UNGATED),
    **dict.fromkeys(("glm", "glm4"), _FUSED_GATE),
    "phi3": replace(_FUSED_GATE, value="qkv_proj"),
    "phi": Layout(output="dense", inner=("mlp.fc1",), down="mlp.fc2"),
    "starcoder2": Layout(inner=("mlp.c_fc",), down="mlp.c_proj"),
    "opt": Layout(stack="model.decoder.layers", output="out_proj", inner=("fc1",), down="fc2"),
    "gpt2": Layout(
        stack="transformer.h",
        attention="attn",
        value="c_attn",
        output="c_proj",
        inner=("mlp.c_fc",),
        down="mlp.c_proj",
    ),
}
"""The layout of each family whose basis can be changed, by `model_type`."""
