"""Whole units of a model that may be cut out: MLP channels, and KV groups of attention heads.

A unit lies in several weights at once: a channel is a row of gate and of up, and a column of down. Nothing of a unit
reaches the output once its columns of the last weight are zero, so biases need no mask. A family whose config.json has
no field for the smaller size is not in the tables here, and cannot be cut. Importing this module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from castlm.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = re.compile(r"(channels|heads):(0?\.(?!0+$)[0-9]{1,4})")  # not 0

_MEMBERS = {
    "channels": (
        ("gate_proj", "up_proj", "down_proj"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "heads": (
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
}
"""Last names of the layers that hold a unit, in order; the last layer writes to the residual stream."""

DEFAULT_SCORE = {"channels": "flap", "heads": "taylor"}
"""The score that ranks the units where no other is asked for; figures in docs/results/structured.md decided it."""

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


@dataclass(frozen=True)
class Units:
    """The kind of units that are cut out, and the share of them that stays in each transformer block.

    Args:
        kind: "channels" (hidden channels of the MLPs) or "heads" (KV heads, each with its query heads).
        kept: the share, between 0 and 1.
    """

    kind: str
    kept: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.kept:g}"

    @classmethod
    def parse(cls, text: Units | str) -> Units:
        """The units that a text such as "channels:0.5" or "heads:0.5" describes.

        Raises:
            InputError: any other text.

        Examples:
            >>> Units.parse("channels:0.5")
            Units(kind='channels', kept=0.5)
        """
        if isinstance(text, Units):
            return text
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(
                f"units {text!r} are neither channels:SHARE nor heads:SHARE, with the share that is kept: try "
                "channels:0.5"
            )
        return cls(match[1], float(match[2]))

    def num_kept(self, num_units: int) -> int:
        """The number of `num_units` that stays, the nearest to the share; raises `InputError` if it is 0 or all."""
        number = round(self.kept * num_units)
        if not 0 < number < num_units:
            what = "all" if number else "none"
            raise InputError(f"units {self}: {what} of {num_units} units would stay: choose another share")
        return number

    def best(self, scores: Tensor) -> Tensor:
        """The units with the highest scores (units,), as a bool mask; of equal ones the earlier are kept."""
        import torch

        if scores.isnan().any():
            raise InputError("a weight contains NaN: its units cannot be ranked")
        best = scores.argsort(descending=True, stable=True)[: self.num_kept(len(scores))]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)

    def layers(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Groups the layers of one module that hold its units, in the order of `_MEMBERS`; other layers are left
        out."""
        known = dict.fromkeys(names)
        groups = []
        for name in known:
            stem, dot, last = name.rpartition(".")
            for part in _MEMBERS[self.kind]:
                layers = tuple(f"{stem}{dot}{other}" for other in part)
                if last == part[0] and all(layer in known for layer in layers):
                    groups.append(layers)
        return groups


def sums(values: Sequence[Tensor], num_units: int) -> Tensor:
    """The sum of `values` by unit, (units,); there is one tensor for each weight of a group, of its shape."""
    *inner, last = values  # heads: (576, 576), (192, 576) twice, (576, 576): 3 KV heads of 64, 3 queries each
    total = last.sum(0).view(num_units, -1).sum(1)  # the columns of o: (576,) -> (3, 192) -> (3,)
    for rows in inner:
        total = total + rows.sum(1).view(num_units, -1).sum(1)  # the rows of k: (192,) -> (3, 64) -> (3,)
    return total


def expand(kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The masks of the weights of a group that keep the units `kept` (units,), bool."""
    *inner, last = weights
    of_rows = [kept.repeat_interleave(rows.shape[0] // len(kept))[:, None].expand_as(rows) for rows in inner]
    return [*of_rows, kept.repeat_interleave(last.shape[1] // len(kept)).expand_as(last)]


def sizes_of(units: Units, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes in config.json that the cut of `units` changes or fixes, the number of units first.

    Raises:
        InputError: a family that cannot be cut.

    Examples:
        >>> sizes_of(Units("channels", 0.5), {"model_type": "llama", "intermediate_size": 172})
        {'intermediate_size': 172}
    """
    model_type, families = config.get("model_type"), CHANNELS if units.kind == "channels" else HEADS
    if model_type not in families:
        raise InputError(
            f"units {units}: castlm cannot cut {units.kind} out of {model_type}, only out of "
            f"{', '.join(sorted(families))}"
        )
    if units.kind == "channels":
        field = CHANNELS[str(model_type)]
        default = 4 * config.get("n_embd", 0) if field == "n_inner" else None
        return {field: default if config.get(field) is None else config[field]}
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (heads or 1)
    return {"num_key_value_heads": kv_heads, "num_attention_heads": heads, "head_dim": head_dim}


def sizes_after(units: Units, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of `sizes_of` in the model that is cut.

    Examples:
        >>> sizes_after(Units("heads", 0.5), {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8})
        {'num_key_value_heads': 2, 'num_attention_heads': 4, 'head_dim': 8}
    """
    field, number = number_in(sizes)
    kept = units.num_kept(number)
    after = {**sizes, field: kept}
    if "num_attention_heads" in sizes:  # as many queries for each KV head as before
        after["num_attention_heads"] = sizes["num_attention_heads"] // number * kept
    return after


def number_in(sizes: Mapping[str, int]) -> tuple[str, int]:
    """The field of config.json with the number of units, and the number: the first of `sizes_of`."""
    return next(iter(sizes.items()))
