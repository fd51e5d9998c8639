"""Uses 2:4 kernels on an NVIDIA GPU where they are faster: times each layer shape dense and sparse, and keeps the
faster.

cuSPARSELt's default algorithm is poor, so its search chooses one. On small layers every algorithm loses (see castlm
advise), so a layer is converted only if it wins the timing at the given number of tokens; otherwise it stays a dense
`nn.Linear`. Checked against the sources of torch 2.13; no GPU was at hand, so none of it has run on one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

from castlm.core.errors import InputError
from castlm.core.nm import is_nm_sparse
from castlm.core.sparsify import FilterFn, is_sparse_linear, sparse_linears
from castlm.say import Progress, silent

MARGIN = 0.98
"""A sparse layer replaces a dense one if it takes at most this share of its time; closer calls are noise."""
TOLERANCE = 0.02
"""Largest relative error of a layer's output that is due to rounding."""
ROUNDS = 20
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU: each call reads its weight from memory, as in a model


class Backend(Protocol):
    """Makes sparse layers and times them. The tests have one that needs no GPU."""

    def why_not(self, layer: nn.Linear) -> str | None:
        """Why `layer` cannot be converted; None if it can."""

    def convert(self, layer: nn.Linear, x: Tensor) -> nn.Module:
        """A sparse module in place of `layer`, tuned for an input like `x`; `RuntimeError` if the library fails."""

    def race(self, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        """Seconds of each module on `x`, taken in turns."""


@dataclass(frozen=True)
class Choice:
    """The decision for one layer."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    variant: str
    """"dense" or "2:4"."""
    seconds: Mapping[str, float]
    """Seconds of each variant at the given number of tokens; empty if the layer was not timed."""
    reason: str = ""
    """Why 2:4 was not timed, or not used although it is faster; else empty."""


@torch.no_grad()
def to_semi_structured_(
    model: nn.Module,
    tokens: int,
    *,
    filter_fn: FilterFn = is_sparse_linear,
    backend: Backend | None = None,
    progress: Progress = silent,
) -> list[Choice]:
    """Replaces the 2:4 linear layers of a model, in place, wherever a sparse kernel is faster than the dense one.

    Times are measured on CUDA graphs with a cold cache; to reach them, compile the model with `mode="reduce-overhead"`
    or capture its decode step. No layer becomes slower at `tokens`, but one may at another number of tokens.

    Experts stay dense: transformers multiplies all experts of a block at once, for which no 2:4 kernel exists.

    Args:
        model: in bf16 or fp16 on a CUDA device, pruned to 2:4.
        tokens: rows of a layer's input: the batch size in decode, the tokens of all prompts in prefill.
        filter_fn: selects the layers, as in `sparse_linears`.
        backend: converts and times layers; default: `Cusparselt`.
        progress: called with (layers done, layers in all).

    Returns:
        One choice for each layer, in the order of the model.

    Raises:
        InputError: no sparse layer, no CUDA device from Ampere on, or no cuSPARSELt.

    Examples:
        >>> choices = to_semi_structured_(model, tokens=4096)  # doctest: +SKIP
        >>> num_sparse = sum(choice.variant != "dense" for choice in choices)  # doctest: +SKIP
    """
    assert tokens >= 1
    found, _ = sparse_linears(model, "2:4", filter_fn)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
    if backend is None and layers:
        backend = Cusparselt(next(iter(layers.values())).weight.device)
    raced: dict[tuple[object, ...], tuple[dict[str, float], str]] = {}
    choices = []
    for done, (name, layer) in enumerate(layers.items(), 1):
        assert backend is not None  # there are layers
        choices.append(_convert(model, name, layer, tokens, backend, raced))
        progress(done, len(layers))
    return choices


def _convert(
    model: nn.Module,
    name: str,
    layer: nn.Linear,
    tokens: int,
    backend: Backend,
    raced: dict[tuple[object, ...], tuple[dict[str, float], str]],
) -> Choice:
    """Races the first layer of each shape, whose result serves the others, and replaces the layer if 2:4 has won and
    its output agrees with the dense one's.
    """
    shape, weight = (layer.out_features, layer.in_features), layer.weight
    reason = backend.why_not(layer)
    if reason is None and not is_nm_sparse(weight, 2, 4):
        reason = "its weight is not 2:4"
    if reason is not None:
        return Choice(name, shape, "dense", {}, reason)
    x = _input_for(layer, tokens)
    key = (*shape, layer.bias is None, weight.dtype)
    if key not in raced:
        raced[key] = race(layer, x, backend)
    seconds, failed = raced[key]
    if failed or seconds["2:4"] > MARGIN * seconds["dense"]:
        return Choice(name, shape, "dense", seconds, failed)
    sparse = backend.convert(layer, x)
    expected, found = layer(x).float(), sparse(x).float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= TOLERANCE:
        return Choice(name, shape, "dense", seconds, f"2:4 computes something else (relative error {error:.2g})")
    model.set_submodule(name, sparse)
    return Choice(name, shape, "2:4", seconds)


def _input_for(layer: nn.Linear, tokens: int) -> Tensor:
    """Random input rows for `layer`, the same in every call."""
    weight = layer.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    return torch.randn(tokens, layer.in_features, device=weight.device, dtype=weight.dtype, generator=generator)


def race(layer: nn.Linear, x: Tensor, backend: Backend) -> tuple[dict[str, float], str]:
    """Times a layer dense and 2:4 on `x`.

    Returns:
        Seconds by variant, and the error of the library if 2:4 does not run, which is not timed then; else empty.
    """
    try:
        sparse = backend.convert(layer, x)
        sparse(x)
    except RuntimeError as error:
        return backend.race({"dense": layer}, x), "2:4 failed: " + str(error).partition("\n")[0]
    return backend.race({"dense": layer, "2:4": sparse}, x), ""


class Cusparselt:
    """bf16 and fp16 by `to_sparse_semi_structured`, with the algorithm that cuSPARSELt's search finds.

    Raises:
        InputError: a device other than CUDA, one too old for 2:4, or no cuSPARSELt.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise InputError(f"the model is on {device}: 2:4 kernels need a GPU from Ampere on, as by model.cuda()")
        if not torch.backends.cusparselt.is_available():
            raise InputError(
                f"this build of torch {torch.__version__} has no cuSPARSELt: install a CUDA wheel of pytorch.org"
            )
        self._algorithms: dict[tuple[object, ...], int] = {}  # by shape, number of rows, dtype and bias

    @staticmethod
    def why_not(layer: nn.Linear) -> str | None:
        """Why cuSPARSELt does not take the weight of a layer, in words; None if it does."""
        dtype, shape = layer.weight.dtype, (layer.out_features, layer.in_features)
        if dtype not in (torch.bfloat16, torch.float16):
            return f"its weight is {dtype}: convert the model to bf16"
        limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
        rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
        if shape[0] % rows or shape[1] % columns:
            return f"its shape {shape[0]} x {shape[1]} does not divide by {rows} x {columns}"
        return None

    def convert(self, layer: nn.Linear, x: Tensor) -> nn.Linear:
        """A linear layer with a sparse weight and the bias of `layer`."""
        weight = layer.weight.contiguous()
        key = (*weight.shape, len(x), weight.dtype, layer.bias is None)
        if key not in self._algorithms:
            rows = F.pad(x, (0, 0, 0, -len(x) % 8))  # cuSPARSELt takes multiples of 8, and torch pads likewise
            packed = torch._cslt_compress(weight)
            found = torch._cslt_sparse_mm_search(packed, rows.t(), bias=layer.bias, transpose_result=True)
            self._algorithms[key] = int(found)
        sparse = to_sparse_semi_structured(weight, alg_id=self._algorithms[key])
        made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = nn.Parameter(sparse, requires_grad=False), layer.bias
        return made.train(layer.training)

    def race(self, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        """Median seconds of one call each, as CUDA graphs in turns A B A B, with a flushed cache before every call."""
        times: dict[str, list[float]] = {name: [] for name in modules}
        with torch.cuda.device(x.device):  # of events and graphs
            flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=x.device)
            graphs = {name: _captured(module, x) for name, module in modules.items()}
            for _ in range(ROUNDS):
                for name, replay in graphs.items():
                    flush.zero_()
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    replay()
                    end.record()
                    end.synchronize()
                    times[name].append(start.elapsed_time(end) / 1000)
        return {name: statistics.median(found) for name, found in times.items()}


def _captured(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Captures one call of `module` as a CUDA graph, after three calls on a side stream that set up the libraries."""
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            module(x)
    torch.cuda.current_stream(x.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
    return graph.replay
