"""Uses 2:4 kernels on an NVIDIA GPU where they are faster: times each layer shape dense and sparse, and keeps the
faster.

cuSPARSELt's default algorithm is poor, and on small layers every algorithm loses (see castlm advise). So a layer is
converted only if it wins the timing at the given number of tokens; otherwise it stays a dense `nn.Linear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse, nm_mask
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.inference.cuda_backends import backend_for
from castlm.inference.devices import DEVICES, Device, device_of
from castlm.inference.roofline import GpuFormat

MARGIN = 0.98
"""A sparse layer replaces a dense one if it takes at most this share of its time; closer calls are noise."""


class Backend(Protocol):
    """Makes sparse layers and times them. The tests have one that needs no GPU."""

    tolerance: float
    """Largest relative error of a layer's output that is due to rounding."""

    def why_not(self, layer: nn.Linear) -> str | None:
        """Why `layer` cannot be converted; None if it can."""

    def variants(self, layer: nn.Linear, x: Tensor) -> list[str]:
        """Ways to multiply by `layer` on an input like `x`, best guesses of the library first."""

    def convert(self, layer: nn.Linear, variant: str) -> nn.Module:
        """A sparse module in place of `layer`, which stays as it is."""

    def race(self, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        """Seconds of each module on `x`, taken in turns."""


@dataclass(frozen=True)
class Choice:
    """The decision for one layer."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    variant: str
    """"dense", or the winning sparse one."""
    seconds: Mapping[str, float]
    """Seconds of each contestant at the given number of tokens; empty if the layer was not timed."""
    reason: str = ""
    """Why the layer is dense without a race, or the sparse variants that failed, with their errors."""


class Race(NamedTuple):
    """The timing that decides for a shape."""

    seconds: Mapping[str, float]
    """Seconds by variant that runs."""
    failed: str
    """The error of each variant that fails."""


@torch.no_grad()
def to_semi_structured_(
    model: nn.Module,
    tokens: int,
    *,
    dtype: Literal["same", "int8", "fp8"] = "same",
    filter_fn: FilterFn = is_sparse_linear,
    backend: Backend | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Replaces the 2:4 linear layers of a model, in place, wherever a sparse kernel is faster than the dense one.

    Times are measured on CUDA graphs with a cold cache; to reach them, compile the model with `mode="reduce-overhead"`
    or capture its decode step. No layer becomes slower at `tokens`, but one may at another number of tokens.

    Experts stay dense: transformers multiplies all experts of a block at once, for which no 2:4 kernel exists.

    Args:
        model: in bf16 or fp16 on a CUDA device, pruned to 2:4.
        tokens: rows of a layer's input: the batch size in decode, the tokens of all prompts in prefill.
        dtype: "same" multiplies in the model's dtype and changes nothing else. "int8" rounds weights by row and
            activations by token. "fp8" does so in float8 through torchao, on Hopper (compute capability 9.0).
        filter_fn: selects the layers, as in `sparse_linears`.
        backend: converts and times layers; default: the backend for `dtype`.
        progress: called with (layers done, layers in all).

    Returns:
        One choice for each layer, in the order of the model.

    Raises:
        InputError: `tokens` below 1, no layer to convert, no CUDA device, or a package that is missing for fp8.

    Examples:
        >>> choices = to_semi_structured_(model, tokens=4096)  # doctest: +SKIP
        >>> num_sparse = sum(choice.variant != "dense" for choice in choices)  # doctest: +SKIP
    """
    if tokens < 1:
        raise InputError(f"{tokens} tokens: give at least 1, the rows that a layer sees at once")
    found, _ = sparse_linears(model, "2:4", filter_fn)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has only experts to convert: there are no 2:4 kernels for them here")
    if backend is None:
        backend = backend_for(dtype, next(iter(layers.values())).weight.device)
    raced: dict[tuple[object, ...], Race] = {}
    choices = []
    for done, (name, layer) in enumerate(layers.items(), 1):
        choice = _choose(name, layer, tokens, backend, raced)
        if choice.variant != "dense":
            choice = _replace(model, choice, layer, tokens, backend)
        choices.append(choice)
        if progress is not None:
            progress(done, len(layers))
    return choices


def _choose(
    name: str, layer: nn.Linear, tokens: int, backend: Backend, raced: dict[tuple[object, ...], Race]
) -> Choice:
    """Races the first layer of each shape; the others use its result."""
    shape = (layer.out_features, layer.in_features)
    reason = backend.why_not(layer)
    if reason is None and not is_nm_sparse(layer.weight, 2, 4):
        reason = "its weight is not 2:4"
    if reason is not None:
        return Choice(name, shape, "dense", {}, reason)
    key = (*shape, layer.bias is None, layer.weight.dtype)
    if key not in raced:
        raced[key] = race_variants(layer, _input_for(layer, tokens), backend)
    seconds, failed = raced[key]
    fastest = min(seconds, key=seconds.__getitem__)
    variant = fastest if seconds[fastest] <= MARGIN * seconds["dense"] else "dense"
    return Choice(name, shape, variant, seconds, failed)


def race_variants(layer: nn.Linear, x: Tensor, backend: Backend) -> Race:
    """Times the layer and each sparse variant of it that runs on `x`: a library may fail on a shape at run time."""
    modules: dict[str, nn.Module] = {"dense": layer}
    failed = []
    try:
        variants = backend.variants(layer, x)
    except RuntimeError as error:  # of the library's search
        variants, failed = [], [f"2:4 failed: {_first_line(error)}"]
    for variant in variants:
        try:
            sparse = backend.convert(layer, variant)
            sparse(x)
        except RuntimeError as error:
            failed.append(f"{variant} failed: {_first_line(error)}")
        else:
            modules[variant] = sparse
    return Race(backend.race(modules, x), "; ".join(failed))


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]


def _replace(model: nn.Module, choice: Choice, layer: nn.Linear, tokens: int, backend: Backend) -> Choice:
    """Puts the sparse layer into the model if its output agrees with the dense one's."""
    sparse, x = backend.convert(layer, choice.variant), _input_for(layer, tokens)
    expected, found = layer(x).float(), sparse(x).float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= backend.tolerance:
        reason = f"{choice.variant} computes something else (relative error {error:.2g})"
        return Choice(choice.name, choice.shape, "dense", choice.seconds, reason)
    model.set_submodule(choice.name, sparse)
    return choice


def _input_for(layer: nn.Linear, tokens: int) -> Tensor:
    """Random input rows for `layer`, the same in every call."""
    generator = torch.Generator(layer.weight.device).manual_seed(0)
    return torch.randn(
        tokens, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype, generator=generator
    )


def this_gpu() -> Device | None:
    """The record of this machine's CUDA device; None without one.

    Raises:
        InputError: a device without a record.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    record = device_of(name)
    if record is None:
        raise InputError(f"there is no record of {name}: pass --device with the nearest of {', '.join(DEVICES)}")
    return record


class GpuTimer:
    """Times layers on this machine's CUDA device, each shape once, dense against every sparse variant.

    Layers are in the dtype asked for, and in bf16 for fp8, which takes no other.
    """

    def __init__(self, dtype: str) -> None:
        """`formats`: dense and 2:4 in `dtype`, 2:4 int8, and 2:4 fp8 where torchao and the device have it.

        Raises:
            InputError: another dtype than bf16 and fp16.
        """
        if dtype not in ("bf16", "fp16"):
            raise InputError(f"a GPU at hand is timed in bf16 and fp16, not {dtype}: estimate it by --device")
        self._device, self._dtype = torch.device("cuda"), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        self._found: dict[tuple[tuple[int, int], int, str], dict[str, float]] = {}
        self.formats = [GpuFormat(dtype, 16, dtype), GpuFormat(f"2:4 {dtype}", 9, dtype, sparse=True)]
        self.formats.append(GpuFormat("2:4 int8", 5, "int8", sparse=True, changes_weights=True))
        with contextlib.suppress(InputError):
            backend_for("fp8", self._device)
            self.formats.append(GpuFormat("2:4 fp8", 5, "fp8", sparse=True, changes_weights=True))

    @torch.no_grad()
    def seconds(self, form: GpuFormat, shape: tuple[int, int], tokens: int) -> float:
        """The fastest variant of `form`, or the dense layer; a layer that cannot be converted counts as dense."""
        kind = form.compute if form.changes_weights else "same"
        key = (shape, tokens, kind)
        if key not in self._found:
            dtype = torch.bfloat16 if kind == "fp8" else self._dtype
            layer = torch.nn.Linear(shape[1], shape[0], bias=False, device=self._device, dtype=dtype)
            if shape[1] % 4 == 0:
                layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
            x = torch.randn(tokens, shape[1], device=self._device, dtype=dtype)
            backend = backend_for(kind, self._device)
            can = shape[1] % 4 == 0 and backend.why_not(layer) is None
            self._found[key] = race_variants(layer, x, backend).seconds if can else backend.race({"dense": layer}, x)
        found = self._found[key]
        sparse_only = [value for name, value in found.items() if name != "dense"]
        return min(sparse_only, default=found["dense"]) if form.sparse else found["dense"]
