"""Patterns that mask whole units: MLP channels or KV groups of attention heads, alone or combined with n:m.

A unit lies in several weights at once: a channel is a row of gate and of up, and a column of down. Masked units are cut
out of the model at the end, by `castlm.structured.cut`; biases need no mask for that, because nothing of a unit reaches
the output once its columns of the last weight are zero. A family whose config.json has no field for the smaller size is
not listed at the end of this file, and cannot be cut. Importing this module does not import torch.
"""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHARE = re.compile(r"0?\.(?!0+$)\d{1,4}")  # not 0


class Units(Pattern):
    """Ranks the units of each block by one score each and keeps the share `kept` of them.

    With `inner`, the weights of kept units are n:m as well, and layers without units are n:m only. Groups of m are
    counted in the weights after the cut: in down, m consecutive columns of kept channels.
    """

    kept: float
    inner: NM | None

    zeros_can_return: ClassVar[bool] = False  # in a unit that is zero as a whole, no weight gets a gradient
    default_score: ClassVar[str]
    """The score in `castlm.structured.scores` that ranks the units where no other is asked for; figures in
    docs/results/structured.md decided it."""
    kind: ClassVar[str]
    """The name of the units in the text of the pattern, such as `channels`."""
    members: ClassVar[tuple[tuple[str, ...], ...]]
    """Last names of the layers that hold a unit, in order; the last layer writes to the residual stream."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.kept:g}" + (f"+{self.inner}" if self.inner else "")

    @property
    def nm(self) -> NM | None:
        return self.inner

    @property
    def stored(self) -> NM | None:
        return self.inner

    @property
    def tags(self) -> Sequence[str]:
        return ("structured-pruning",)

    @abstractmethod
    def num_units(self, weights: Sequence[Tensor]) -> int:
        """The number of units in weights that are masked together."""

    def rows_of_a_unit(self, sizes: Mapping[str, int]) -> Iterable[int]:
        """The rows that a unit has in each of its layers, and the columns in the last one; without end.

        Args:
            sizes: of `sizes_of`.
        """
        return itertools.repeat(1)

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of `values` by unit, (units,); there is one tensor for each weight, of its shape."""
        *inner, last = values  # heads: (576, 576), (192, 576) twice, (576, 576): 3 KV heads of 64, 3 queries each
        number = self.num_units(values)
        total = last.sum(0).view(number, -1).sum(1)  # the columns of o: (576,) -> (3, 192) -> (3,)
        for rows in inner:
            total = total + rows.sum(1).view(number, -1).sum(1)  # the rows of k: (192,) -> (3, 64) -> (3,)
        return total

    def expand(self, kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights that keep the units `kept` (units,), bool."""
        *inner, last = weights
        of_rows = [kept.repeat_interleave(rows.shape[0] // len(kept))[:, None].expand_as(rows) for rows in inner]
        return [*of_rows, kept.repeat_interleave(last.shape[1] // len(kept)).expand_as(last)]

    @property
    def multiple(self) -> int:
        """A divisor of the number of units that stay."""
        return 1

    def num_kept(self, num_units: int) -> int:
        """Returns how many of `num_units` stay: the nearest number to `kept * num_units` that divides by `multiple`.

        Raises:
            InputError: the number is 0 or `num_units`.

        Examples:
            >>> Channels(0.5).num_kept(172), Channels(0.75, NM(2, 4)).num_kept(172)
            (86, 128)
        """
        number = round(self.kept * num_units / self.multiple) * self.multiple
        if not 0 < number < num_units:
            what = "all" if number else "none"
            raise InputError(f"pattern {self} keeps {what} of {num_units} units: choose another share")
        return number

    def best(self, scores: Tensor) -> Tensor:
        """The units with the highest scores (units,), as a bool mask; of equal ones the earlier are kept."""
        import torch

        if scores.isnan().any():
            raise InputError("a weight contains NaN: its units cannot be ranked")
        best = scores.argsort(descending=True, stable=True)[: self.num_kept(len(scores))]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)

    def kept_units(self, weights: Sequence[Tensor]) -> Tensor:
        """The units with the largest L2 norms, (units,) bool. In pruned weights these are the units that were kept."""
        return self.best(self.sums([weight.detach().float().square() for weight in weights]))

    def misfit(self, shape: Sequence[int]) -> str | None:
        if len(shape) != 2:
            return f"it has {len(shape)} dimensions, not 2"
        return self.inner.misfit(shape) if self.inner else None

    def unit_layers(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Groups the layers of one module whose last names are one entry of `members`, in the order of that entry."""
        known = dict.fromkeys(names)
        found = []
        for name in known:
            stem, dot, last = name.rpartition(".")
            for part in self.members:
                layers = tuple(f"{stem}{dot}{other}" for other in part)
                if last == part[0] and all(layer in known for layer in layers):
                    found.append(layers)
        return found

    def joint_layers(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """`unit_layers`, and with `inner` every other layer alone."""
        names = list(names)
        joint = self.unit_layers(names)
        inside = {name for layers in joint for name in layers}
        return joint + [(name,) for name in names if self.inner and name not in inside]

    def joint_masks(self, weights: Sequence[Tensor]) -> list[Tensor]:
        import torch

        if self.inner and len(weights) == 1:  # a layer without units
            return [self.inner.mask(weights[0])]
        masks = self.expand(self.kept_units(weights), weights)
        if self.inner is None:
            return masks
        inside = [self.inner.mask(left_of(weight, mask)) for weight, mask in zip(weights, masks)]
        return [torch.zeros_like(mask).masked_scatter_(mask, small) for mask, small in zip(masks, inside)]

    def joint_violations(self, weights: Sequence[Tensor]) -> int:
        """The number of units with a non-zero beyond those that the pattern keeps, and of n:m groups with too many."""
        if self.inner and len(weights) == 1:
            return self.inner.violations(weights[0])
        alive = self.sums([weight.ne(0).float() for weight in weights])
        of_units = max(0, int(alive.count_nonzero()) - self.num_kept(len(alive)))
        if self.inner is None:
            return of_units
        masks = self.expand(self.kept_units(weights), weights)
        return of_units + sum(self.inner.violations(left_of(weight, mask)) for weight, mask in zip(weights, masks))


@dataclass(frozen=True)
class Channels(Units):
    """Hidden channels of the MLPs: a row of each weight that reads the stream, and a column of the one that writes it.

    Examples:
        >>> import torch
        >>> gate, up, down = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), torch.ones(1, 2)
        >>> [mask.tolist() for mask in Channels(0.5).joint_masks([gate, up, down])]
        [[[False], [True]], [[False], [True]], [[False, True]]]
    """

    kept: float
    inner: NM | None = None

    kind: ClassVar[str] = "channels"
    default_score: ClassVar[str] = "flap"
    outside: ClassVar[str] = "not of the channels of an MLP"
    members: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("gate_proj", "up_proj", "down_proj"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    )

    @property
    def counted(self) -> str:
        return "channels and groups" if self.inner else "channels"

    @property
    def multiple(self) -> int:
        return self.inner.m if self.inner else 1  # the columns of down are the kept channels

    def num_units(self, weights: Sequence[Tensor]) -> int:
        return len(weights[0])


@dataclass(frozen=True)
class Heads(Units):
    """KV groups of the attention: the rows of a KV head in k and v, and the rows of q and columns of o of its queries.

    Args:
        kept: the share of the KV heads that stays.
        head_dim: the size of a head; `for_model` fills it in.
    """

    kept: float
    inner: NM | None = None
    head_dim: int = field(default=0, compare=False, repr=False)

    kind: ClassVar[str] = "heads"
    default_score: ClassVar[str] = "taylor"
    outside: ClassVar[str] = "not of the heads of an attention with weights of its own for q, k, v"
    members: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    )

    @property
    def counted(self) -> str:
        return "KV heads and groups" if self.inner else "KV heads"

    def for_model(self, model: nn.Module) -> Heads:
        """Returns the pattern with the head size of `model`, read from its attention modules."""
        names = [name for name, _ in model.named_modules()]
        owners = {q.rpartition(".")[0] for q, *_ in self.unit_layers(names)}
        sizes = {getattr(model.get_submodule(owner), "head_dim", None) for owner in owners}
        if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
            raise InputError(
                f"pattern {self} needs an attention with separate q, k and v and one head_dim, and "
                f"{type(model).__name__} has none: use channels:0.5"
            )
        return replace(self, head_dim=size)

    def rows_of_a_unit(self, sizes: Mapping[str, int]) -> Iterable[int]:
        queries = sizes["num_attention_heads"] // sizes["num_key_value_heads"] * sizes["head_dim"]
        return queries, sizes["head_dim"], sizes["head_dim"], queries

    def num_units(self, weights: Sequence[Tensor]) -> int:
        assert self.head_dim, f"pattern {self} does not know the size of a head: call for_model(model) first"
        return len(weights[1]) // self.head_dim  # rows of k


def parse(text: str) -> Units | None:
    """The pattern that a text such as "channels:0.5" or "heads:0.5+2:4" describes; None if it has another form."""
    units, plus, groups = text.partition("+")
    kind, _, share = units.partition(":")
    if kind not in ("channels", "heads") or not _SHARE.fullmatch(share):
        return None
    inner = NM.parse(groups) if plus else None
    return Channels(float(share), inner) if kind == "channels" else Heads(float(share), inner)


def left_of(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` (out, in) without the rows and columns that `mask` (out, in) masks entirely."""
    return weight[mask.any(1)][:, mask.any(0)]


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


def sizes_of(pattern: Units, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes in config.json that the cut of `pattern` changes or fixes, the number of units first.

    Raises:
        InputError: a family that cannot be cut.

    Examples:
        >>> sizes_of(Channels(0.5), {"model_type": "llama", "intermediate_size": 172})
        {'intermediate_size': 172}
    """
    model_type, families = config.get("model_type"), CHANNELS if isinstance(pattern, Channels) else HEADS
    if model_type not in families:
        raise InputError(
            f"pattern {pattern}: castlm cannot cut {pattern.kind} out of {model_type}, only out of "
            f"{', '.join(sorted(families))}; use 2:4"
        )
    if isinstance(pattern, Channels):
        field = CHANNELS[str(model_type)]
        default = 4 * config.get("n_embd", 0) if field == "n_inner" else None
        return {field: default if config.get(field) is None else config[field]}
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (heads or 1)
    return {"num_key_value_heads": kv_heads, "num_attention_heads": heads, "head_dim": head_dim}


def sizes_after(pattern: Units, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of `sizes_of` in the model that is cut.

    Examples:
        >>> sizes_after(Heads(0.5), {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8})
        {'num_key_value_heads': 2, 'num_attention_heads': 4, 'head_dim': 8}
    """
    field, number = units_of(sizes)
    kept = pattern.num_kept(number)
    after = {**sizes, field: kept}
    if "num_attention_heads" in sizes:  # as many queries for each KV head as before
        after["num_attention_heads"] = sizes["num_attention_heads"] // number * kept
    return after


def units_of(sizes: Mapping[str, int]) -> tuple[str, int]:
    """The field of config.json with the number of units, and the number: the first of `sizes_of`."""
    return next(iter(sizes.items()))
