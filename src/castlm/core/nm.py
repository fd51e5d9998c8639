"""n:m sparsity, whole: the pattern and its text, masks by magnitude, their bits in memory, and counting.

`Pattern` is the interface of a pattern. `NM` is castlm's own; a program may add one beside it.

An n:m mask keeps exactly n of every m consecutive weights along the input axis, even where magnitudes tie: ranks are
counted by comparisons and the earlier of two equal weights wins, so the mask is the same on every device and in every
dtype. `topk` and unstable sorts do not guarantee this. Only functions that need torch import it, so that `castlm
verify` starts at once.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from castlm.core.errors import InputError, check_type

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Pattern(ABC):
    """A rule that says which weights of a matrix (out, in) are kept.

    Subclasses are frozen dataclasses, and `str(pattern)` parses back. The mask of a row depends on that row alone,
    because the ranks of a run share the rows of a weight.
    """

    @abstractmethod
    def misfit(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have the pattern, as a clause; None if it can."""

    @abstractmethod
    def mask(self, weight: Tensor) -> Tensor:
        """The mask of `weight` (out, in) by magnitude: bool, of the same shape, True = kept.

        Raises:
            InputError: the shape does not fit the pattern, or `weight` contains NaN.
        """

    @abstractmethod
    def violations(self, weight: Tensor) -> int:
        """The number of places in `weight` (out, in) with more non-zeros than the pattern allows. NaN is a non-zero."""

    def at(self, name: str) -> Pattern:
        """The pattern of one layer, by its name; the pattern itself unless it differs from layer to layer."""
        return self

    def check_placement(self, param: Tensor) -> None:
        """Raises `InputError` if a DTensor is sharded in another way than by rows."""
        from torch.distributed.tensor import DTensor, Shard

        placements = param.placements if isinstance(param, DTensor) else ()
        if not all(placement.is_replicate() or placement == Shard(0) for placement in placements):
            raise InputError(
                f"a sparse parameter of shape {tuple(param.shape)} is placed as {placements}, which splits groups of "
                f"{self}: shard sparse weights by rows, Shard(0)"
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises `InputError` if a weight of this shape cannot have the pattern."""
        reason = self.misfit(shape)
        if reason:
            raise InputError(
                f"a weight of shape {tuple(shape)} cannot be {self} sparse: {reason}; leave the layer dense or choose "
                "another pattern"
            )

    def check_mask(self, mask: Tensor, param: Tensor) -> None:
        """Raises `InputError` unless a mask is bool, of this rank's rows of `param`, and keeps no more than the pattern
        does."""
        import torch

        from castlm.core.shards import local

        shape = tuple(local(param).shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise InputError(
                f"a mask of shape {tuple(mask.shape)} and {mask.dtype} does not fit a weight of shape {shape}: pass a "
                "torch.bool mask of that shape, True where a weight is kept"
            )
        if num_violations := self.violations(mask):
            raise InputError(f"a mask of {shape} is not {self}: it keeps too much in {num_violations:,} places")


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` of every `m` consecutive weights along the input axis are kept, 1 <= n < m, as in 2:4.

    Examples:
        >>> import torch
        >>> pattern = NM(2, 4)
        >>> pattern.mask(torch.tensor([[1.0, -3.0, 2.0, 2.0]]))
        tensor([[False,  True,  True, False]])
        >>> pattern.violations(torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 0.0, 0.0, 0.0]]))
        1
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n < self.m):
            raise InputError(
                f"pattern {self.n}:{self.m} is not n:m with 1 <= n < m (n weights kept of every m): try 2:4"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: object) -> NM:
        """The pattern that a text such as "2:4" describes; raises `InputError` for any other text."""
        n, colon, m = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not colon or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in (n, m)):
            raise InputError(f"pattern {text!r} is not n:m (n weights kept of every m): try 2:4")
        return cls(int(n), int(m))

    def misfit(self, shape: Sequence[int]) -> str | None:
        if not shape:
            return "it has no axis to form groups along"
        return f"its width {shape[-1]} does not divide by m = {self.m}" if shape[-1] % self.m else None

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of the `n` largest `|weight|` of every `m` consecutive weights (CAST, arXiv 2509.25996, Eq. 6).

        Args:
            weight: (..., width), any dtype; integers are ranked as float64. fp32 tensors on a CPU take the C++ kernel
                where it is built, with the same result.

        Returns:
            bool, the shape of `weight`, True where a weight is kept: exactly `n` in every group. Of equal magnitudes
            the earlier ones are kept.
        """
        import torch

        from castlm.core import native

        self._check(weight)
        weight = weight.detach()
        if weight.numel() and self.m <= native.MAX_GROUPED and native.runs_on(weight):
            packed = pack_mask(torch.zeros_like(weight, dtype=torch.bool))
            _, has_nan = native.refresh_([weight.contiguous()], [packed], self.n, self.m)
            mask = unpack_mask(packed, weight.shape[-1])
        else:
            # torch does not compare fp8, and abs(-128) overflows in int8
            # fp16 and wider
            is_wide_float = weight.is_complex() or (weight.is_floating_point() and weight.dtype.itemsize > 1)
            magnitude = (weight if is_wide_float else weight.double()).abs()
            has_nan = bool(magnitude.sum().isnan())  # a NaN anywhere makes the sum NaN
            mask = rank_mask(magnitude, self.n, self.m)
        if has_nan:
            raise InputError(
                f"the weight of shape {tuple(weight.shape)} contains NaN: it cannot be ranked by magnitude"
            )
        return mask

    def _check(self, weight: Tensor) -> None:
        _check_tensor(weight, "weight")
        self.check_shape(weight.shape)
        if weight.is_meta:
            raise InputError(f"the weight of shape {tuple(weight.shape)} is on the meta device: load its values first")

    def with_longest_groups(self, widths: Iterable[int], longest: int) -> NM:
        """The pattern that keeps the same share of weights in groups of up to `longest` which divide all `widths`.

        The longer the group, the more masks there are to choose from: 6 at 2:4, 12,870 at 8:16.

        Examples:
            >>> NM(2, 4).with_longest_groups([576, 1536], 64), NM(2, 4).with_longest_groups([64, 172], 64)
            (NM(n=32, m=64), NM(n=2, m=4))
        """
        group = math.gcd(longest, *widths)
        # gcd(64, 576, 1536) = 64: 2:4 becomes 32:64. gcd(64, 64, 172) = 4: it stays 2:4.
        return NM(self.n * (group // self.m), group) if group % self.m == 0 else self

    def violations(self, weight: Tensor) -> int:
        """The number of groups of `weight` (..., width) that hold more than `n` non-zeros. NaN is a non-zero."""
        self._check(weight)
        # (576, 1536) -> (576, 384, 4)
        groups = weight.reshape(*weight.shape[:-1], weight.shape[-1] // self.m, self.m)
        return int((groups.count_nonzero(dim=-1) > self.n).sum())


def _check_tensor(value: object, name: str) -> None:
    import torch

    check_type(value, torch.Tensor, f"{name} must be a tensor", "pass the weight of a layer, or its mask")


PARSERS: dict[str, Callable[[str], Pattern | None]] = {}
"""The parsers of patterns other than n:m, by the form of their texts: each returns None for a text of another form."""


def parse_pattern(text: Pattern | str) -> Pattern:
    """The pattern that a text describes: "2:4", or one of your own in `PARSERS`.

    A `Pattern` is returned as it is. All functions of castlm that take a pattern take its text, and read it here.

    Raises:
        InputError: a text of another form, or a number that is out of range.

    Examples:
        >>> parse_pattern("2:4")
        NM(n=2, m=4)
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise InputError(f"pattern {text!r} is not a text: try 2:4")
    for parse in PARSERS.values():
        if (pattern := parse(text)) is not None:
            return pattern
    if PARSERS and text[:1].isalpha():
        raise InputError(f"pattern {text!r} is neither n:m nor {', '.join(PARSERS)}: try 2:4")
    return NM.parse(text)


def nm_mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask that keeps the `n` largest `|weight|` of every `m` consecutive weights of `weight` (..., width).

    It is bool, of the same shape, True = kept. Raises `InputError` for a pattern that is not 1 <= n < m, a width that
    does not divide by `m`, or NaN.

    Examples:
        >>> import torch
        >>> nm_mask(torch.tensor([1.0, -3.0, 2.0, 2.0]))
        tensor([False,  True,  True, False])
    """
    return NM(n, m).mask(weight)


def count_nm_violations(weight: Tensor, n: int = 2, m: int = 4) -> int:
    """The number of groups of `weight` (..., width) that hold more than `n` non-zeros. NaN is a non-zero."""
    return NM(n, m).violations(weight)


def is_nm_sparse(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether every group of `weight` (..., width) holds at most `n` non-zeros; see `count_nm_violations`.

    Examples:
        >>> import torch
        >>> is_nm_sparse(torch.tensor([0.0, 0.0, 1.0, 2.0]))
        True
    """
    return NM(n, m).violations(weight) == 0


_MAX_COMPARED = 32  # weights of a group; comparisons grow with its square, and sorting longer groups is faster


def rank_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keeps the `n` highest scores of each `m` in `score` (..., width). Does not check for NaN.

    The rank of a weight is the number of weights in its group that beat it. A later one beats an earlier one only if
    its score is strictly larger, so ranks are a permutation and exactly `n` of them are below `n`. Up to m = 32 the
    function consists of comparisons and byte sums, which `torch.compile` turns into one pass over `score`.
    """
    import torch

    groups = score.reshape(*score.shape[:-1], score.shape[-1] // m, m)  # (4096, 11008) -> (4096, 2752, 4)
    # The pairs of a group of 64 are 2,016, which a stable sort of 64 scores beats. Stable: the earlier of equals is
    # kept.
    if m > _MAX_COMPARED:
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)
    scores = groups.unbind(-1)  # m views of (..., groups)
    if (n, m) == (2, 4):
        return torch.stack(_two_of_four(*scores), dim=-1).flatten(-2)
    rank = [torch.zeros_like(scores[0], dtype=torch.uint8) for _ in range(m)]
    # Each pair (i < j) is compared once, and its loser's rank grows by 1: at 2:4 six comparisons, ranks 0 to 3.
    for j in range(1, m):
        for i in range(j):
            later_wins = scores[j] > scores[i]
            rank[i] += later_wins
            rank[j] += ~later_wins
    return torch.stack([r < n for r in rank], dim=-1).flatten(-2)


def _two_of_four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """2:4 by pairs: 4 comparisons of a group instead of 6, and no sums.

    If the smaller weight of a pair beats the larger of the other pair, the whole pair is kept. Otherwise each pair
    keeps its larger weight.
    """
    import torch

    b_wins, d_wins = b > a, d > c
    first = torch.minimum(a, b) >= torch.maximum(c, d)  # the earlier pair also wins a tie
    second = torch.minimum(c, d) > torch.maximum(a, b)
    return [
        first | ~(second | b_wins),
        first | (~second & b_wins),
        second | ~(first | d_wins),
        second | (~first & d_wins),
    ]


# Eight bytes of 0 and 1 as one little-endian int64: byte k of the eight becomes bit k ("Bit Twiddling Hacks").
_GATHER = 0x0102040810204080


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a bool mask (..., width) into bits, (..., ceil(width / 8)) uint8.

    Bit k of byte j is column 8 j + k, and the bits past `width` are 0, as `numpy.packbits(bitorder="little")` has it.
    """
    import torch
    import torch.nn.functional as F

    if mask.shape[-1] == 0:
        return mask.to(torch.uint8)
    # contiguous_format, because the mask of a transposed weight may not be, and `view` reads eight bools as one number
    whole = F.pad(mask.to(torch.uint8, memory_format=torch.contiguous_format), (0, -mask.shape[-1] % 8))
    eights = whole.view(torch.int64)  # (1536, 576) uint8 -> (1536, 72)
    return ((eights * _GATHER) >> 56).to(torch.uint8)  # the highest byte of the product holds the eight bits


def unpack_mask(packed: Tensor, width: int) -> Tensor:
    """The bool mask (..., width) whose `pack_mask` is `packed` (..., ceil(width / 8)).

    Examples:
        >>> import torch
        >>> unpack_mask(pack_mask(torch.tensor([True, False, False, True])), 4)
        tensor([ True, False, False,  True])
    """
    import torch

    # Looked up and not shifted: one read of 8 bools per byte. (1536, 72) uint8 -> (110592,) int64 -> (1536, 576) bool
    eights = _eight_bools(packed.device).index_select(0, packed.reshape(-1).to(torch.int32))
    return eights.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :width].contiguous()


@functools.cache
def bits_of_a_word(device: torch.device) -> Tensor:
    """(32,) int32, where element k has only bit k set."""
    import torch

    return torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int32, device=device)


def unpack_words(words: Tensor, bits: Tensor) -> Tensor:
    """The bool mask (num_words, 32) of packed bits viewed as (num_words,) int32. `bits` is `bits_of_a_word`.

    In a compiled loop this mask stays in registers, while `unpack_mask` would write it to memory and read it again.
    """
    return (words.unsqueeze(1) & bits) != 0


@functools.cache
def _eight_bools(device: torch.device) -> Tensor:
    """(256,) int64, where the eight bytes of element k are the bits of k as bools."""
    import torch

    every_byte = torch.arange(256, dtype=torch.int32, device=device)
    return unpack_words(every_byte, bits_of_a_word(device)[:8]).view(torch.int64).view(-1)


def replace_mask_(packed: Tensor, new: Tensor) -> Tensor:
    """Overwrites a packed mask and returns how many entries changed, 0-dimensional."""
    import torch

    flipped = (new ^ packed).to(torch.int32)
    packed.copy_(new)
    # torch has no operator that counts bits. Neighbours are added up: bits to sums of 2, to sums of 4, to sums of 8
    # ("Bit Twiddling Hacks").
    pairs = flipped - ((flipped >> 1) & 0x55)  # 0b1101_0110 -> sums of two bits 10 01 01 01
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)  # -> sums of four bits 0011 0010
    return ((fours + (fours >> 4)) & 0xF).sum()


def refresh_mask_(weight: Tensor, packed: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Recomputes the packed mask of `weight` (out, in), in place in `packed` (out, ceil(in / 8)).

    Returns the number of entries that changed, and whether `weight` contains NaN; both 0-dimensional.
    """
    magnitude = weight.abs()
    flips = replace_mask_(packed, pack_mask(rank_mask(magnitude, n, m)))
    return flips, magnitude.sum().isnan()


def refresh_masks_(
    weights: Sequence[Tensor], packed: Sequence[Tensor], n: int, m: int, compile: bool = False
) -> tuple[Tensor | int, bool]:
    """`refresh_mask_` of several contiguous weights: the entries that changed in all, and whether a weight has NaN.

    fp32 weights on a CPU take the C++ kernel where it is built; others go through `torch.compile` if `compile` is set.
    """
    import torch

    from castlm.core import native

    if m <= native.MAX_GROUPED and all(map(native.runs_on, weights)):
        return native.refresh_(weights, packed, n, m)
    refresh = compiled(refresh_mask_) if compile else refresh_mask_
    results = [refresh(weight.detach(), mask.detach(), n, m) for weight, mask in zip(weights, packed)]
    # One transfer from the device for all weights in place of two for each.
    flips, has_nan = (torch.stack(column) for column in zip(*results))
    return flips.sum(), bool(has_nan.any())


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through `torch.compile`, with one compilation for all shapes."""
    import torch

    return torch.compile(function, dynamic=True, fullgraph=True)


def flip_rate(old_mask: Tensor, new_mask: Tensor) -> float:
    """The share of mask entries that changed, 0 to 1 (CAST, arXiv 2509.25996, App. C). 0 for empty masks.

    Examples:
        >>> import torch
        >>> flip_rate(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        0.5
    """
    _check_tensor(old_mask, "old_mask")
    _check_tensor(new_mask, "new_mask")
    if old_mask.shape != new_mask.shape:
        raise InputError(f"masks of shapes {tuple(old_mask.shape)} and {tuple(new_mask.shape)} are not of one weight")
    return float((old_mask != new_mask).count_nonzero() / max(1, old_mask.numel()))


def sparse_weight_ratio(weight: Tensor, mask: Tensor) -> float:
    """`|weight * mask|_1 / |weight|_1`, 0 to 1: 1 when all masked weights are zero (CAST, arXiv 2509.25996, App. C).

    Takes any shape and real dtype, sums in float64, and gives 1 for an all-zero weight.

    Examples:
        >>> import torch
        >>> sparse_weight_ratio(torch.tensor([3.0, 1.0]), torch.tensor([True, False]))
        0.75
    """
    import torch

    _check_tensor(weight, "weight")
    _check_tensor(mask, "mask")
    if weight.shape != mask.shape:
        raise InputError(f"a mask of shape {tuple(mask.shape)} is none of a weight of shape {tuple(weight.shape)}")
    magnitude = weight.detach().abs()
    total = magnitude.sum(dtype=torch.float64)
    kept = (magnitude * mask).sum(dtype=torch.float64)
    return float(kept / total) if total > 0 else 1.0
