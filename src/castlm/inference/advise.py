"""Whether 2:4 pays off for a model on a device, before anyone trains or rents: by layer shape and as a whole.

The times are a roofline's (`roofline.py`), or measured here. The model is never loaded: its config gives the shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.pattern import Pattern
from castlm.core.sparsify import is_sparse_linear
from castlm.dtypes import FLOATS
from castlm.export.cut_sizes import sizes_after, sizes_of
from castlm.inference.devices import Device
from castlm.inference.published import KERNEL_SOURCE, Evidence, evidence
from castlm.inference.roofline import Format, cpu_formats, gpu_formats, is_assumed, layer_seconds, supports

Shape = tuple[int, int]
Seconds = Callable[[Format, Shape, int], float]
"""`seconds(form, (out_features, in_features), tokens)` of one layer."""

NOTICEABLE = 1.05
"""A gain below this is within the spread of measurements, and is not advised."""


@dataclass(frozen=True)
class Shapes:
    """The linear layers of a model."""

    blocks: Mapping[Shape, int]
    """How many layers inside the transformer blocks have the shape (out_features, in_features)."""
    head: Shape | None = None
    """The output head, which stays dense."""
    num_expert_weights: int = 0
    """Weights of experts, which are left out: how many tokens each sees depends on the router."""


def layer_shapes(model: nn.Module) -> Shapes:
    """The shapes of a model's linear layers; the model may be on the meta device.

    Raises:
        InputError: no linear layer inside numbered blocks.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = Counter(_shape(m) for name, m in linears.items() if is_sparse_linear(m, name))
    if not blocks:
        raise InputError(f"{type(model).__name__} has no linear layer inside transformer blocks: nothing to advise on")
    outside = [_shape(m) for name, m in linears.items() if not is_sparse_linear(m, name)]
    experts = sum(m.weight.numel() for m in model.modules() if isinstance(m, ExpertLinear))
    return Shapes(dict(blocks), max(outside, key=math.prod, default=None), experts)


def _shape(layer: nn.Linear) -> Shape:
    return layer.out_features, layer.in_features


def shapes_of(name: str, trust_remote_code: bool = False, cut: Pattern | None = None) -> Shapes:
    """`layer_shapes` of a model folder, hub id, GGUF file or "demo", from its config alone.

    Args:
        cut: a pattern whose channels or heads are cut out first.

    Raises:
        InputError: as `castlm.models.opening.open_config`, or a family that `cut` is not for.
    """
    from castlm.models.architecture import shape_model
    from castlm.models.opening import open_config

    config = open_config(name, trust_remote_code=trust_remote_code)
    if cut is not None:
        for field_name, value in sizes_after(cut, sizes_of(cut, config.to_dict())).items():
            setattr(config, field_name, value)
    return layer_shapes(shape_model(config, trust_remote_code=trust_remote_code))


@dataclass(frozen=True)
class Row:
    """One layer shape in every format."""

    shape: Shape
    count: int
    seconds: Mapping[str, float]
    """Of one layer, by the name of the format."""
    best: str
    """The fastest format that keeps the weights as they are: dense or 2:4. Dense unless 2:4 is noticeably faster."""


@dataclass(frozen=True)
class Advice:
    """The answer for one model, device, dtype and number of tokens."""

    device: str
    dtype: str
    tokens: int
    source: str
    """Where the times come from: "roofline" or "measured here"."""
    rows: Sequence[Row]
    head_seconds: float
    totals: Mapping[str, float]
    """Seconds of all layers and the dense head, by format."""
    formats: Sequence[Format]
    evidence: Sequence[Evidence] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)

    def speedup(self, name: str) -> float:
        """How many times as fast as dense the whole model is, if all its layers are stored as `name`."""
        return self.totals[self.dtype] / self.totals[name]

    @property
    def mixed_speedup(self) -> float:
        """The speed-up if each layer is dense or 2:4, whichever is faster: what `to_semi_structured_` does."""
        best = self.head_seconds + sum(row.count * row.seconds[row.best] for row in self.rows)
        return self.totals[self.dtype] / best

    @property
    def verdict(self) -> str:
        """One sentence on 2:4 in the model's own dtype."""
        sparse = f"2:4 {self.dtype}"
        where = f"at {self.tokens:,} token{'s' * (self.tokens > 1)} on {self.device}"
        if sparse not in self.totals:
            return f"Do not use 2:4 for speed: {self.device} has no hardware for it in {self.dtype}."
        whole, mixed = self.speedup(sparse), self.mixed_speedup
        if mixed < NOTICEABLE:
            kind = "slower than" if whole < 1 / NOTICEABLE else "no faster than"
            return f"Do not use 2:4 for speed {where}: the linear layers are {kind} dense ({whole:.2f}x)."
        if mixed > whole * 1.01:
            return f"Use 2:4 {where} in some layers only: {mixed:.2f}x of dense, {whole:.2f}x if all are 2:4."
        return f"Use 2:4 {where}: the linear layers run {whole:.2f}x as fast as dense."

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain JSON."""
        rows = [asdict(row) | {"shape": list(row.shape), "seconds": dict(row.seconds)} for row in self.rows]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "source": self.source,
            "verdict": self.verdict,
            "speedup": {form.name: self.speedup(form.name) for form in self.formats},
            "mixed_speedup": self.mixed_speedup,
            "rows": rows,
            "evidence": [asdict(found) for found in self.evidence],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """A table of the shapes, the verdict, what was published, and what the figures rest on."""
        names = [form.name for form in self.formats]
        table = [["layer (out x in)", "layers", f"{names[0]} us", *names[1:], "advice"]]
        for row in self.rows:
            dense = row.seconds[names[0]]
            ratios = [f"{dense / row.seconds[name]:.2f}x" for name in names[1:]]
            shape = f"{row.shape[0]} x {row.shape[1]}"
            table.append([shape, str(row.count), f"{dense * 1e6:.1f}", *ratios, row.best])
        whole = [f"{self.speedup(name):.2f}x" for name in names[1:]]
        table.append(["all, with a dense head", "", f"{self.totals[names[0]] * 1e6:.0f}", *whole, ""])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
        lines += ["", self.verdict]
        others = [form.name for form in self.formats[1:] if form.changes_weights]
        if others:
            best = max(others, key=self.speedup)
            if self.speedup(best) > max(NOTICEABLE, self.mixed_speedup):
                lines.append(f"Faster still is {best}, {self.speedup(best):.2f}x of dense; it rounds the weights.")
        torch = next((form.name for form in self.formats if form.kernel == "torch"), None)
        if torch and self.speedup(torch) > NOTICEABLE * self.mixed_speedup:
            lines.append(
                f"{torch}, which needs no packing, is {self.speedup(torch):.2f}x as fast as castlm's dense layers."
            )
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
    formats: Sequence[Format] | None = None,
    seconds: Seconds | None = None,
) -> Advice:
    """Compares what each layer could be on a device.

    Args:
        shapes: of `layer_shapes` or `shapes_of`.
        tokens: rows of a layer's input at once: the batch size in decode, all tokens of the prompts in prefill.
        dtype: what the model is served in now; the formats are compared with it.
        formats: what a layer could be, the dense format of `dtype` first; all that the device has when not given.
        seconds: times a layer on this device; a roofline when not given.

    Raises:
        InputError: `tokens` below 1, or a dtype that the device cannot compute in.
    """
    if tokens < 1:
        raise InputError(f"{tokens} tokens: give at least 1, the rows that a layer sees at once")
    possible = formats or (cpu_formats if device.family == "cpu" else gpu_formats)(dtype)
    formats = [form for form in possible if supports(device, form)]
    if not formats or formats[0].name != dtype:
        raise InputError(f"{device.name} has no {dtype}: choose one of {', '.join(_dtypes_of(device))}")
    timed = seconds or (lambda form, shape, count: layer_seconds(device, form, shape, count))
    rows = [_row(shape, count, formats, timed, tokens, dtype) for shape, count in shapes.blocks.items()]
    head = timed(formats[0], shapes.head, tokens) if shapes.head else 0.0
    totals = {form.name: head + sum(row.count * row.seconds[form.name] for row in rows) for form in formats}
    return Advice(
        device.name,
        dtype,
        tokens,
        "measured here" if seconds else "roofline",
        rows,
        head,
        totals,
        formats,
        evidence(device.name, tokens),
        _notes(device, formats, seconds is not None, shapes.num_expert_weights),
    )


def _dtypes_of(device: Device) -> list[str]:
    """The dtypes that a model can be served in on a device; the peaks of a CPU have other names among them."""
    return list(FLOATS if device.family == "cpu" else device.peak)


def _row(shape: Shape, count: int, formats: Sequence[Format], timed: Seconds, tokens: int, dtype: str) -> Row:
    fits = [form for form in formats if not form.sparse or shape[1] % 4 == 0]
    found = {form.name: timed(form, shape, tokens) for form in fits}
    for form in formats:  # a layer that cannot be 2:4 stays what it is
        found.setdefault(form.name, found[dtype])
    sparse = f"2:4 {dtype}"
    is_better = sparse in found and found[dtype] / found[sparse] >= NOTICEABLE
    return Row(shape, count, found, sparse if is_better else dtype)


def _notes(device: Device, formats: Sequence[Format], measured: bool, num_expert_weights: int) -> list[str]:
    notes = []
    if num_expert_weights:
        notes.append(f"The {num_expert_weights:,} weights of the experts are not in these figures.")
    if measured:
        return [*notes, f"Times: measured here ({device.source})."]
    notes += [f"Times: a roofline of {device.source}; attention, norms and caches are left out."]
    if device.family != "cpu":
        notes.append(f"Kernels: {KERNEL_SOURCE}.")
    assumed = [form.name for form in formats if is_assumed(device, form)]
    if assumed:
        notes.append(f"No times of {', '.join(assumed)} on {device.family} are published: the shares of bf16 stand in.")
    return notes
