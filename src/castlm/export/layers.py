"""Which linear layers a checkpoint must hold, so that a missing or renamed one is noticed and not passed over.

For the common families the names and shapes follow from config.json by `FAMILIES`, without torch. For the others
transformers loads the checkpoint on the meta device, where weights take no memory, and says what it misses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from castlm.core.blocks import is_block_linear, is_stacked_experts, is_tower
from castlm.core.errors import InputError
from castlm.files.stored import StoredTensor
from castlm.models.layout import stored_transposed

Config = Mapping[str, Any]
Shape = tuple[int, int]


class Family(NamedTuple):
    """Names of the linear layers of one `model_type`, and the fields of config.json that their sizes follow from."""

    base: str
    """What checkpoints of the model without its head leave out: `model.`, `transformer.`."""
    block: str
    """The list of transformer blocks, after `base`."""
    layers: Mapping[str, tuple[str, str]]
    """(out, in) by the name of a layer in a block: names of sizes, see `_sizes`."""
    fields: Mapping[str, str]
    """The family's own name of a field, by LLaMA's, where it differs."""
    defaults: frozenset[str] = frozenset()
    """Fields whose absence has the meaning that it has for LLaMA; for others the absence of a field is not guessed."""


_ATTENTION = {"self_attn.q_proj": ("q", "h"), "self_attn.k_proj": ("kv", "h"), "self_attn.v_proj": ("kv", "h")}
_LLAMA = {
    **_ATTENTION,
    "self_attn.o_proj": ("h", "q"),
    "mlp.gate_proj": ("i", "h"),
    "mlp.up_proj": ("i", "h"),
    "mlp.down_proj": ("h", "i"),
}
_HEAD_DIM, _KV = "head_dim", "num_key_value_heads"


def _llama(*defaults: str) -> Family:
    return Family("model.", "layers", _LLAMA, {}, frozenset(defaults))


FAMILIES: dict[str, Family] = {
    "llama": _llama(_HEAD_DIM, _KV),
    "mistral": _llama(_HEAD_DIM),
    "qwen2": _llama(_HEAD_DIM),
    "qwen3": _llama(),
    "gemma": _llama(),
    "gemma2": _llama(),
    "olmo": _llama(_HEAD_DIM),
    "olmo2": _llama(_HEAD_DIM),
    "smollm3": _llama(_HEAD_DIM),
    "granite": _llama(_HEAD_DIM),
    "phi3": Family(
        "model.",
        "layers",
        {
            "self_attn.qkv_proj": ("qkv", "h"),
            "self_attn.o_proj": ("h", "q"),
            "mlp.gate_up_proj": ("2i", "h"),
            "mlp.down_proj": ("h", "i"),
        },
        {},
        frozenset({_HEAD_DIM}),
    ),
    "gpt_neox": Family(
        "gpt_neox.",
        "layers",
        {
            "attention.query_key_value": ("3h", "h"),
            "attention.dense": ("h", "h"),
            "mlp.dense_h_to_4h": ("i", "h"),
            "mlp.dense_4h_to_h": ("h", "i"),
        },
        {},
    ),
    "gpt2": Family(
        "transformer.",
        "h",
        {
            "attn.c_attn": ("3h", "h"),
            "attn.c_proj": ("h", "h"),
            "mlp.c_fc": ("i", "h"),
            "mlp.c_proj": ("h", "i"),
        },
        {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner"},
        frozenset({"intermediate_size"}),
    ),
    "opt": Family(
        "model.",
        "decoder.layers",
        {
            "self_attn.q_proj": ("h", "h"),
            "self_attn.k_proj": ("h", "h"),
            "self_attn.v_proj": ("h", "h"),
            "self_attn.out_proj": ("h", "h"),
            "fc1": ("i", "h"),
            "fc2": ("h", "i"),
        },
        {"intermediate_size": "ffn_dim"},
    ),
}


def check_layers(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    config: Config,
    trust_config: bool,
    ignored: Collection[str] = (),
) -> str:
    """Checks that a checkpoint holds every linear layer of its transformer blocks, and no other.

    Args:
        path: of the checkpoint, for messages and for transformers.
        config: the content of config.json; empty where there is none.
        trust_config: whether config.json describes `tensors`; else the blocks are only compared with each other.
        ignored: names of tensors that may be there and that config.json does not describe.

    Returns:
        What the layers were compared with, in words.

    Raises:
        InputError: a layer is missing, is not described by config.json, or has another shape.
    """
    if trust_config:
        _refuse_absurd_counts(path, len(tensors), config)
        family = FAMILIES.get(config["model_type"]) if isinstance(config.get("model_type"), str) else None
        sizes = _sizes(family, config) if family else None
        if family and sizes:
            _compare(path, tensors, _expected(family, sizes, config), ignored)
            return "config.json"
        if not config.get("auto_map"):
            _ask_transformers(path, tensors, ignored)
            return "transformers"
    _check_uniform(path, tensors)
    return "each other"


def _sizes(family: Family, config: Config) -> dict[str, int] | None:
    """Sizes by name, with `h` hidden, `i` inner, `q` and `kv` all heads together; None where a field is not there."""

    def field(name: str, default: Any = None) -> Any:
        value = config.get(family.fields.get(name, name))
        return default if value is None and name in family.defaults else value

    hidden, heads = field("hidden_size"), config.get("num_attention_heads", config.get("n_head"))
    if not _positive(hidden, heads, field("num_hidden_layers")):
        return None
    inner = field("intermediate_size", 4 * hidden)
    sizes = {"h": hidden, "i": inner, "3h": 3 * hidden, "blocks": field("num_hidden_layers")}
    used = {name for pair in family.layers.values() for name in pair}
    if used & {"q", "kv", "qkv"}:
        kv_heads, head_dim = field(_KV, heads), field(_HEAD_DIM, hidden // heads)
        if not _positive(kv_heads, head_dim):
            return None
        sizes |= {"q": heads * head_dim, "kv": kv_heads * head_dim, "qkv": (heads + 2 * kv_heads) * head_dim}
    return {**sizes, "2i": 2 * inner} if _positive(inner) else None


def _positive(*values: Any) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _expected(family: Family, sizes: Mapping[str, int], config: Config) -> tuple[str, dict[str, Shape]]:
    """The base prefix, and the stored shape of every layer's weight by its name."""
    shapes = {}
    for block in range(sizes["blocks"]):
        for layer, (out, in_) in family.layers.items():
            name = f"{family.base}{family.block}.{block}.{layer}.weight"
            shape = (sizes[out], sizes[in_])
            shapes[name] = shape[::-1] if stored_transposed(config["model_type"], name) else shape
    return family.base, shapes


def _compare(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    expected: tuple[str, dict[str, Shape]],
    ignored: Collection[str],
) -> None:
    base, shapes = expected
    if not any(name in tensors for name in shapes):  # a checkpoint of the model without its head
        shapes = {name.removeprefix(base): shape for name, shape in shapes.items()}
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise InputError(f"{path} lacks {_some(missing)} that its config.json asks for: fetch or write it again")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{name} of {path} has the shape {tensors[name].shape}, and its config.json asks for {shape}: "
                "they do not belong together"
            )
    _refuse_more(path, tensors, tensors.keys() - shapes.keys() - set(ignored))


def _refuse_more(path: Path, tensors: Mapping[str, StoredTensor], others: Iterable[str]) -> None:
    """Refuses the linear layers among the tensors that config.json does not describe."""
    linear = (
        name
        for name in others
        if any(is_of(name, tensors[name].shape) for is_of in (is_block_linear, is_stacked_experts))
    )
    if more := sorted(linear):
        raise InputError(
            f"{path} holds {_some(more)}, which its config.json does not describe: fetch or write it again"
        )


def _some(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _refuse_absurd_counts(path: Path, num_tensors: int, config: Config) -> None:
    """Refuses a config.json with more blocks or experts than there are tensors, before anything counts up to it."""
    for name, value in _fields(config):
        count = re.search(
            r"(?:^|_)n(?:um)?_(?:\w+_)?(layer|block|expert)s?(?:_per_\w+)?$|^(?:en|de)coder_(layer)s$", name
        )
        if count is None or type(value) is not int:
            continue
        if value < 0 or value > (65_536 if count[1] == "expert" else max(1000, num_tensors)):
            raise InputError(f"config.json of {path} says {name} = {value}, and it holds {num_tensors} tensors")


def _fields(config: Config) -> list[tuple[str, Any]]:
    """The fields of a config and of the configs in it, such as `text_config`."""
    inner = [pair for value in config.values() if isinstance(value, dict) for pair in value.items()]
    return [*config.items(), *inner]


def _ask_transformers(path: Path, tensors: Mapping[str, StoredTensor], ignored: Collection[str]) -> None:
    from castlm.export.meta import check_on_meta

    unexpected = check_on_meta(path if path.is_dir() else path.parent)
    _refuse_more(path, tensors, tensors.keys() & unexpected - set(ignored))


def _check_uniform(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses transformer blocks that do not all hold the same layers, or whose numbers leave one out."""
    blocks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in tensors.items():
        if len(tensor.shape) >= 2 and not is_tower(name) and (match := re.match(r"(|.*?\.)(\d{1,9})\.(.+)", name)):
            blocks[match[1]][int(match[2])].add(match[3])
    for stem, of_index in blocks.items():
        everything = set().union(*of_index.values())
        for index in range(max(of_index) + 1 if len(of_index) > 1 else 0):
            if index not in of_index or (lacking := sorted(everything - of_index[index])):
                what = f"{lacking[0]}, which other blocks have" if index in of_index else "every layer"
                raise InputError(
                    f"{stem}{index} of {path} lacks {what}: without a config.json that names the layers, "
                    "only a checkpoint of equal blocks can be verified"
                )
