"""What others have measured of 2:4, with their sources: kernel times by shape, and ratios of whole models.

The kernel times calibrate the roofline; the ratios are shown beside its answer, so that a reader can check it.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files

KERNEL_SOURCE = (
    "Shao et al. 2026, SlideSparse, arXiv 2603.05232: github.com/bcacdwk/vllmbench, "
    "slidesparse/benchmark_kernel/*/alg_search_results (cuBLASLt and cuSPARSELt, best algorithm, torch 2.9, CUDA 12.9)"
)


@dataclass(frozen=True)
class KernelTime:
    """One published cell: a linear layer, or several as a sum, dense and 2:4, in microseconds."""

    device: str
    dtype: str
    shapes: tuple[tuple[int, int], ...]
    """(out_features, in_features) of each layer."""
    tokens: int
    dense_us: float
    sparse_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us


@dataclass(frozen=True)
class Evidence:
    """One published ratio: how many times as fast as dense in the same dtype, unless `what` says otherwise."""

    device: str
    what: str
    speedup: float
    source: str
    decode: bool = False
    """Whether it is about few tokens at once."""


@functools.cache
def kernel_times() -> tuple[KernelTime, ...]:
    """The rows of published.csv."""
    text = files("castlm.inference").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(
        KernelTime(
            row["device"],
            row["dtype"],
            tuple(_shape(layer) for layer in row["layers"].split("+")),
            int(row["tokens"]),
            float(row["dense_us"]),
            float(row["sparse_us"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return int(out_features), int(in_features)


_APPENDIX = "arXiv 2603.05232, github.com/bcacdwk/vllmbench, slidesparse/tools/appendix_tables"
_TORCHAO = "github.com/pytorch/ao, torchao/sparsity/README.md"

EVIDENCE: tuple[Evidence, ...] = (
    Evidence("h100-pcie", "2:4 bf16, the layers of Llama-3.2-1B, 64 tokens", 0.74, _APPENDIX, decode=True),
    Evidence("h100-pcie", "2:4 bf16, the layers of Qwen2.5-7B, 64 tokens", 1.03, _APPENDIX, decode=True),
    Evidence("h100-pcie", "2:4 bf16, the layers of Qwen2.5-14B, 64 tokens", 1.20, _APPENDIX, decode=True),
    Evidence("h100-pcie", "2:4 bf16, the layers of Llama-3.2-1B, 4,096 tokens", 1.43, _APPENDIX),
    Evidence("h100-pcie", "2:4 bf16, the layers of Qwen2.5-7B, 4,096 tokens", 1.65, _APPENDIX),
    Evidence("h100-pcie", "2:4 fp8, vLLM decode of Llama-3.2-1B, batch 64", 1.00, _APPENDIX, decode=True),
    Evidence("h100-pcie", "2:4 fp8, vLLM decode of Qwen2.5-7B, batch 64", 1.09, _APPENDIX, decode=True),
    Evidence("h100-pcie", "2:4 fp8, vLLM prefill of Qwen2.5-7B, 4,096 tokens", 1.24, _APPENDIX),
    Evidence("h100-pcie", "2:4 int8, vLLM decode of Qwen2.5-7B, batch 64", 1.24, _APPENDIX, decode=True),
    Evidence("h100", "2:4 bf16 CUTLASS, 768 x 4096 x 4096", 0.62, "github.com/NVIDIA/cutlass/issues/1335"),
    Evidence("a100-pcie", "2:4 bf16, the layers of Llama-3.2-1B, 64 tokens", 1.25, _APPENDIX, decode=True),
    Evidence("a100-pcie", "2:4 bf16, the layers of Qwen2.5-7B, 64 tokens", 1.49, _APPENDIX, decode=True),
    Evidence("a100-pcie", "2:4 bf16, the layers of Qwen2.5-7B, 4,096 tokens", 1.36, _APPENDIX),
    Evidence("a100-pcie", "2:4 int8, vLLM decode of Qwen2.5-7B, batch 64", 1.25, _APPENDIX, decode=True),
    Evidence("a100", "2:4 fp16 cuSPARSELt, 4096 x 4096 x 4096", 1.11, "github.com/NVIDIA/CUDALibrarySamples/issues/57"),
    Evidence("a100", "int4 weights against bf16, Llama-3-8B, 1 token", 1.89, _TORCHAO, decode=True),
    Evidence("a100", "int8 weights against bf16, Llama-3-8B, 1 token", 1.60, _TORCHAO, decode=True),
    Evidence("b200", "2:4 bf16, the layers of Llama-3.2-1B, 64 tokens", 1.14, _APPENDIX, decode=True),
    Evidence("b200", "2:4 bf16, the layers of Qwen2.5-7B, 64 tokens", 1.48, _APPENDIX, decode=True),
    Evidence("b200", "2:4 bf16, the layers of Qwen2.5-7B, 4,096 tokens", 1.70, _APPENDIX),
    Evidence("b200", "2:4 fp8, vLLM decode of Qwen2.5-7B, batch 64", 1.11, _APPENDIX, decode=True),
    Evidence("rtx4090", "2:4 bf16, the layers of Llama-3.2-1B, 64 tokens", 1.27, _APPENDIX, decode=True),
    Evidence("rtx4090", "2:4 bf16, the layers of Qwen2.5-7B, 64 tokens", 1.87, _APPENDIX, decode=True),
    Evidence("rtx4090", "2:4 bf16, the layers of Qwen2.5-7B, 4,096 tokens", 1.38, _APPENDIX),
    Evidence(
        "rtx4090",
        "2:4 fp16 in eager torch 2.2, decode of Llama-2-7B, 1 token",
        0.88,
        "github.com/pytorch/tutorials/issues/3505",
        decode=True,
    ),
)
"""Published ratios; a value below 1 is a loss."""


def evidence(device: str, tokens: int) -> list[Evidence]:
    """What was published of this device or its other form (h100 and h100-pcie) and of as few, or as many, tokens."""
    base = device.partition("-")[0]
    base = {"h200": "h100"}.get(base, base)
    return [row for row in EVIDENCE if row.device.partition("-")[0] == base and row.decode == (tokens <= 64)]
