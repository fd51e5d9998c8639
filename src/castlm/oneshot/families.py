"""Where a model family keeps the axes that a change of basis acts on: residual stream, attention values, MLP neurons.

Everything is described as views of the model's own parameters, so that fused layers (GPT-2's `c_attn`, fused experts)
and separate ones look alike to `basis.py`, which changes them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.architecture import is_vision_language
from castlm.core.errors import InputError


@dataclass(frozen=True)
class Matrix:
    """A linear map, or a block of rows or columns of one."""

    layer: str
    """Name of the module it belongs to; of an expert, the name of the projection and its number."""
    weight: Tensor
    """(out, in), a view of the parameter."""
    bias: Tensor | None = None
    """(out,), a view of the parameter."""


@dataclass(frozen=True)
class Norm:
    """A normalization of the residual stream."""

    module: nn.Module
    is_layer_norm: bool
    """Subtracts the mean; otherwise it is an RMSNorm."""
    unit: float = 1.0
    """The weight at which the gain is 1: 0 in Gemma, whose gain is 1 + weight."""

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        return self.module.get_parameter("bias") if self.is_layer_norm else None


@dataclass(frozen=True)
class Attention:
    """The value path of one attention layer: `output` reads what the heads have averaged of `value`."""

    value: Matrix
    """(num_kv_heads * head_dim, hidden)."""
    output: Matrix
    """(hidden, num_heads * head_dim)."""
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


@dataclass
class Block:
    """A transformer block."""

    attention: Attention
    mlps: list[Mlp]


@dataclass
class Wiring:
    """A whole model: what reads the residual stream, what writes it, and what normalizes it."""

    family: str
    hidden: int
    blocks: list[Block] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    """(tokens or positions, hidden) each; what they hold is added to the stream."""
    reads: list[tuple[Norm, list[Matrix]]] = field(default_factory=list)
    """Each normalization with the matrices that read what it gives; their columns are the stream's."""
    writes: list[Matrix] = field(default_factory=list)
    """Their rows are the stream's."""
    final: Norm = field(init=False)
    """The normalization that the output head reads."""
    fixed_norms: list[Norm] = field(default_factory=list)
    """Normalize what a block writes: their gains allow a permutation of the stream, but no rotation."""
    ends: str | None = None
    """Why the stream's basis cannot be changed: something outside the blocks projects it. It is then not permuted."""

    @property
    def rotation_obstacle(self) -> str | None:
        """Why the residual stream cannot be rotated; None where it can."""
        if self.ends:
            return self.ends
        if self.fixed_norms:
            return "the gains of the norms behind its sublayers act on single channels"
        return None


def describe(model: PreTrainedModel) -> Wiring:
    """The wiring of a model whose `Conv1D` are `nn.Linear` already (`castlm.models.load_model` sees to that).

    Raises:
        InputError: a family that is not known here, or a variant of one whose blocks are put together otherwise.
    """
    sees_images = is_vision_language(model.config)
    family = model.config.get_text_config().model_type if sees_images else model.config.model_type
    if family not in FAMILIES or (sees_images and FAMILIES[family] is not _llama):
        raise InputError(
            f"the basis of {family} cannot be changed: known are {', '.join(sorted(FAMILIES))}; "
            "use rotate off and permute off"
        )
    wiring = Wiring(family, int(model.get_input_embeddings().weight.shape[1]))
    FAMILIES[family](model, wiring)
    if sees_images:
        wiring.ends = "its images enter it through a projector"
    return wiring


def _matrix(model: nn.Module, name: str, rows: slice = slice(None)) -> Matrix:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return Matrix(name, layer.weight.data[rows], None if layer.bias is None else layer.bias.data[rows])


def _llama(model: PreTrainedModel, wiring: Wiring) -> None:
    """Pre-norm blocks with q, k, v, o and gate, up, down; Gemma 2 and 3 have norms behind the sublayers as well."""
    path = "model.language_model" if is_vision_language(model.config) else "model"
    if path.count(".") and "language_model" not in model.base_model._modules:
        raise InputError(f"the basis of {type(model).__name__} cannot be changed: it has no model.language_model")
    base: Any = model.get_submodule(path)
    unit = 0.0 if wiring.family.startswith("gemma") else 1.0
    sandwich = wiring.family in _SANDWICH

    def norm(module: nn.Module) -> Norm:
        return Norm(module, is_layer_norm=False, unit=unit)

    for index, layer in enumerate(base.layers):
        name = f"{path}.layers.{index}"
        q, k, v, o = (_matrix(model, f"{name}.self_attn.{part}_proj") for part in "qkvo")
        mlps, readers = _feed_forward(model, f"{name}.mlp")
        wiring.blocks.append(Block(Attention(v, o, layer.self_attn.head_dim), mlps))
        before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        wiring.reads += [(norm(layer.input_layernorm), [q, k, v]), (norm(before_mlp), readers)]
        wiring.writes += [o, *(mlp.down for mlp in mlps)]
        if sandwich:
            wiring.fixed_norms += [norm(layer.post_attention_layernorm), norm(layer.post_feedforward_layernorm)]
    wiring.embeddings = [base.embed_tokens.weight.data]
    wiring.final = norm(base.norm)


def _feed_forward(model: nn.Module, name: str) -> tuple[list[Mlp], list[Matrix]]:
    """The MLPs of a block, and all that reads its input: with experts, the router too."""
    module: Any = model.get_submodule(name)
    if not hasattr(module, "experts"):
        gate, up, down = (_matrix(model, f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return [Mlp((gate, up), down)], [gate, up]
    experts, mlps = module.experts, []
    readers = [Matrix(f"{name}.gate", module.gate.weight.data)]
    weights = (_experts_weight(experts, projection) for projection in ("gate_up_proj", "down_proj"))
    for expert, (gate_up, down) in enumerate(zip(*weights)):
        half = gate_up.shape[0] // 2
        layer = f"{name}.experts.gate_up_proj.{expert}"
        inner = Matrix(layer, gate_up[:half]), Matrix(layer, gate_up[half:])
        mlps.append(Mlp(inner, Matrix(f"{name}.experts.down_proj.{expert}", down)))
        readers += inner
    return mlps, readers


def _experts_weight(experts: nn.Module, projection: str) -> Tensor:
    """(experts, out, in), whether `linearize_experts_` has made a layer of it or not."""
    layer = experts._modules.get(projection)
    return experts.get_parameter(projection if layer is None else f"{projection}.weight").data


def _opt(model: PreTrainedModel, wiring: Wiring) -> None:
    decoder: Any = model.base_model.decoder
    config = model.config
    if not config.do_layer_norm_before or decoder.final_layer_norm is None:
        raise InputError("the basis of this opt cannot be changed: it normalizes behind its sublayers; use rotate off")
    for index, layer in enumerate(decoder.layers):
        name = f"model.decoder.layers.{index}"
        q, k, v, o = (_matrix(model, f"{name}.self_attn.{part}_proj") for part in ("q", "k", "v", "out"))
        fc1, fc2 = _matrix(model, f"{name}.fc1"), _matrix(model, f"{name}.fc2")
        wiring.blocks.append(Block(Attention(v, o, layer.self_attn.head_dim), [Mlp((fc1,), fc2)]))
        wiring.reads += [
            (Norm(layer.self_attn_layer_norm, is_layer_norm=True), [q, k, v]),
            (Norm(layer.final_layer_norm, is_layer_norm=True), [fc1]),
        ]
        wiring.writes += [o, fc2]
    wiring.embeddings = [decoder.embed_tokens.weight.data, decoder.embed_positions.weight.data]
    wiring.final = Norm(decoder.final_layer_norm, is_layer_norm=True)
    if decoder.project_in is not None:
        wiring.ends = "its embeddings are projected to the width of its blocks"


def _gpt2(model: PreTrainedModel, wiring: Wiring) -> None:
    base: Any = model.base_model
    hidden = wiring.hidden
    for index, layer in enumerate(base.h):
        name = f"transformer.h.{index}"
        fused = _matrix(model, f"{name}.attn.c_attn")
        value = _matrix(model, f"{name}.attn.c_attn", slice(2 * hidden, 3 * hidden))
        output = _matrix(model, f"{name}.attn.c_proj")
        inner, down = _matrix(model, f"{name}.mlp.c_fc"), _matrix(model, f"{name}.mlp.c_proj")
        wiring.blocks.append(Block(Attention(value, output, layer.attn.head_dim), [Mlp((inner,), down)]))
        wiring.reads += [
            (Norm(layer.ln_1, is_layer_norm=True), [fused]),
            (Norm(layer.ln_2, is_layer_norm=True), [inner]),
        ]
        wiring.writes += [output, down]
    wiring.embeddings = [base.wte.weight.data, base.wpe.weight.data]
    wiring.final = Norm(base.ln_f, is_layer_norm=True)


_SANDWICH = frozenset({"gemma2", "gemma3_text"})
FAMILIES: dict[str, Callable[[PreTrainedModel, Wiring], None]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", *_SANDWICH), _llama),
    **dict.fromkeys(("mixtral", "qwen3_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _llama),
    "opt": _opt,
    "gpt2": _gpt2,
}
"""How to describe each `model_type`."""
