"""The two moments of AdamS as stored: in fp32, or in 8 bits with a scale per block of weights.

The 8-bit codes are the same as in bitsandbytes and torchao (dynamic map, block-wise: Dettmers et al. 2021, arXiv
2110.02861), but computed by arithmetic that vectorizes. They are plain tensors whose rows match the rows of the weight,
so that they are sharded and saved like all other state.

`HostMoments` keeps them in the memory of the host and copies a few to their device for an update. A GPU copies them in
a stream of its own, beside the work of the passes. The stream keeps its copies in order, so the moments of the next
step are read after those of this one were written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from castlm.core.shards import like_rows, local

MOMENTS = ("fp32", "8bit")
MOMENT_KEYS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
LONGEST_BLOCK, _SHORTEST = 256, 32  # weights that share a scale
_LEAST = 4096  # a parameter with fewer weights keeps its moments in fp32


def new_moments(param: Tensor, moments: str) -> dict[str, Tensor]:
    """Zero moments of `param` as optimizer state.

    `exp_avg` and `exp_avg_sq` are shaped and placed like `param`, in `moment_dtype`. With `moments` "8bit", matrices
    (of experts: all together) of at least 4,096 weights whose width divides by 32 get uint8 codes instead, with
    `exp_avg_scale` and `exp_avg_sq_scale` (out, in / block) fp32 beside them.

    Examples:
        >>> state = new_moments(torch.zeros(64, 128), "8bit")
        >>> {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name.startswith("exp_avg_sq")}
        {'exp_avg_sq': (torch.uint8, (64, 128)), 'exp_avg_sq_scale': (torch.float32, (64, 1))}
    """
    block = block_size(param) if moments == "8bit" else 0
    if not block:
        dtype = moment_dtype(param)
        zeros = (torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format) for _ in range(2))
        return dict(zip(("exp_avg", "exp_avg_sq"), zeros))
    *rows, width = local(param).shape
    state = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        state[name] = torch.full_like(param, zero_code(signed), dtype=torch.uint8)
        state[f"{name}_scale"] = like_rows(torch.zeros(*rows, width // block, device=param.device), param)
    return state


def moment_dtype(param: Tensor) -> torch.dtype:
    """The dtype of moments that are not in 8 bits: fp32, also of bf16 weights, and fp64 of fp64 weights.

    In bf16, whose spacing is 1/256, a second moment would stop to grow where a step adds less than 1/512 of it: at
    beta2 = 0.999 this is far from its end.
    """
    return torch.promote_types(param.dtype, torch.float32)


def block_size(param: Tensor) -> int:
    """The number of weights that share a scale: the largest power of 2, 32 to 256, that divides the width, or 0."""
    if param.dim() not in (2, 3) or param.numel() < _LEAST:
        return 0
    # A block must not cross a row, as ranks share out rows: 576 = 9 x 64 has blocks of 64, 1536 of 256.
    block = min(LONGEST_BLOCK, param.shape[-1] & -param.shape[-1])  # the lowest bit that is set: 576 -> 64
    return block if block >= _SHORTEST else 0


def code_pieces(signed: bool) -> list[tuple[float, float, float, float, float]]:
    """The pieces of the map from code to value: `(first index, last index, slope, intercept, least value)` each.

    The map is linear in seven pieces. Each covers one decade of values and has twice as many codes as the one before;
    an eighth holds the value 1. The index of a code is its distance from the code of 0. A value of at least `least
    value` is nearest to a code of this or a later piece.
    """
    pieces: list[tuple[float, float, float, float, float]] = []
    first = 1
    below = 0.0  # the value of the code before
    for decade in range(7):
        # Signed codes spend half of the 256 on each sign: 1, 2, 4, ... 64 codes a decade, 127 in all, and one for the
        # value 1.
        count = 2**decade if signed else 2 ** (decade + 1)
        slope = 0.9 * 10.0 ** (decade - 6) / count  # a decade 10^k to 10^(k+1), in `count` equal steps
        intercept = 10.0 ** (decade - 7) + slope * (0.5 - first)  # codes stand for the middles of their steps
        pieces.append((first, first + count - 1, slope, intercept, (below + slope * first + intercept) / 2))
        below = slope * (first + count - 1) + intercept
        first += count
    pieces.append((first, first, 0.0, 1.0, (below + 1) / 2))
    return pieces


def zero_code(signed: bool) -> int:
    """The code of the value 0."""
    return 127 if signed else 0


def code_values(signed: bool) -> Tensor:
    """(256,) fp32: the value of each code at a scale of 1."""
    return from_codes(torch.arange(256, dtype=torch.uint8)[None], torch.ones(1), signed)[0]


def from_codes(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The fp32 values (blocks, block) of uint8 `codes` (blocks, block) at `scale` (blocks,)."""
    offset = codes.to(torch.int32).to(torch.float32) - zero_code(signed)
    index = offset.abs()
    value = torch.zeros_like(index)
    for first, _, slope, intercept, _ in code_pieces(signed):
        # Later pieces overwrite earlier ones, so that the last piece whose first index is reached wins.
        value = torch.where(index >= first, index * slope + intercept, value)
    value = value * offset.sign() if signed else value
    return value * scale[:, None]


def to_codes_(new: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
    """Writes `new` (blocks, block) into `codes` and `scale`.

    The scale of a block is its largest magnitude, and each value gets the nearest code.
    """
    largest = new.abs().amax(dim=1).clamp(min=1e-30)  # (blocks,); a block of zeros divides by 1e-30, not by 0
    value = new / largest[:, None]
    magnitude = value.abs()
    index = torch.zeros_like(value)
    for first, last, slope, intercept, least in code_pieces(signed):
        nearest = torch.full_like(value, first)
        if slope:  # the piece's line, value = index * slope + intercept, solved for the index
            nearest = (magnitude * (1 / slope) - intercept / slope).round().clamp(first, last)
        index = torch.where(magnitude >= least, nearest, index)
    if signed:
        index = (index * value.sign()).clamp(min=-zero_code(signed))  # there is a code for 1 but none for -1
    codes.copy_((zero_code(signed) + index).to(torch.int32))
    scale.copy_(largest)


class HostMoments:
    """The moments that are on their device at present, by parameter; all others are on the host alone."""

    def __init__(self) -> None:
        self._there: dict[Tensor, dict[str, Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_there": {}, "_streams": {}}  # copies that an update would make again

    @staticmethod
    def on_host(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`moments` in host memory, from which a GPU copies without the processor's help."""
        return {key: tensor.cpu().pin_memory() if tensor.is_cuda else tensor for key, tensor in moments.items()}

    def fetch(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Begins to copy the moments of a parameter to its device; no effect if that has begun."""
        if param not in self._there:
            with self._beside(param.device):
                self._there[param] = {
                    key: torch.empty_like(state[key], device=param.device).copy_(state[key], non_blocking=True)
                    for key in MOMENT_KEYS
                    if key in state
                }

    def take(self, param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moments of a parameter on its device, to be changed in place; see `give_back`."""
        self.fetch(param, state)
        if param.is_cuda:
            stream = torch.cuda.current_stream(param.device)
            stream.wait_stream(self._streams[param.device])
            for tensor in self._there[param].values():
                tensor.record_stream(stream)  # they were allocated for the other one
        return self._there[param]

    def give_back(self, param: Tensor, state: Mapping[str, Tensor]) -> None:
        """Begins to copy the moments of a parameter to the host, and frees those on the device."""
        changed = self._there.pop(param)
        with self._beside(param.device, after_passes=True):
            for key, tensor in changed.items():
                state[key].copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Waits until the host has all moments that were given back."""
        for stream in self._streams.values():
            stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, device: torch.device, after_passes: bool = False) -> Iterator[None]:
        """Inside the context, a GPU copies in the stream of copies.

        Args:
            after_passes: begin when the work that was queued for the passes is done.
        """
        if device.type != "cuda":
            yield
            return
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        if after_passes:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
