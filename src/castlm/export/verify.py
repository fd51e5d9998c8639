"""Prove that a checkpoint is n:m sparse, from its bytes on disk: anyone's, whatever wrote it.

A shape or a sum proves nothing, so every group of every linear layer inside the transformer blocks is counted, and
every float of the checkpoint is looked at for NaN and infinity. Neither torch nor transformers is imported, and memory
stays at a few chunks of a tensor, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from castlm.core.blocks import in_block, is_block_linear
from castlm.core.errors import InputError
from castlm.core.pattern import NM, Pattern
from castlm.export.packed_count import count_packed
from castlm.export.stored import (
    FLOATS,
    StoredTensor,
    magnitude_chunks,
    num_non_finite_bits,
    read_json,
    stored_tensors,
)
from castlm.inference.format import PackedSpec, read_specs
from castlm.layout import guess_model_type, stored_transposed

PACKED_SUFFIXES = (".qweight", ".weight_packed", ".compressed", ".bitmask", ".qdata")
"""Ends of tensor names that hold a packed weight: of GPTQ and AWQ, compressed-tensors, torchao."""


@dataclass
class LayerReport:
    """What one linear layer of a block holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    """The input axis, along which the groups lie: 1, or 0 for Conv1D."""
    num_groups: int = 0
    num_violations: int = 0
    num_zeros: int = 0
    max_nonzeros: int = 0
    """The most non-zeros found in a group."""
    num_non_finite: int = 0
    problem: str | None = None
    """Why the layer has no groups to count."""
    left_dense: str | None = None
    """Why the layer is dense on purpose; its groups are then counted, and not held against the checkpoint."""

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def zero_fraction(self) -> float:
        return self.num_zeros / max(1, self.numel)

    @property
    def ok(self) -> bool:
        sparse = self.left_dense is not None or (self.problem is None and self.num_violations == 0)
        return sparse and self.num_non_finite == 0


@dataclass
class VerifyReport:
    """The proof, or the list of what is against it. Layers come in the order of the model."""

    path: str
    pattern: NM
    layers: list[LayerReport] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    """Tensors of the blocks whose groups were not counted, with the reason: fused experts, excluded layers."""
    non_finite_elsewhere: dict[str, int] = field(default_factory=dict)
    """Tensors outside `layers` that hold NaN or infinity, with how many."""

    @property
    def sparse_layers(self) -> list[LayerReport]:
        """The layers that are held to the pattern."""
        return [layer for layer in self.layers if layer.left_dense is None]

    @property
    def ok(self) -> bool:
        """Whether every layer held to the pattern keeps it, and the checkpoint holds no NaN and no infinity."""
        return all(layer.ok for layer in self.layers) and not self.non_finite_elsewhere

    @property
    def num_non_finite(self) -> int:
        return sum(layer.num_non_finite for layer in self.layers) + sum(self.non_finite_elsewhere.values())

    def totals(self) -> dict[str, int | float]:
        """Counts over the layers held to the pattern; non-finite values over the whole checkpoint."""
        sparse = self.sparse_layers
        return {
            "layers": len(sparse),
            "bad_layers": sum(not layer.ok for layer in sparse),
            "left_dense": len(self.layers) - len(sparse),
            "unchecked": len(self.unchecked),
            "weights": sum(layer.numel for layer in sparse),
            "groups": sum(layer.num_groups for layer in sparse),
            "violations": sum(layer.num_violations for layer in sparse),
            "zero_fraction": sum(layer.num_zeros for layer in sparse) / max(1, sum(layer.numel for layer in sparse)),
            "non_finite": self.num_non_finite,
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON."""
        layers = [
            asdict(layer) | {"shape": list(layer.shape), "zero_fraction": layer.zero_fraction, "ok": layer.ok}
            for layer in self.layers
        ]
        return {
            "path": self.path,
            "pattern": str(self.pattern),
            "ok": self.ok,
            "totals": self.totals(),
            "layers": layers,
            "unchecked": self.unchecked,
            "non_finite_elsewhere": self.non_finite_elsewhere,
        }

    def summary(self) -> str:
        """One line: the verdict and what it rests on."""
        totals = self.totals()
        rest = f", {totals['left_dense']} left dense" if totals["left_dense"] else ""
        rest += f", {totals['unchecked']} not checked" if totals["unchecked"] else ""
        rest += f", {totals['non_finite']:,} values not finite" if totals["non_finite"] else ""
        counted = f"{totals['violations']:,} of {totals['groups']:,} groups violate it"
        return (
            f"{self.pattern} {'holds' if self.ok else 'DOES NOT HOLD'} in {self.path}: {counted} in "
            f"{totals['layers']} layers, {totals['zero_fraction']:.2%} zeros{rest}"
        )

    def text(self, max_good: int = 12) -> str:
        """A table, layers with violations first and in full, then at most `max_good` that hold, then `summary()`."""
        bad = [layer for layer in self.layers if not layer.ok]
        good = [layer for layer in self.layers if layer.ok]
        rows = [("layer", "shape", "groups", "violating", "max", "zeros", "not finite", "")]
        rows += [_row(layer) for layer in bad + good[:max_good]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
            for row in rows
        ]
        if len(good) > max_good:
            lines.append(f"... and {len(good) - max_good} more layers that hold")
        lines += [f"not checked: {name} ({reason})" for name, reason in self.unchecked.items()]
        lines += [f"not finite: {name} ({count:,} values)" for name, count in self.non_finite_elsewhere.items()]
        return "\n".join([*lines, self.summary()])


def _row(layer: LayerReport) -> tuple[str, ...]:
    note = layer.problem or ""
    if layer.left_dense is not None:
        note = f"left dense: {layer.left_dense}"
    axis = " (in, out)" if layer.axis == 0 else ""
    return (
        layer.name,
        "x".join(map(str, layer.shape)) + axis,
        f"{layer.num_groups:,}",
        f"{layer.num_violations:,}",
        str(layer.max_nonzeros),
        f"{layer.zero_fraction:.2%}",
        f"{layer.num_non_finite:,}",
        note if layer.ok else f"{note}  <-- FAILS".strip(),
    )


def verify(
    path: str | Path,
    pattern: Pattern | str = "2:4",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> VerifyReport:
    """Counts every n:m group of a Hugging Face checkpoint: a folder, sharded or not, or one .safetensors file.

    Held to the pattern are the 2-D weights inside the transformer blocks, except embeddings and norms; groups lie along
    the input axis, which is the first one where the family stores Conv1D (GPT-2). Layers that the folder's castlm.json
    lists under `left_dense` are reported as such. Reads f64, f32, f16, bf16 and f8, where a value of -0.0 is a zero,
    and castlm's packed format, whose masks must keep exactly n of every m.

    Args:
        path: the checkpoint.
        pattern: n:m, at most n non-zeros in every m consecutive weights.
        include: globs of tensor names to hold to the pattern in place of the default rule.
        exclude: globs of tensor names to leave out, reported as not checked.

    Raises:
        InputError: nothing readable at `path`, a corrupt or short file, integer weights or those packed by others, a
            bad pattern, or no layer to hold to the pattern.
    """
    pattern = NM.parse(str(pattern))
    path = Path(path)
    tensors = stored_tensors(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    specs = read_specs(sorted({tensor.file for tensor in tensors.values()}))
    _refuse_packed(tensors, config)
    model_type = config.get("model_type") or guess_model_type({name: t.shape for name, t in tensors.items()})
    left_dense = read_left_dense(folder / "castlm.json")
    names = _selected(tensors, include)
    excluded = {name for name in names if _matches(name, exclude or ())}

    report = VerifyReport(str(path), pattern)
    for name, spec in sorted(specs.items(), key=lambda item: _natural(item[0])):
        parts = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in spec.tensors()}
        if in_block(name):
            report.layers.append(_packed_layer(f"{name}.weight", spec, parts, pattern))
        elif num_non_finite := sum(map(_count_non_finite, parts.values())):
            report.non_finite_elsewhere[name] = num_non_finite
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        if name in names and name not in excluded:
            _refuse_unreadable(tensor, config)
            layer = _count(tensor, pattern, axis=0 if stored_transposed(model_type, name) else 1)
            layer.left_dense = left_dense_reason(name, left_dense)
            report.layers.append(layer)
            continue
        if name in excluded:
            report.unchecked[name] = "excluded"
        elif in_block(name) and len(tensor.shape) > 2:
            report.unchecked[name] = (
                f"{len(tensor.shape)}-D of shape {'x'.join(map(str, tensor.shape))}, {tensor.dtype}"
            )
        if num_non_finite := _count_non_finite(tensor):
            report.non_finite_elsewhere[name] = num_non_finite
    _refuse_empty(report, len(tensors))
    return report


def _packed_layer(name: str, spec: PackedSpec, parts: Mapping[str, StoredTensor], pattern: NM) -> LayerReport:
    """Counts a layer in castlm's packed format, from its mask; a kept value that is zero counts as a zero."""
    shape = (spec.columns, spec.rows) if spec.transposed else (spec.rows, spec.columns)
    layer = LayerReport(name, shape, spec.values, axis=0 if spec.transposed else 1)
    layer.num_non_finite = sum(map(_count_non_finite, parts.values()))
    if not spec.m:
        layer.problem = "dense: quantized, and packed without a mask"
    elif spec.columns % pattern.m:
        layer.problem = f"its width of {spec.columns} does not divide by {pattern.m}"
    else:
        counts = count_packed(spec, parts, pattern.m, pattern.n)
        layer.num_groups, layer.num_violations, layer.max_nonzeros = counts.groups, counts.violations, counts.most_kept
        layer.num_zeros = spec.rows * spec.columns - counts.nonzeros
        layer.problem = counts.damage
    return layer


def read_left_dense(file: Path) -> Mapping[str, str]:
    """Why, by the name of a module or parameter, layers are left dense, as a castlm.json says; empty without one."""
    content = read_json(file).get("left_dense", {}) if file.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: left_dense is a {type(content).__name__}, not an object of names and reasons")
    return content


def left_dense_reason(name: str, left_dense: Mapping[str, str]) -> str | None:
    """Why `name` is left dense: its own entry, or that of a module it belongs to."""
    parts = name.split(".")
    owners = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((str(left_dense[owner]) for owner in owners if owner in left_dense), None)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _selected(tensors: Mapping[str, StoredTensor], include: Iterable[str] | None) -> set[str]:
    if include is None:
        return {name for name, tensor in tensors.items() if is_block_linear(name, tensor.shape)}
    globs = tuple(include)
    return {name for name, tensor in tensors.items() if len(tensor.shape) == 2 and _matches(name, globs)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _refuse_unreadable(tensor: StoredTensor, config: Mapping[str, Any]) -> None:
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"{tensor.name} is stored as {tensor.dtype}{_method(config)}: verify the model before quantization"
        )


def _refuse_packed(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
    packed = [name for name in tensors if name.endswith(PACKED_SUFFIXES)]
    if packed:
        raise InputError(f"{packed[0]} is a packed weight{_method(config)}: verify the model before it is packed")


def _refuse_empty(report: VerifyReport, num_tensors: int) -> None:
    if not report.sparse_layers:
        found = f"{num_tensors} tensors, {len(report.layers)} left dense, {len(report.unchecked)} not checked"
        raise InputError(f"{report.path} has no layer to hold to {report.pattern} ({found}): name some with include")


def _method(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    return f" ({quantization.get('quant_method', 'quantized')})" if isinstance(quantization, dict) else ""


def _count(tensor: StoredTensor, pattern: NM, axis: int) -> LayerReport:
    """Counts one 2-D tensor chunk by chunk."""
    n, m = pattern.n, pattern.m
    layer = LayerReport(tensor.name, tensor.shape, tensor.dtype, axis)
    columns = tensor.shape[1]
    width = tensor.shape[axis]
    if width % m:
        layer.problem = f"its width of {width} does not divide by {m}"
    step = 1 if layer.problem else m if axis == 1 else m * max(1, columns)
    for bits in magnitude_chunks(tensor, step):
        layer.num_non_finite += num_non_finite_bits(bits, tensor.dtype)
        nonzero = bits != 0
        layer.num_zeros += len(nonzero) - int(np.count_nonzero(nonzero))
        if layer.problem is None:
            counts = _group_counts(nonzero, m, axis, columns)
            layer.num_groups += counts.size
            layer.num_violations += int(np.count_nonzero(counts > n))
            layer.max_nonzeros = max(layer.max_nonzeros, int(counts.max()))
    return layer


def _group_counts(nonzero: np.ndarray, m: int, axis: int, columns: int) -> np.ndarray:
    """Non-zeros of each group of `m` in a flat chunk of whole groups, for groups along rows (1) or down columns (0)."""
    ones = nonzero.view(np.uint8)
    dtype = np.uint8 if m < 256 else np.uint32
    if axis == 0:
        return np.add.reduce(ones.reshape(-1, m, columns), axis=1, dtype=dtype)
    if m in (2, 4, 8):
        # The bytes of a group, read as one integer: times 0x01..01, its top byte is their sum. 20x a reduce over m.
        word = np.dtype(f"<u{m}").type
        return (ones.view(word) * word(int("01" * m, 16))) >> word(8 * (m - 1))
    return np.add.reduce(ones.reshape(-1, m), axis=1, dtype=dtype)


def _count_non_finite(tensor: StoredTensor) -> int:
    if tensor.dtype not in FLOATS:
        return 0
    return sum(num_non_finite_bits(bits, tensor.dtype) for bits in magnitude_chunks(tensor))
