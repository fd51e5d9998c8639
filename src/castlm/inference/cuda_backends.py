"""The sparse kernels of an NVIDIA GPU behind one interface: cuSPARSELt in bf16, fp16 and int8, torchao in fp8.

Checked against the sources of torch 2.13 and torchao 0.18; no GPU was at hand, so none of it has run on one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

from castlm.core.errors import InputError

ROUNDS = 20
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU: each call reads its weight from memory, as in a model


def backend_for(dtype: str, device: torch.device) -> Cusparselt | CusparseltInt8 | TorchaoFp8:
    """The backend for the `dtype` of `to_semi_structured_`.

    Raises:
        InputError: a device other than CUDA, one too old for 2:4 or fp8, or no cuSPARSELt or torchao.
    """
    assert dtype in ("same", "int8", "fp8"), dtype
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 0):
        raise InputError(f"the model is on {device}: 2:4 kernels need a GPU from Ampere on, as by model.cuda()")
    if dtype != "fp8" and not torch.backends.cusparselt.is_available():
        raise InputError(
            f"this build of torch {torch.__version__} has no cuSPARSELt: install a CUDA wheel of pytorch.org"
        )
    if dtype == "fp8":
        if capability != (9, 0):
            raise InputError(f"fp8 2:4 runs on Hopper, not on {torch.cuda.get_device_name(device)}: use int8 or same")
        return TorchaoFp8()
    return CusparseltInt8() if dtype == "int8" else Cusparselt()


class _Cuda:
    """Base of the backends: races contestants on CUDA."""

    tolerance = 0.02

    def race(self, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        """Median seconds of one call each, as CUDA graphs in turns A B A B, with a flushed cache before every call."""
        with torch.cuda.device(x.device):  # of events and graphs
            return self._race(modules, x)

    def _race(self, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=x.device)
        graphs = {name: _captured(module, x) for name, module in modules.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
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


def _with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A linear layer with another weight and the bias of `layer`."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made.train(layer.training)


class Cusparselt(_Cuda):
    """bf16 and fp16 by `to_sparse_semi_structured`, with the default algorithm and the one found by the search."""

    def why_not(self, layer: nn.Linear) -> str | None:
        if layer.weight.dtype not in (torch.bfloat16, torch.float16):
            return f"its weight is {layer.weight.dtype}: convert the model to bf16"
        return _bad_shape(layer, layer.weight.dtype)

    def variants(self, layer: nn.Linear, x: Tensor) -> list[str]:
        packed = torch._cslt_compress(layer.weight.contiguous())
        found = int(torch._cslt_sparse_mm_search(packed, _padded(x, 8).t(), bias=layer.bias, transpose_result=True))
        return [f"2:4, algorithm {number}" for number in dict.fromkeys((found, 0))]

    def convert(self, layer: nn.Linear, variant: str) -> nn.Module:
        number = int(variant.rpartition(" ")[2])
        return _with_weight(layer, to_sparse_semi_structured(layer.weight.contiguous(), alg_id=number))


class CusparseltInt8(_Cuda):
    """int8 weights by row, int8 activations by token."""

    tolerance = 0.05

    def why_not(self, layer: nn.Linear) -> str | None:
        return _bad_shape(layer, torch.int8)

    def variants(self, layer: nn.Linear, x: Tensor) -> list[str]:
        probe = Int8SemiStructuredLinear(layer)
        return [f"2:4 int8, algorithm {number}" for number in dict.fromkeys((probe.search(x), 0))]

    def convert(self, layer: nn.Linear, variant: str) -> nn.Module:
        return Int8SemiStructuredLinear(layer, int(variant.rpartition(" ")[2]))


class Int8SemiStructuredLinear(nn.Module):
    """`x W^T + b` with W rounded to int8, a scale a row, and x rounded to int8, a scale a token; zeros stay zeros."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, algorithm: int = 0) -> None:
        super().__init__()
        rounded, scale = int8_rows(layer.weight)
        self.algorithm = algorithm
        self.register_buffer("packed", torch._cslt_compress(rounded))
        self.register_buffer("scale", scale)  # (out,), fp32
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = int8_rows(x.reshape(-1, x.shape[-1]))
        product = torch._cslt_sparse_mm(
            self.packed,
            _padded(rounded, 16).t(),
            alpha=self.scale,
            out_dtype=torch.bfloat16,
            transpose_result=True,
            alg_id=self.algorithm,
        )
        out = (product[: len(rounded)] * scale.unsqueeze(1)).to(x.dtype)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)

    def search(self, x: Tensor) -> int:
        """The fastest of cuSPARSELt's algorithms for an input like `x`."""
        rounded = _padded(int8_rows(x)[0], 16).t()
        options = {"alpha": self.scale, "out_dtype": torch.bfloat16, "transpose_result": True}
        return int(torch._cslt_sparse_mm_search(self.packed, rounded, **options))


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of each row of `x` (rows, columns) to int8, and the scales (rows,) in fp32."""
    scale = x.float().abs().amax(1).clamp_min(1e-12) / 127
    return (x.float() / scale.unsqueeze(1)).round().to(torch.int8), scale


class TorchaoFp8(_Cuda):
    """float8 weights by row and activations by token, through torchao's CUTLASS kernel.

    Raises:
        InputError: torchao is missing, or has another interface than 0.18.
    """

    tolerance = 0.1

    def __init__(self) -> None:
        try:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
            from torchao.quantization.quantize_.workflows import Float8PackingFormat

            packing = Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
        except (ImportError, AttributeError) as error:
            raise InputError(f"fp8 2:4 needs torchao 0.18 or newer ({error}): pip install 'torchao>=0.18'") from error
        self.config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), packing_format=packing)
        self.quantize_ = quantize_

    def why_not(self, layer: nn.Linear) -> str | None:
        if layer.weight.dtype is not torch.bfloat16:
            return f"its weight is {layer.weight.dtype}: convert the model to bf16"
        return "its shape does not divide by 32" if layer.out_features % 32 or layer.in_features % 32 else None

    def variants(self, layer: nn.Linear, x: Tensor) -> list[str]:
        return ["2:4 fp8"]

    def convert(self, layer: nn.Linear, variant: str) -> nn.Module:
        holder = nn.Sequential(_with_weight(layer, layer.weight.detach().clone()))
        self.quantize_(holder, self.config)
        return holder[0]


def _bad_shape(layer: nn.Linear, dtype: torch.dtype) -> str | None:
    """cuSPARSELt's constraint on a weight, in words; None if it is met."""
    limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    if layer.out_features % rows or layer.in_features % columns:
        return f"its shape {layer.out_features} x {layer.in_features} does not divide by {rows} x {columns}"
    return None


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Pads the rows to a multiple that cuSPARSELt takes, as torch does: 8 for 16 bits, 16 for int8."""
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x
