"""Finds the axes of a model family that a change of basis acts on: residual stream, attention values, MLP neurons.

All matrices are views of the model's own parameters, so fused layers (GPT-2's `c_attn`, fused experts) and separate
ones look alike to `basis.py`, which changes them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.models.architecture import embedding_weight, is_vision_language


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
class Norm:
    """A normalization of the residual stream."""

    module: nn.Module
    is_layer_norm: bool  # whether it subtracts the mean; otherwise it is an RMSNorm
    unit: float = 1.0  # the weight for a gain of 1: 0 in Gemma and Nemotron, whose gain is 1 + weight

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def gain(self) -> Tensor:
        return self.weight.detach() + (1 - self.unit)

    @property
    def bias(self) -> Tensor | None:
        return self.module._parameters.get("bias")


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
        return [head * self.num_kv_heads // num_heads for head in range(num_heads)]


@dataclass(frozen=True)
class Mlp:
    """One MLP or expert: neuron i is row i of every matrix in `inner` and column i of `down`."""

    inner: tuple[Matrix, ...]
    down: Matrix


Read = tuple[Norm | None, list[Matrix]]
"""A norm of the residual stream with the matrices that read its output; None if they read the stream itself."""


@dataclass
class Block:
    """A transformer block."""

    attention: Attention
    mlps: list[Mlp]
    reads: list[Read]
    """The readers of the residual stream, in order: attention, then MLPs; one entry if they run in parallel."""


@dataclass
class Wiring:
    """The readers, writers and normalizations of the residual stream of a whole model."""

    family: str
    hidden: int
    final: Norm  # the normalization before the output head
    blocks: list[Block]
    embeddings: list[Tensor]  # (tokens or positions, hidden) each; their rows are added to the stream
    rotation_obstacle: str | None = None  # why the residual stream cannot be rotated; None if it can

    @property
    def reads(self) -> list[Read]:
        """The reads of all blocks, in order; the columns of their matrices are the channels of the stream."""
        return [read for block in self.blocks for read in block.reads]

    @property
    def writes(self) -> list[Matrix]:
        """The matrices whose rows are the channels of the stream."""
        found = []
        for block in self.blocks:
            found += [block.attention.output, *(mlp.down for mlp in block.mlps)]
        return found


@dataclass(frozen=True)
class Layout:
    """The names of a family's modules; names inside a block are relative to the block."""

    stack: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final: str = "model.norm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Relative to the attention; one name if a single layer computes q, k and v, in this order."""
    output: str = "o_proj"
    """Relative to the attention."""
    inner: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """One name if there is no gate, or if a single layer computes gate and up."""
    down: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """The norms before attention and MLP; one if they run in parallel, none if they read the stream itself."""
    norms_behind: tuple[str, ...] = ()
    """The norms after attention and MLP: their gains act on single channels, which a rotation would mix."""
    is_layer_norm: bool = False
    unit: float = 1.0


def describe(model: PreTrainedModel) -> Wiring:
    """The wiring of a model whose `Conv1D` are `nn.Linear` already, as `castlm.models.io.load_model` makes them.

    Raises:
        InputError: a family that is not in `LAYOUTS`, or a variant with other blocks.
    """
    sees_images = is_vision_language(model.config)
    config = model.config.get_text_config() if sees_images else model.config
    family = config.model_type
    layout, reason = LAYOUTS.get(family, Layout()), None
    if family not in LAYOUTS or (sees_images and layout.stack != Layout.stack):
        reason = "it is not among the families that docs/method.md lists"
    elif sees_images and "language_model" not in model.base_model._modules:
        reason = "it has no model.language_model"
    elif family == "opt" and (not config.do_layer_norm_before or config._remove_final_layer_norm):
        reason = "it normalizes after its sublayers"
    if reason:
        of_images = " in a vision-language model" if sees_images else ""
        raise InputError(
            f"the basis of {family}{of_images} cannot be changed: {reason}; use rotate off and permute off"
        )
    names = (layout.stack, layout.final, *layout.embeddings)
    if sees_images:
        names = tuple(f"model.language_model.{name.removeprefix('model.')}" for name in names)
    stack, final, *embeddings = names
    obstacle = None
    if sees_images:
        obstacle = "its images enter it through a projector"
    elif family == "opt" and config.word_embed_proj_dim != config.hidden_size:
        obstacle = "its embeddings are projected to the width of its blocks"
    elif layout.norms_behind:
        obstacle = "the gains of the norms after its sublayers act on single channels"
    num_blocks = len(model.get_submodule(stack)._modules)
    return Wiring(
        family,
        hidden=embedding_weight(model).shape[1],
        final=_norm(model, final, layout),
        blocks=[_block(model, f"{stack}.{index}", layout) for index in range(num_blocks)],
        embeddings=[model.get_submodule(name).get_parameter("weight").data for name in embeddings],
        rotation_obstacle=obstacle,
    )


def _block(model: nn.Module, name: str, layout: Layout) -> Block:
    module: Any = model.get_submodule(name)
    attention: Any = module.get_submodule(layout.attention)
    qkv = [_matrix(model, f"{name}.{layout.attention}.{part}") for part in layout.qkv]
    output = _matrix(model, f"{name}.{layout.attention}.{layout.output}")
    value = qkv[-1]
    if len(qkv) == 1:
        # The rows are q, k, v; q has as many as o has columns, k as many as v.
        num_values = (len(value.weight) - output.weight.shape[1]) // 2  # GPT-2: (2304 - 768) // 2 = 768
        value = value.rows(slice(-num_values, None))
    mlps, readers = _feed_forward(model, name, layout)
    norms = [_norm(module, norm, layout) for norm in layout.norms if module._modules[norm] is not None]
    reads: list[Read]
    if len(norms) == 1:
        reads = [(norms[0], [*qkv, *readers])]
    elif norms:
        reads = list(zip(norms, (qkv, readers), strict=True))
    else:
        reads = [(None, qkv), (None, readers)]
    return Block(Attention(value, output, attention.head_dim), mlps, reads)


def _norm(module: nn.Module, name: str, layout: Layout) -> Norm:
    return Norm(module.get_submodule(name), layout.is_layer_norm, layout.unit)


def _matrix(model: nn.Module, name: str) -> Matrix:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return Matrix(name, layer.weight.data, None if layer.bias is None else layer.bias.data)


def _feed_forward(model: nn.Module, block: str, layout: Layout) -> tuple[list[Mlp], list[Matrix]]:
    """The MLPs of a block, and all readers of their input, the router of experts included."""
    name = f"{block}.mlp"
    module: Any = model.get_submodule(block)._modules.get("mlp")
    if module is None or "experts" not in module._modules:
        return _mlp(model, block, layout.inner, layout.down)
    experts = module.experts
    mlps = []
    readers = [Matrix(f"{name}.gate", module.gate.weight.data)]
    stored = {projection.removesuffix(".weight"): p.data for projection, p in experts.named_parameters()}
    for expert, (gate_up, down) in enumerate(zip(stored["gate_up_proj"], stored["down_proj"])):
        inner = Matrix(f"{name}.experts.gate_up_proj.{expert}", gate_up).parts(down.shape[1])
        mlps.append(Mlp(tuple(inner), Matrix(f"{name}.experts.down_proj.{expert}", down)))
        readers += inner
    for shared in ("shared_expert", "shared_experts"):
        if shared in module._modules:
            own, read = _mlp(model, f"{name}.{shared}", ("gate_proj", "up_proj"), "down_proj")
            mlps += own
            readers += read
    if "shared_expert_gate" in module._modules:
        readers.append(_matrix(model, f"{name}.shared_expert_gate"))
    return mlps, readers


def _mlp(model: nn.Module, name: str, inner: tuple[str, ...], down: str) -> tuple[list[Mlp], list[Matrix]]:
    """An MLP, and the layers that read its input. If one layer computes gate and up, each half is a matrix."""
    readers = [_matrix(model, f"{name}.{part}") for part in inner]
    last = _matrix(model, f"{name}.{down}")
    num_neurons = last.weight.shape[1]
    parts = [part for matrix in readers for part in matrix.parts(num_neurons)]
    return [Mlp(tuple(parts), last)], readers


_LLAMA = Layout()
_SANDWICH = Layout(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    norms_behind=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_BEHIND = Layout(norms=(), norms_behind=("post_attention_layernorm", "post_feedforward_layernorm"))
_UNGATED = Layout(inner=("mlp.up_proj",))
_FUSED_GATE = Layout(inner=("mlp.gate_up_proj",))
_PARALLEL = Layout(norms=("input_layernorm",), is_layer_norm=True)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "granite"), _LLAMA),
    **dict.fromkeys(("seed_oss", "ernie4_5", "helium", "hunyuan_v1_dense", "cwm"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1"), _LLAMA),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _LLAMA),
    "gemma": replace(_LLAMA, unit=0.0),
    "vaultgemma": replace(_LLAMA, norms=_SANDWICH.norms, unit=0.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(_SANDWICH, unit=0.0)),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _BEHIND),
    "arcee": _UNGATED,
    "apertus": replace(_UNGATED, norms=("attention_layernorm", "feedforward_layernorm")),
    "nemotron": replace(_UNGATED, is_layer_norm=True, unit=0.0),
    "glm": _FUSED_GATE,
    "glm4": replace(_FUSED_GATE, norms_behind=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "phi3": replace(_FUSED_GATE, qkv=("qkv_proj",)),
    **dict.fromkeys(("cohere", "cohere2"), _PARALLEL),
    "phi": replace(_PARALLEL, final="model.final_layernorm", output="dense", inner=("mlp.fc1",), down="mlp.fc2"),
    "stablelm": replace(_LLAMA, is_layer_norm=True),
    "starcoder2": replace(_LLAMA, inner=("mlp.c_fc",), down="mlp.c_proj", is_layer_norm=True),
    "opt": Layout(
        stack="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final="model.decoder.final_layer_norm",
        output="out_proj",
        inner=("fc1",),
        down="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        is_layer_norm=True,
    ),
    "gpt2": Layout(
        stack="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final="transformer.ln_f",
        attention="attn",
        qkv=("c_attn",),
        output="c_proj",
        inner=("mlp.c_fc",),
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        is_layer_norm=True,
    ),
}
"""The layout of each family whose basis can be changed, by `model_type`."""
