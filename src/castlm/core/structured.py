"""Patterns that mask whole units: MLP channels, and KV groups of attention heads.

A unit lies in several weights at once: a channel is a row of gate and of up, and a column of down. All units of a
transformer block are ranked by one number each, and every block keeps the same number of them. Masked units are cut out
of the model at the end, which `castlm.export.cut` does; biases need no mask for that, because nothing of a unit reaches
the output once its columns of the last weight are zero.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from castlm.core.errors import InputError
from castlm.core.pattern_base import Pattern

if TYPE_CHECKING:
    from torch import Tensor, nn

_FRACTION = re.compile(r"0?\.\d{1,4}")


class Structured(Pattern):
    """A pattern whose units are ranked by one score each. `kept` of them stay, in every layer the same number.

    Raises:
        InputError: `kept` is not between 0 and 1.
    """

    kept: float
    multiple: int
    """What the number of kept units divides by."""

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise InputError(f"pattern {self} keeps {self.kept:g} of its units: it must be between 0 and 1, as 0.5")

    @abstractmethod
    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of `values`, one tensor for each weight of a unit group and of its shape, by unit: (units,)."""

    @abstractmethod
    def expand(self, kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights that keep the units `kept` (units,), bool."""

    def num_kept(self, num_units: int) -> int:
        """How many of `num_units` stay: the nearest number to `kept * num_units` that divides by `multiple`.

        Raises:
            InputError: that is none of them or all.

        Examples:
            >>> Channels(0.5).num_kept(172), Channels(0.75, multiple=4).num_kept(172)
            (86, 128)
        """
        number = round(self.kept * num_units / self.multiple) * self.multiple
        if not 0 < number < num_units:
            what = "all" if number else "none"
            raise InputError(f"pattern {self} keeps {what} of {num_units} units: choose another share")
        return number

    def best(self, scores: Tensor) -> Tensor:
        """The units with the highest scores (units,), as a bool mask; of equal ones the earlier are kept.

        Raises:
            InputError: a score is NaN.
        """
        import torch

        if scores.isnan().any():
            raise InputError("a weight contains NaN: its units cannot be ranked")
        best = scores.argsort(descending=True, stable=True)[: self.num_kept(len(scores))]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)

    def kept_units(self, weights: Sequence[Tensor]) -> Tensor:
        """The units with the largest L2 norms, (units,) bool. In pruned weights these are the ones that are left."""
        return self.best(self.sums([weight.detach().float().square() for weight in weights]))

    def misfit(self, shape: Sequence[int]) -> str | None:
        return None if len(shape) == 2 else f"it has {len(shape)} dimensions, not 2"

    def mask(self, weight: Tensor) -> Tensor:
        raise InputError(f"pattern {self} masks several weights together: use unit_masks")

    def violations(self, weight: Tensor) -> int:
        """0: what a single weight keeps says nothing; `unit_violations` counts."""
        return 0

    def unit_masks(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return self.expand(self.kept_units(weights), weights)

    def unit_violations(self, weights: Sequence[Tensor]) -> int:
        """The number of units with a non-zero beyond those that the pattern keeps."""
        alive = self.sums([weight.ne(0).float() for weight in weights])
        return max(0, int(alive.count_nonzero()) - self.num_kept(len(alive)))


def _parse(text: str, kind: str) -> float | None:
    """The share in a text such as "channels:0.5"; None if it does not have the form."""
    head, _, share = text.partition(":")
    return float(share) if head == kind and _FRACTION.fullmatch(share) else None


def _groups(names: Iterable[str], parts: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The layers that lie in one module and have the last names of one of `parts`, in the order of that."""
    known = dict.fromkeys(names)
    found = []
    for name in known:
        stem, dot, last = name.rpartition(".")
        for part in parts:
            whole = tuple(f"{stem}{dot}{other}" for other in part)
            if last == part[0] and all(other in known for other in whole):
                found.append(whole)
    return found


@dataclass(frozen=True)
class Channels(Structured):
    """Hidden channels of the MLPs: a row of each weight that reads the stream, and a column of the one that writes it.

    Examples:
        >>> import torch
        >>> gate, up, down = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), torch.ones(1, 2)
        >>> [mask.tolist() for mask in Channels(0.5).unit_masks([gate, up, down])]
        [[[False], [True]], [[False], [True]], [[False, True]]]
    """

    kept: float
    multiple: int = field(default=1, compare=False, repr=False)

    form: ClassVar[str] = "channels:SHARE (MLP channels, SHARE of them kept)"
    outside: ClassVar[str] = "not of the channels of an MLP"
    parts: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("gate_proj", "up_proj", "down_proj"),
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
    )
    """Names of the layers of an MLP, the one that writes the stream last."""

    def __str__(self) -> str:
        return f"channels:{self.kept:g}"

    @classmethod
    def parse_form(cls, text: str) -> Channels | None:
        kept = _parse(text, "channels")
        return None if kept is None else cls(kept)

    def units(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        return _groups(names, self.parts)

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        *inner, down = values
        total = down.sum(0)
        for rows in inner:
            total = total + rows.sum(1)
        return total

    def expand(self, kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        *inner, down = weights
        return [*(kept[:, None].expand_as(rows) for rows in inner), kept.expand_as(down)]


@dataclass(frozen=True)
class Heads(Structured):
    """KV groups of the attention: the rows of a KV head in k and v, and all rows of q and columns of o that read it.

    Args:
        kept: the share of the KV heads that stays.
        head_dim: of the model; `for_model` fills it in.
    """

    kept: float
    multiple: int = field(default=1, compare=False, repr=False)
    head_dim: int = field(default=0, compare=False, repr=False)

    form: ClassVar[str] = "heads:SHARE (KV heads with their query heads)"
    outside: ClassVar[str] = "not of the heads of an attention with weights of its own for q, k, v"
    parts: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
    )

    def __str__(self) -> str:
        return f"heads:{self.kept:g}"

    @classmethod
    def parse_form(cls, text: str) -> Heads | None:
        kept = _parse(text, "heads")
        return None if kept is None else cls(kept)

    def for_model(self, model: nn.Module) -> Heads:
        """With the head size of `model`, which its attention modules hold.

        Raises:
            InputError: no attention with weights of its own for q, k and v, or heads of different sizes.
        """
        names = [name for name, _ in model.named_modules()]
        owners = {q.rpartition(".")[0] for q, *_ in self.units(names)}
        sizes = {getattr(model.get_submodule(owner), "head_dim", None) for owner in owners}
        if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
            raise InputError(
                f"pattern {self} needs an attention with q, k and v of their own and one head_dim, which "
                f"{type(model).__name__} has not: use channels:0.5"
            )
        return replace(self, head_dim=size)

    def units(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        return _groups(names, self.parts)

    def num_units(self, weights: Sequence[Tensor]) -> int:
        """The number of KV heads of the weights (q, k, v, o)."""
        if not self.head_dim:
            raise InputError(f"pattern {self} does not know the size of a head: call for_model(model) first")
        return weights[1].shape[0] // self.head_dim

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        *inner, out = values
        number = self.num_units(values)
        total = out.sum(0).view(number, -1).sum(1)
        for rows in inner:
            total = total + rows.sum(1).view(number, -1).sum(1)
        return total

    def expand(self, kept: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        *inner, out = weights
        of_rows = [kept.repeat_interleave(rows.shape[0] // len(kept))[:, None].expand_as(rows) for rows in inner]
        return [*of_rows, kept.repeat_interleave(out.shape[1] // len(kept)).expand_as(out)]


def cut(weight: Tensor, mask: Tensor) -> Tensor:
    """What is left of `weight` (out, in) without the whole rows and columns that `mask` (out, in) leaves out.

    Examples:
        >>> import torch
        >>> cut(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[True, False], [True, False]]))
        tensor([[1],
                [3]])
    """
    return weight[mask.any(1)][:, mask.any(0)]
