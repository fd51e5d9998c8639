"""The storage layout of weights in transformers and castlm, by names and shapes alone.

Neither torch nor transformers is imported: their import takes longer than most readers of these names do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

QUANT_METHOD = "castlm"
"""`quant_method` of a packed folder, in the `quantization_config` of its config.json."""

PACKED_NOTICE = (
    "castlm's packed format: install castlm and call castlm.register() before from_pretrained, or castlm unpack it"
)
"""`transformers_weights` of a packed folder. It names no file: transformers without castlm quotes it in its error."""


def names_no_weights(transformers_weights: object) -> bool:
    """Whether the entry `transformers_weights` of a config.json is absent, or the notice of any version of castlm."""
    return transformers_weights is None or str(transformers_weights).startswith(PACKED_NOTICE.partition(":")[0])


EXPERTS_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"})
"""`config.json` model types whose 3-D experts are stored (experts, in, out); all others have (experts, out, in)."""

EXPERTS_EITHER_WAY = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
"""Model types whose checkpoints have either order, which transformers tells apart by their sizes."""

CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""`config.json` model types whose blocks are made of transformers' `Conv1D`, stored (in, out)."""

_CONV1D_LAYER = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_proj|c_fc)\.weight$")

OLD_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Causal masks and rotary tables that old checkpoints store and today's models compute."""


def stored_transposed(model_type: str | None, name: str) -> bool:
    """Whether the tensor `name` is stored (in, out), so that its n:m groups run along axis 0.

    Args:
        model_type: `model_type` of the checkpoint's config.json.
        name: the tensor's name in the checkpoint, ending in `.weight`.
    """
    return model_type in CONV1D_FAMILIES and _CONV1D_LAYER.search(name) is not None


def parts_of_config(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The content of a config.json and of all configs in it, such as `text_config`, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts_of_config(value)


def input_axis(config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> int | None:
    """The axis of a stored weight that n:m groups run along; None for experts whose order config.json leaves open.

    A model may hold another family's, as a LLaVA over a gpt-oss does, whose weights are stored as that family's.

    Args:
        config: the content of config.json.
        name: of the tensor, ending in `.weight` if it is 2-D; 3-D as `model.layers.3.mlp.experts.gate_up_proj`.
        shape: (out, in) or (in, out); or of all experts of a block, with their number first.
    """
    typed = {kind: part for part in parts_of_config(config) if isinstance(kind := part.get("model_type"), str)}
    if len(shape) == 2:
        return 0 if any(stored_transposed(kind, name) for kind in typed) else 1
    if not EXPERTS_IN_OUT.isdisjoint(typed):
        return 1
    either = next((part for kind, part in typed.items() if kind in EXPERTS_EITHER_WAY), None)
    if either is None:
        return 2 if typed else None
    text = either.get("text_config")
    hidden = (text if isinstance(text, dict) else either).get("hidden_size")
    if (shape[1] == hidden) == (shape[2] == hidden):
        return None
    hidden_axis = 1 if shape[1] == hidden else 2
    return 3 - hidden_axis if "down_proj" in name else hidden_axis


def guess_model_type(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """For files without a config.json: `"gpt2"` if a fused attention projection is (d, 3d), as only Conv1D stores it.

    GPT-BigCode has the same names over `nn.Linear`, with (3d, d) or (d + 2*head, d).
    """
    fused = (shape for name, shape in shapes.items() if name.endswith(".attn.c_attn.weight"))
    return "gpt2" if any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in fused) else None
