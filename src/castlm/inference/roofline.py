"""How long one linear layer takes, from the bytes it moves and the operations it does.

    seconds = launch + max(bytes / (bandwidth * b), operations / (peak * p), in_features * serial)

`launch`, `b`, `p` and `serial` belong to a kernel. The last term is what a plain roofline lacks: with few tokens and a
narrow layer there are fewer output tiles than processors, and each tile walks through all input features by itself.
Its share is why 2:4 loses on small layers: cuSPARSELt has a longer launch and walks more slowly than cuBLASLt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from castlm.inference.devices import Device


@dataclass(frozen=True)
class Format:
    """A way to store and multiply a weight."""

    name: str
    bits: float
    """Stored for each weight of the dense matrix, metadata and scales included."""
    compute: str
    """The dtype of the product, a key of `Device.peak`."""
    sparse: bool = False
    kernel: str = ""
    """Which kernels run it, where `compute` and `sparse` do not tell: "torch", or "int8 weights" and "int4 weights" of
    torchao's weight-only kernels."""
    changes_weights: bool = False
    """Whether the weights are rounded, so that perplexity changes too."""


def gpu_formats(dtype: str) -> list[Format]:
    """The dense format of `dtype` first, then what else a layer could be on a GPU.

    2:4 keeps half of the values and two bits of metadata for each of them.
    """
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8}
    formats = [
        Format(dtype, bits[dtype], dtype),
        Format(f"2:4 {dtype}", bits[dtype] / 2 + 1, dtype, sparse=True),
    ]
    for other in ("int8", "fp8"):
        if bits[dtype] == 16:
            formats.append(Format(other, 8, other, changes_weights=True))
            formats.append(Format(f"2:4 {other}", 5, other, sparse=True, changes_weights=True))
    if dtype in ("bf16", "fp16"):
        formats.append(Format("int8 weights", 8, dtype, kernel="int8 weights", changes_weights=True))
        formats.append(Format("int4 weights", 4.25, dtype, kernel="int4 weights", changes_weights=True))
    return formats


def cpu_formats(dtype: str) -> list[Format]:
    """The dense format of `dtype` first, by castlm's kernel, then what else a layer could be on a CPU."""
    bits = {"fp32": 32, "bf16": 16, "fp16": 16}
    if dtype not in bits:
        return []
    return [
        Format(dtype, bits[dtype], dtype),
        Format(f"2:4 {dtype}", bits[dtype] / 2 + 1, dtype, sparse=True),
        Format("int8", 8, "int8", changes_weights=True),
        Format("2:4 int8", 5, "int8", sparse=True, changes_weights=True),
        Format("int4", 4.25, "int4", changes_weights=True),
        Format("2:4 int4", 3.25, "int4", sparse=True, changes_weights=True),
        Format(f"torch {dtype}", bits[dtype], dtype, kernel="torch"),
    ]


@dataclass(frozen=True)
class Kernel:
    """How close a kernel comes to its device."""

    launch: float
    """Seconds that every call takes."""
    serial: float
    """Seconds for each input feature of a tile."""
    bandwidth: float
    """Share of the device's bandwidth."""
    peak: float
    """Share of the device's peak."""


def _kernel(launch_us: float, serial_ns: float, bandwidth: float, peak: float) -> Kernel:
    return Kernel(launch_us * 1e-6, serial_ns * 1e-9, bandwidth, peak)


KERNELS: dict[tuple[str, str, bool], Kernel] = {
    ("ada", "bf16", False): _kernel(0, 8.5, 0.895, 0.924),
    ("ada", "bf16", True): _kernel(2.64, 0, 0.921, 0.756),
    ("ampere", "bf16", False): _kernel(8.06, 3.11, 0.796, 0.699),
    ("ampere", "bf16", True): _kernel(10, 1.7, 0.722, 0.499),
    ("ampere", "int8", False): _kernel(5.74, 3.24, 0.722, 0.569),
    ("ampere", "int8", True): _kernel(9.65, 3.04, 0.733, 0.593),
    ("blackwell", "bf16", False): _kernel(5.68, 0.074, 0.638, 0.707),
    ("blackwell", "bf16", True): _kernel(6.79, 0.381, 0.652, 0.587),
    ("cpu", "bf16", False): _kernel(0, 0, 1.40, 1.10),
    ("cpu", "bf16", True): _kernel(0, 0, 1.35, 2.10),
    ("cpu", "fp32", False): _kernel(0, 0, 1.40, 0.90),
    ("cpu", "fp32", True): _kernel(0, 0, 1.35, 1.80),
    ("cpu", "int8", False): _kernel(0, 0, 1.40, 2.24),
    ("cpu", "int8", True): _kernel(0, 0, 1.40, 3.45),
    ("cpu", "int4", False): _kernel(0, 0, 1.12, 2.00),
    ("cpu", "int4", True): _kernel(0, 0, 1.12, 3.60),
    ("cpu", "torch bf16", False): _kernel(0, 0, 0.80, 1.00),
    ("cpu", "torch fp32", False): _kernel(0, 0, 1.10, 1.00),
    ("hopper", "bf16", False): _kernel(1.03, 0, 0.852, 0.623),
    ("hopper", "bf16", True): _kernel(6.48, 3.69, 0.687, 0.481),
    ("hopper", "fp8", False): _kernel(0.423, 2.77, 0.857, 0.561),
    ("hopper", "fp8", True): _kernel(3.21, 0.747, 0.786, 0.423),
    ("hopper", "int8", False): _kernel(0.059, 4.43, 0.795, 0.646),
    ("hopper", "int8", True): _kernel(3.41, 0.013, 0.805, 0.452),
}
"""By family, compute dtype and 2:4 or not, fitted by `python -m benchmarks.advisor --fit` with the least mean absolute
error of the logarithm. GPUs: cuBLASLt and cuSPARSELt with their best algorithm, to published.csv; error 0.03 to 0.17.
CPU: the kernels of castlm and torch's on an AMD EPYC (Zen 3, AVX2), bandwidths rounded to what an idle machine gave and
peaks to two runs beside other work, which the roofline misses by 15 to 48 %. A share above 1 is of what torch reaches:
castlm's kernels read from huge pages, 2:4 skips half of the multiplications, and int8 has more lanes than fp32. The
peak of torch's bf16 is measured by itself (`this_cpu`): with units for it, it is more than four times as high."""


@dataclass(frozen=True)
class ManyRows:
    """What castlm's CPU kernels reach where an input has many rows, as a prompt has."""

    more_than: int
    """Rows up to which `KERNELS` holds."""
    peak: Mapping[tuple[str, bool], float]
    """Share of the device's peak by compute dtype and 2:4 or not."""
    preparation: Mapping[tuple[str, bool], float]
    """Rows whose multiplication at the device's peak takes as long as what each weight needs before."""

    def share(self, compute: str, sparse: bool, rows: int) -> float:
        """Share of the device's peak with `rows` rows."""
        key = compute, sparse
        return 1 / (1 / self.peak[key] + self.preparation.get(key, 0.0) / rows)


def _many_rows(
    more_than: int,
    peak: Mapping[str, tuple[float, float]],
    preparation: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> ManyRows:
    """Of pairs, dense and 2:4, by compute dtype."""

    def by_kernel(pairs: Mapping[str, tuple[float, float]]) -> dict[tuple[str, bool], float]:
        return {(compute, sparse): pair[sparse] for compute, pair in pairs.items() for sparse in (False, True)}

    return ManyRows(more_than, by_kernel(peak), by_kernel(preparation))


_FLOATS = ("bf16", "fp16", "fp32")
_GEMM = dict.fromkeys(_FLOATS, (0.9, 0.9))
MANY_ROWS = {
    "avx2": _many_rows(128, {**_GEMM, "int8": (1.0, 1.5), "int4": (0.8, 1.3)}),
    "avx512": _many_rows(128, {**dict.fromkeys(_FLOATS, (0.9, 1.1)), "int8": (1.6, 2.3), "int4": (1.1, 1.8)}),
    "avx512 intel": _many_rows(128, {**_GEMM, "int8": (0.8, 1.2), "int4": (0.6, 1.1)}),
    "amx": _many_rows(
        12,
        {**_GEMM, "bf16": (2.2, 2.2), "int8": (3.5, 3.5), "int4": (3.5, 3.5)},
        {"bf16": (22, 12), "int8": (10, 9), "int4": (8, 8)},
    ),
}
"""By `Device.level`, from docs/performance.md (`benchmarks.levels` on a Zen 3, a Zen 4 and an Emerald Rapids): the
speed of the kernels in units of the GEMM over the unpacked weight, of which unpacking takes a tenth. What AMX needs to
arrange a weight in tiles is from the cells of `benchmarks.advisor` with 16 and 256 rows."""

WEIGHT_ONLY = {"int8 weights": 0.56 / 0.70, "int4 weights": 0.37 / 0.70}
"""Bandwidth of torchao's weight-only kernels in units of the dense bf16 one, on an A100 with Llama-3-8B at one token:
1151 and 763 GB/s of 1436 (README of torchao/sparsity). They multiply in the dtype of the activations, and split the
input features among processors, so that they have no serial part."""

_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 2, "fp8": 1}


def is_assumed(device: Device, form: Format) -> bool:
    """Whether no kernel times of the format are published for the device's family, and those of bf16 stand in."""
    return (device.family, _compute(form), form.sparse) not in KERNELS


def supports(device: Device, form: Format) -> bool:
    """Whether the device has hardware for the format."""
    return form.compute in (device.sparse_peak if form.sparse else device.peak)


def torch_product(dtype: str) -> str:
    """The key in `Device.peak` of torch's own products of a dtype, where castlm's kernels compute it in another way."""
    return f"torch {dtype}"


def _compute(form: Format) -> str:
    compute = {"fp16": "bf16"}.get(form.compute, form.compute)
    return torch_product(compute) if form.kernel == "torch" else compute


def kernel_of(device: Device, form: Format) -> Kernel:
    """The kernel that runs `form` on `device`."""
    compute = "bf16" if is_assumed(device, form) else _compute(form)
    kernel = KERNELS[device.family, compute, form.sparse]
    if form.kernel in WEIGHT_ONLY:
        return Kernel(kernel.launch, 0.0, kernel.bandwidth * WEIGHT_ONLY[form.kernel], kernel.peak)
    return kernel


def layer_seconds(
    device: Device, form: Format, shape: tuple[int, int], tokens: int, kernel: Kernel | None = None
) -> float:
    """Seconds of one linear layer.

    Args:
        shape: (out_features, in_features) of the weight.
        tokens: rows of the input.
        kernel: what runs it; `kernel_of(device, form)` when not given.
    """
    out_features, in_features = shape
    kernel = kernel or kernel_of(device, form)
    peaks = device.sparse_peak if form.sparse else device.peak
    peak = peaks[form.compute] * kernel.peak
    many_rows = MANY_ROWS.get(device.level)
    if form.kernel == "torch":
        peak = peaks.get(torch_product(form.compute), peaks[form.compute]) * kernel.peak
    elif many_rows and tokens > many_rows.more_than:
        peak = peaks[form.compute] * many_rows.share(form.compute, form.sparse, tokens)
    weight = out_features * in_features * form.bits / 8
    of_output = 4 if form.compute == "fp32" else 2
    moved = weight + tokens * (in_features * _ACTIVATION_BYTES[form.compute] + out_features * of_output)
    operations = 2 * tokens * out_features * in_features
    return kernel.launch + max(
        moved / (device.bandwidth * kernel.bandwidth),
        operations / peak,
        in_features * kernel.serial,
    )
