"""Predicts whether 2:4 pays off on a GPU, before training or renting one, by a roofline fitted to published times.

    seconds = launch + max(bytes / (bandwidth * b), operations / (peak * p), in_features * serial)

`launch`, `b`, `p` and `serial` are constants of a kernel. A plain roofline lacks the last term: with few tokens and a
narrow layer there are fewer output tiles than processors, and each tile runs through all input features alone. This
explains why 2:4 loses on small layers: cuSPARSELt has a longer launch and a larger `serial` than cuBLASLt. A CPU is not
estimated: `castlm.lab.advice.cpu` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from castlm.core.errors import InputError
from castlm.devices import Device
from castlm.lab.advice.cpu import NOTICEABLE, Shape, Shapes, untimed_note
from castlm.names import aligned


@dataclass(frozen=True)
class GpuFormat:
    """A way to store and multiply a weight."""

    name: str
    bits: float
    """Stored bytes for each weight of the dense matrix, with metadata and scales."""
    compute: str
    """The dtype of the product, a key of `Device.peak`."""
    sparse: bool = False
    changes_weights: bool = False
    """Whether the weights are rounded, so that perplexity changes too."""


def gpu_formats(dtype: str) -> list[GpuFormat]:
    """The formats of a layer on a GPU, the dense one of `dtype` first.

    2:4 keeps half of the values and two bits of metadata for each of them.
    """
    # 2:4 stores 2 of 4 values of `bits` bits and 2 bits of metadata for each: (2 bits + 2 * 2) / 4 = bits / 2 + 1
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8}
    formats = [
        GpuFormat(dtype, bits[dtype], dtype),
        GpuFormat(f"2:4 {dtype}", bits[dtype] / 2 + 1, dtype, sparse=True),
    ]
    for other in ("int8", "fp8"):
        if bits[dtype] == 16:
            formats.append(GpuFormat(other, 8, other, changes_weights=True))
            formats.append(GpuFormat(f"2:4 {other}", 5, other, sparse=True, changes_weights=True))
    return formats


@dataclass(frozen=True)
class Kernel:
    """The shares of a device's peaks that a kernel reaches."""

    launch: float
    """Microseconds that every call takes."""
    serial: float
    """Nanoseconds for each input feature of a tile."""
    bandwidth: float
    """Share of the device's bandwidth."""
    peak: float
    """Share of the device's peak."""


KERNELS: dict[tuple[str, str, bool], Kernel] = {
    ("ada", "bf16", False): Kernel(0, 8.5, 0.895, 0.924),
    ("ada", "bf16", True): Kernel(2.64, 0, 0.921, 0.756),
    ("ampere", "bf16", False): Kernel(8.06, 3.11, 0.796, 0.699),
    ("ampere", "bf16", True): Kernel(10, 1.7, 0.722, 0.499),
    ("ampere", "int8", False): Kernel(5.74, 3.24, 0.722, 0.569),
    ("ampere", "int8", True): Kernel(9.65, 3.04, 0.733, 0.593),
    ("blackwell", "bf16", False): Kernel(5.68, 0.074, 0.638, 0.707),
    ("blackwell", "bf16", True): Kernel(6.79, 0.381, 0.652, 0.587),
    ("hopper", "bf16", False): Kernel(1.03, 0, 0.852, 0.623),
    ("hopper", "bf16", True): Kernel(6.48, 3.69, 0.687, 0.481),
    ("hopper", "fp8", False): Kernel(0.423, 2.77, 0.857, 0.561),
    ("hopper", "fp8", True): Kernel(3.21, 0.747, 0.786, 0.423),
    ("hopper", "int8", False): Kernel(0.059, 4.43, 0.795, 0.646),
    ("hopper", "int8", True): Kernel(3.41, 0.013, 0.805, 0.452),
}
"""By family, compute dtype and 2:4 or not: cuBLASLt and cuSPARSELt with their best algorithm, fitted to
benchmarks/published.csv by `python -m benchmarks.advisor --fit` with the least mean absolute error of the logarithm
(0.03 to 0.17)."""

_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


def kernel_of(device: Device, form: GpuFormat) -> tuple[Kernel, bool]:
    """The kernel that runs `form` on `device`, and whether it is that of bf16 because no times of the format are
    published for the device's family. fp16 runs as fast as bf16.
    """
    compute = "bf16" if form.compute == "fp16" else form.compute
    found = KERNELS.get((device.family, compute, form.sparse))
    return found or KERNELS[device.family, "bf16", form.sparse], found is None


def layer_seconds(device: Device, form: GpuFormat, shape: Shape, tokens: int, kernel: Kernel | None = None) -> float:
    """Seconds of one linear layer.

    Args:
        shape: (out_features, in_features) of the weight.
        tokens: rows of the input.
        kernel: the kernel that runs it; default: `kernel_of(device, form)`.
    """
    out_features, in_features = shape
    kernel = kernel or kernel_of(device, form)[0]
    peak = (2 if form.sparse else 1) * device.peak[form.compute] * 1e12 * kernel.peak
    weight = out_features * in_features * form.bits / 8
    of_output = 4 if form.compute == "fp32" else 2  # 16 bits for products of int8 and fp8 as well
    moved = weight + tokens * (in_features * _ACTIVATION_BYTES[form.compute] + out_features * of_output)
    operations = 2 * tokens * out_features * in_features
    return kernel.launch * 1e-6 + max(
        moved / (device.bandwidth * 1e9 * kernel.bandwidth),
        operations / peak,
        in_features * kernel.serial * 1e-9,
    )


# ---- published measurements: the source of the kernel times, and ratios shown beside the answer


KERNEL_SOURCE = (
    "Shao et al. 2026, SlideSparse, arXiv 2603.05232: github.com/bcacdwk/vllmbench, "
    "slidesparse/benchmark_kernel/*/alg_search_results (cuBLASLt and cuSPARSELt, best algorithm, torch 2.9, CUDA 12.9)"
)


@dataclass(frozen=True)
class Evidence:
    """One published speed-up over dense in the same dtype, unless `what` names another reference."""

    device: str
    what: str
    speedup: float
    source: str
    decode: bool = False
    """Whether it was measured with few tokens at once."""


_APPENDIX = "arXiv 2603.05232, github.com/bcacdwk/vllmbench, slidesparse/tools/appendix_tables"

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


# ---- the advice


Seconds = Callable[[GpuFormat, Shape, int], float]
"""The signature `seconds(form, (out_features, in_features), tokens)` for one layer."""


@dataclass(frozen=True)
class Row:
    """One layer shape in every format."""

    shape: Shape
    count: int
    seconds: Mapping[str, float]
    """Seconds of one layer, by the name of the format."""
    best: str
    """The fastest format that keeps the weights as they are: dense or 2:4. Dense unless 2:4 is noticeably faster."""


@dataclass(frozen=True)
class Advice:
    """The answer for one model, device, dtype and number of tokens."""

    device: Device
    tokens: int
    formats: Sequence[GpuFormat]
    """The dense one of the model's dtype first."""
    rows: Sequence[Row]
    head_seconds: float
    """Seconds that the output head takes, which stays dense."""
    is_measured: bool
    """Whether the times were measured on the device; otherwise they come from the roofline."""
    num_untimed: int
    """Weights of experts, which are not in the figures."""

    @property
    def dtype(self) -> str:
        return self.formats[0].name

    @property
    def totals(self) -> dict[str, float]:
        """Seconds of all layers and the dense head, by format."""
        return {
            form.name: self.head_seconds + sum(row.count * row.seconds[form.name] for row in self.rows)
            for form in self.formats
        }

    def speedup(self, name: str) -> float:
        """The speed of the whole model relative to dense, if all its layers are stored as `name`."""
        return self.totals[self.dtype] / self.totals[name]

    @property
    def mixed_speedup(self) -> float:
        """The speed-up if each layer is dense or 2:4, whichever is faster, as by `to_semi_structured_`."""
        best = self.head_seconds + sum(row.count * row.seconds[row.best] for row in self.rows)
        return self.totals[self.dtype] / best

    @property
    def evidence(self) -> list[Evidence]:
        """The published ratios of this device or its other form (h100 and h100-pcie), with as few or as many tokens."""
        base = self.device.name.partition("-")[0]
        base = {"h200": "h100"}.get(base, base)
        is_decode = self.tokens <= 64
        return [row for row in EVIDENCE if row.device.partition("-")[0] == base and row.decode == is_decode]

    @property
    def verdict(self) -> str:
        """One sentence on 2:4 in the model's own dtype."""
        sparse = f"2:4 {self.dtype}"
        where = f"at {self.tokens:,} token{'s' * (self.tokens > 1)} on {self.device.name}"
        if sparse not in self.totals:
            return f"Do not use 2:4 for speed: {self.device.name} has no hardware for it in {self.dtype}."
        whole, mixed = self.speedup(sparse), self.mixed_speedup
        if mixed < NOTICEABLE:
            kind = "slower than" if whole < 1 / NOTICEABLE else "no faster than"
            return f"Do not use 2:4 for speed {where}: the linear layers are {kind} dense ({whole:.2f}x)."
        if mixed > whole * 1.01:
            return f"Use 2:4 {where} in some layers only: {mixed:.2f}x of dense, {whole:.2f}x if all are 2:4."
        return f"Use 2:4 {where}: the linear layers run {whole:.2f}x as fast as dense."

    @property
    def notes(self) -> list[str]:
        """The conditions of the figures."""
        notes = untimed_note(self.num_untimed)
        if self.is_measured:
            return [*notes, f"Times: measured here ({self.device.source})."]
        notes.append(f"Times: a roofline of {self.device.source}; attention, norms and caches are left out.")
        notes.append(f"Kernels: {KERNEL_SOURCE}.")
        assumed = ", ".join(form.name for form in self.formats if kernel_of(self.device, form)[1])
        if assumed:
            notes.append(f"No times of {assumed} on {self.device.family} are published: the shares of bf16 stand in.")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain JSON."""
        return {
            "device": self.device.name,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "source": "measured here" if self.is_measured else "roofline",
            "verdict": self.verdict,
            "speedup": {form.name: self.speedup(form.name) for form in self.formats},
            "mixed_speedup": self.mixed_speedup,
            "rows": [asdict(row) for row in self.rows],
            "evidence": [asdict(found) for found in self.evidence],
            "notes": self.notes,
        }

    def text(self) -> str:
        """A table of the shapes, the verdict, published ratios, and the conditions of the figures."""
        dense, *others = (form.name for form in self.formats)
        table = [["layer (out x in)", "layers", f"{dense} us", *others, "advice"]]
        for row in self.rows:
            ratios = [f"{row.seconds[dense] / row.seconds[name]:.2f}x" for name in others]
            shape = f"{row.shape[0]} x {row.shape[1]}"
            table.append([shape, str(row.count), f"{row.seconds[dense] * 1e6:.1f}", *ratios, row.best])
        whole = [f"{self.speedup(name):.2f}x" for name in others]
        table.append(["all, with a dense head", "", f"{self.totals[dense] * 1e6:.0f}", *whole, ""])
        lines = [*aligned(table), "", self.verdict]
        rounded = [form.name for form in self.formats[1:] if form.changes_weights]
        best = max(rounded, key=self.speedup, default=dense)
        if self.speedup(best) > max(NOTICEABLE, self.mixed_speedup):
            lines.append(f"Faster still is {best}, {self.speedup(best):.2f}x of dense; it rounds the weights.")
        if self.evidence:
            sources = list(dict.fromkeys(found.source for found in self.evidence))
            lines += ["", "Published, in units of dense in the same dtype where not said otherwise:"]
            lines += [
                f"  {found.speedup:.2f}x  {found.device}: {found.what} [{sources.index(found.source) + 1}]"
                for found in self.evidence
            ]
            lines += [f"  [{number}] {source}" for number, source in enumerate(sources, 1)]
        return "\n".join([*lines, "", *self.notes])


def advise(
    shapes: Shapes,
    device: Device,
    *,
    tokens: int,
    dtype: str = "bf16",
    seconds: Seconds | None = None,
) -> Advice:
    """Compares the formats of each layer on a device.

    Args:
        shapes: from `layer_shapes` or `shapes_of`.
        tokens: rows of a layer's input at once: the batch size in decode, all tokens of the prompts in prefill.
        dtype: the dtype in which the model is served now; formats are compared with it.
        seconds: times a layer on this device, dense and 2:4 in `dtype`; by default, a roofline estimates all formats.

    Raises:
        InputError: a dtype that the device cannot compute in.
    """
    assert tokens >= 1
    formats = [form for form in gpu_formats(dtype) if form.compute in device.peak]
    if not formats or formats[0].name != dtype:
        raise InputError(f"{device.name} has no {dtype}: choose one of {', '.join(device.peak)}")
    if seconds is not None:
        formats = [form for form in formats if form.compute == dtype]
    timed = seconds or (lambda form, shape, count: layer_seconds(device, form, shape, count))
    dense, sparse = formats[0], f"2:4 {dtype}"
    rows = []
    for shape, count in shapes.blocks.items():
        fits = [form if shape[1] % 4 == 0 or not form.sparse else dense for form in formats]
        found = {form.name: timed(fit, shape, tokens) for form, fit in zip(formats, fits)}
        is_better = sparse in found and found[dtype] / found[sparse] >= NOTICEABLE
        rows.append(Row(shape, count, found, sparse if is_better else dtype))
    head = timed(dense, shapes.head, tokens) if shapes.head else 0.0
    return Advice(device, tokens, formats, rows, head, seconds is not None, shapes.num_untimed)
