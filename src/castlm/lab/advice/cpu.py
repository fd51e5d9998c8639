"""Recommends a format for a model on this CPU: times every format, with its bytes, and its perplexity if known.

The layers have the shapes of the model's config and random weights, so nothing is downloaded. The formats of a shape
are timed in turns, over so many copies of the weight that the caches cannot hold them, as in a model. Attention, norms
and the KV cache are not timed, since they take the same time in every format. What torch itself runs is timed beside
them: the plain weights, and its dynamic int8. `gpu.py` times a GPU.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.nm import NM, Pattern, nm_mask
from castlm.core.sparsify import filter_for
from castlm.dtypes import FLOATS
from castlm.hardware import cpu_name, has_fast_bf16
from castlm.names import aligned
from castlm.packed import native
from castlm.packed.layers import packed_linear
from castlm.packed.tensor import pack, pack_integers
from castlm.say import Progress, silent
from castlm_runtime.formats import DEFAULT_HEAD, FORMATS, rounded_formats
from castlm_runtime.packed import PackedSpec

Shape = tuple[int, int]
"""(out_features, in_features)."""

NOTICEABLE = 1.05
"""A smaller gain is within the spread of measurements, and is not recommended."""

TWO_OF_FOUR = NM(2, 4)
"""The pattern of the tensor cores of GPUs."""

WORKLOADS = {"one token": 1, "batch of 8": 8, "prompt of 512": 512}
"""Rows of a layer's input; the head sees only the last row of a prompt."""

SECONDS = 30.0
"""Default seconds of timing for all shapes, without the time to make the weights."""

_COLD_BYTES = 48 << 20  # more than most last-level caches: each call reads its weight from memory, as in a model
_MAX_WEIGHTS = 4 << 20  # of a timed layer; of a larger one, only some rows are timed
_MIN_ROUNDS = 3
_IDLE = 0.8  # of the time of a thread that nobody disturbs: what the others of its pool take longer, it waits


@dataclass(frozen=True)
class Shapes:
    """The layers of a model, counted by shape, and the numbers of its other weights."""

    blocks: Mapping[Shape, int]
    """Number of linear layers inside the transformer blocks by shape."""
    head: Shape | None = None
    """The output head."""
    num_untimed: int = 0
    """Weights of experts, which are not timed: the number of tokens of each depends on the router."""
    is_tied: bool = True
    """Whether the embedding and the head share one table."""
    num_others: int = 0
    """All weights outside `blocks`, the tables of embedding and head, and the experts."""

    @property
    def num_weights(self) -> int:
        """All weights of the model."""
        tables = math.prod(self.head) * (1 if self.is_tied else 2) if self.head else 0
        in_blocks = sum(math.prod(shape) * count for shape, count in self.blocks.items())
        return in_blocks + tables + self.num_others + self.num_untimed


def layer_shapes(model: PreTrainedModel) -> Shapes:
    """The shapes of a model's weights; the model may be on the meta device.

    Raises:
        InputError: no linear layer inside numbered blocks.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chooses = filter_for(model)
    blocks = Counter(_shape(m) for name, m in linears.items() if chooses(m, name))
    if not blocks:
        raise InputError(f"{type(model).__name__} has no linear layer inside transformer blocks: nothing to advise on")
    outside = [m for name, m in linears.items() if not chooses(m, name)]
    head = max(outside, key=lambda m: m.weight.numel(), default=None)
    experts = sum(m.weight.numel() for m in model.modules() if isinstance(m, ExpertLinear))
    tables = {id(model.get_input_embeddings().weight), id(None if head is None else head.weight)}
    others = sum(p.numel() for p in model.parameters() if id(p) not in tables) - experts
    others -= sum(math.prod(shape) * count for shape, count in blocks.items())
    is_tied = bool(model.config.get_text_config().tie_word_embeddings)
    return Shapes(dict(blocks), None if head is None else _shape(head), experts, is_tied, others)


def patterns_for(shapes: Shapes) -> tuple[NM, ...]:
    """The patterns that keep half of the weights and are worth timing on a CPU: the longest groups that the kernels and
    the widths of all layers allow, which lose the least quality, the longest that it takes nearly as fast as 2:4,
    and 2:4.
    """
    widths = {columns for _, columns in shapes.blocks if columns % TWO_OF_FOUR.m == 0}
    longest = (native.LONGEST_GROUP, native.longest_free_group(TWO_OF_FOUR.n, TWO_OF_FOUR.m))
    return tuple(dict.fromkeys([*(TWO_OF_FOUR.with_longest_groups(widths, m) for m in longest), TWO_OF_FOUR]))


def _shape(layer: nn.Linear) -> Shape:
    return layer.out_features, layer.in_features


def shapes_of(name: str, trust_remote_code: bool = False) -> Shapes:
    """`layer_shapes` of a model folder, hub id, GGUF file or "demo", from its config alone.

    Raises:
        InputError: as `castlm.models.io.open_config`.
    """
    from castlm.models.architecture import shape_model
    from castlm.models.io import open_config

    config = open_config(name, trust_remote_code=trust_remote_code)
    return layer_shapes(shape_model(config, trust_remote_code=trust_remote_code))


# ---- what is compared


@dataclass(frozen=True)
class Option:
    """A way to store and multiply the linear layers of a model."""

    values: str
    """A name of `FORMATS`."""
    n: int = 0
    m: int = 0
    """The pattern; both 0 of dense layers."""
    head: str = "bf16"
    """Format of the output head and of the embedding."""
    by_torch: bool = False
    """Whether torch multiplies instead of castlm's kernels: a plain folder in transformers, or torch's dynamic int8."""

    @property
    def is_sparse(self) -> bool:
        return self.m > 0

    @property
    def pattern(self) -> str:
        """n:m, or "dense"."""
        return f"{self.n}:{self.m}" if self.m else "dense"

    @property
    def name(self) -> str:
        if self.by_torch:
            return "torch's dynamic int8" if FORMATS[self.values].rounds else f"transformers, {self.values}"
        head = f", {self.head} head" if FORMATS[self.head].rounds else ""
        return f"{self.pattern} {self.values}{head}"

    def spec(self, shape: Shape, is_head: bool = False) -> PackedSpec:
        """The storage of a layer, dense if m does not divide its width, or of the output head."""
        if is_head:
            return PackedSpec(*shape, 0, 0, self.head)
        n, m = (self.n, self.m) if self.m and shape[1] % self.m == 0 else (0, 0)
        return PackedSpec(*shape, n, m, self.values)


def options(dtype: str = "bf16", patterns: Sequence[NM] = (TWO_OF_FOUR,)) -> list[Option]:
    """The options on a CPU: as transformers runs the model, by torch's dynamic int8 where this torch has it, and on
    castlm's kernels dense and n:m in `dtype` and in every rounded format.

    Args:
        dtype: "bf16", "fp16" or "fp32", for weights that are not rounded.
        patterns: n:m of the sparse options.
    """
    rounded = [name for name in rounded_formats() if FORMATS[name].runs_as]
    by_torch = "bf16" if dtype == "bf16" and has_fast_bf16() else "fp32"
    found = [Option(by_torch, head=by_torch, by_torch=True)]
    if has_dynamic_int8():
        found.append(Option("int8", head="int8", by_torch=True))
    for n, m in [(0, 0), *((pattern.n, pattern.m) for pattern in patterns)]:
        found += [Option(dtype, n, m, head=dtype), *(Option(values, n, m, head=DEFAULT_HEAD) for values in rounded)]
    return found


def has_dynamic_int8() -> bool:
    """Whether this torch multiplies fp32 activations by int8 weights, rounding the activations tensor by tensor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm", "onednn") and hasattr(torch, "quantize_per_channel")


def num_bytes(option: Option, shapes: Shapes, dtype: str) -> int:
    """Bytes of a model's weights in a file, without experts."""
    blocks = sum(count * option.spec(shape).num_bytes for shape, count in shapes.blocks.items())
    head = 0 if shapes.head is None else option.spec(shapes.head, is_head=True).num_bytes
    is_dynamic = option.by_torch and FORMATS[option.values].rounds  # of linear layers alone: the embedding stays fp32
    width = 4 if is_dynamic else FORMATS[option.values if option.by_torch else dtype].bits // 8
    embedding = 0  # which has the shape of the head
    if shapes.head is not None and is_dynamic:
        embedding = math.prod(shapes.head) * width
    elif shapes.head is not None and not shapes.is_tied:
        embedding = head
    return blocks + head + embedding + shapes.num_others * width


# ---- timing

Stored = PackedSpec | torch.dtype
"""A weight in the packed format for castlm's kernels, or a dtype for torch: int8 is its dynamic int8."""


@dataclass
class Load:
    """Tells from the timed thread whether other programs took the processor meanwhile."""

    wall: float = 0.0
    """Seconds of all measurements."""
    ran: float = 0.0
    """Seconds of them in which the thread ran: it takes part in every product, and waits only for other threads."""

    def add(self, wall: float, ran: float) -> None:
        """Adds a measurement."""
        self.wall, self.ran = self.wall + wall, self.ran + ran

    @property
    def note(self) -> list[str]:
        """What the figures are worth if other programs were running."""
        share = self.ran / self.wall if self.wall else 1.0
        if share >= _IDLE:
            return []
        return [
            f"Other programs used this processor: the timed thread ran {share:.0%} of the time. The speeds, above all "
            "those of torch, can be far off: run castlm advise again when the machine is idle."
        ]


@torch.no_grad()
def time_layer(
    stored: Collection[Stored], shape: Shape, rows: Sequence[int], seconds: float, load: Load
) -> dict[int, dict[Stored, float]]:
    """Times one layer in several formats, in turns A B A B; every call uses another copy of the weight.

    Args:
        stored: the formats.
        shape: of the weight.
        rows: numbers of input rows, each a separate measurement.
        seconds: time for each measurement, of at least three rounds.
        load: takes in the measurements.

    Returns:
        The least seconds of one multiplication, by number of rows and format.
    """
    share = min(1.0, _MAX_WEIGHTS / math.prod(shape))
    out = max(4, int(shape[0] * share) // 4 * 4) if share < 1 else shape[0]
    weights = {form: _cold_weights(form, (out, shape[1])) for form in stored}
    # One thread has a time of its own, in which what other programs take does not count.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    least: dict[int, dict[Stored, float]] = {}
    for num_rows in rows:
        x, times = torch.randn(num_rows, shape[1]), {form: list[float]() for form in weights}
        began, ran, number = time.perf_counter(), time.thread_time(), 0
        while number < _MIN_ROUNDS or time.perf_counter() - began < seconds:
            for form, copies in weights.items():
                count = max(1, math.ceil(len(copies) / num_rows / 2))  # fewer where the multiplications take longer
                chosen = [copies[(number * count + i) % len(copies)] for i in range(count)]
                started = clock()
                for multiply in chosen:
                    multiply(x)
                times[form].append((clock() - started) / count)
            number += 1
        load.add(time.perf_counter() - began, time.thread_time() - ran)
        # the first round warms up
        least[num_rows] = {form: min(found[1:]) * shape[0] / out for form, found in times.items()}
    return least


def _cold_weights(spec: Stored, shape: Shape) -> list[Callable[[Tensor], Tensor]]:
    """Functions that multiply x (tokens, in) by a random weight: enough copies to fill the caches."""
    rows, columns = shape
    if spec is torch.int8:
        weight = torch.randn(rows, columns)
        scales, zeros = weight.abs().amax(1).double() / 127, torch.zeros(rows, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's quantized tensors are to go
            codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        number = max(2, math.ceil(_COLD_BYTES / weight.numel()))
        packs = [torch.ops.quantized.linear_prepack(codes, None) for _ in range(number)]
        return [lambda x, weight=one: torch.ops.quantized.linear_dynamic(x, weight) for one in packs]  # type: ignore[misc]
    if isinstance(spec, torch.dtype):
        weight = torch.randn(rows, columns).to(spec)
        copies = [weight.clone() for _ in range(max(2, math.ceil(_COLD_BYTES / weight.nbytes)))]
        return [lambda x, weight=one: F.linear(x.to(weight.dtype), weight) for one in copies]  # type: ignore[misc]
    weight, form = torch.randn(rows, columns), FORMATS[spec.values]
    mask = nm_mask(weight, spec.n, spec.m) if spec.m else None
    if mask is not None:
        weight.masked_fill_(~mask, 0)
    if form.rounds:
        scales = torch.ones(rows, form.num_scales(columns))
        codes = weight.clamp(-1, 1).mul(form.largest).round().to(torch.int8)
        packed = pack_integers(codes, scales, spec.values, spec.n, spec.m, mask)
    else:
        packed = pack(weight.to(FLOATS[spec.values]), spec.n, spec.m)
    size = native.packed_bytes(spec.values, spec.n, spec.m, rows, columns)
    step = -(-size // 64) * 64  # aligned as in a model
    buffers = native.allocate(step * max(2, math.ceil(_COLD_BYTES / step))).view(-1, step)[:, :size]
    packed.repack_(buffers[0])
    buffers[1:] = buffers[0]
    return [lambda x, buffer=one: packed_linear(x, buffer, rows) for one in buffers]  # type: ignore[misc]


# ---- the ranking


@dataclass(frozen=True)
class Quality:
    """The perplexities of a model before rounding, as far as they are known."""

    dense: float | None = None
    sparse: float | None = None
    """After training to n:m."""
    source: str = ""
    """The source of the figures, in words."""
    pattern: Pattern | None = None
    """The pattern of `sparse`."""

    def of(self, option: Option, dtype: str) -> float | None:
        """The perplexity of an option; None for rounded weights."""
        return self.before_rounding(option) if option.values == dtype else None

    def before_rounding(self, option: Option) -> float | None:
        """The perplexity of the weights of an option before they are rounded."""
        if not option.is_sparse:
            return self.dense
        return self.sparse if self.pattern == NM(option.n, option.m) else None


@dataclass(frozen=True)
class Ranked:
    """One option for a model, measured."""

    option: Option
    seconds: Mapping[str, float]
    """Seconds of all linear layers and the head, by workload."""
    num_bytes: int
    perplexity: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Every option for a model on this CPU, the fastest for one token first."""

    device: str
    dtype: str
    rows: Sequence[Ranked]
    notes: Sequence[str] = field(default_factory=tuple)
    quality: Quality = Quality()
    file_bytes: int | None = None
    """Bytes of the GGUF file that the model comes from, whose speed is llama.cpp's and not timed; None without one."""
    load: Load = field(default_factory=Load)

    @property
    def workloads(self) -> list[str]:
        return list(self.rows[0].seconds)

    @property
    def base(self) -> Ranked:
        """The reference of all speeds: dense in `dtype` on castlm's kernels."""
        return next(row for row in self.rows if row.option == Option(self.dtype, head=self.dtype))

    def speedup(self, row: Ranked, workload: str) -> float:
        """The speed relative to `base`."""
        return self.base.seconds[workload] / row.seconds[workload]

    def best(self, sparse: bool, workload: str) -> Ranked:
        """The fastest dense or n:m row that needs no training with rounded weights. Among rows within the noise, the
        one with the longest groups, which loses the least quality, and of these the one with the fewest bytes.
        """
        rows = [row for row in self.rows if row.option.is_sparse == sparse and not row.option.by_torch]
        rows = [row for row in rows if not FORMATS[row.option.values].needs_training]
        least = min(row.seconds[workload] for row in rows)
        close = [row for row in rows if row.seconds[workload] <= NOTICEABLE * least]
        return min(close, key=lambda row: (-row.option.m, row.num_bytes))

    @property
    def verdict(self) -> str:
        """Up to three sentences: what to use for one sequence, where n:m does not pay, and where it does."""
        first, *many = self.workloads
        dense = self.best(False, first)
        text = (
            f"For {first}, use {dense.option.name}: it is {self.speedup(dense, first):.2f} times as fast as "
            f"{self.base.option.name} and takes {dense.num_bytes / 1e6:,.0f} MB"
        )
        if not any(row.option.is_sparse for row in self.rows):
            return f"{text}."
        sparse = self.best(True, first)
        known = self.quality.before_rounding(sparse.option)
        quality = f"but {dense.option.name} has the lower perplexity after a short recovery"
        if known is not None:
            dense_one = self.quality.dense
            against = "" if dense_one is None else f", against {dense_one:.2f} of the dense model"
            quality = f"with a perplexity of {known:.2f} before rounding{against}"
        text += (
            f"; {sparse.option.name} is {self.speedup(sparse, first):.2f} times as fast and takes "
            f"{sparse.num_bytes / 1e6:,.0f} MB, {quality}."
        )
        enough = "its perplexity" if known is None else f"a perplexity of {known:.2f}"
        won: list[str] = []  # workloads for which n:m is noticeably faster than dense
        lost: list[str] = []
        for workload in many:
            one, other = self.best(True, workload), self.best(False, workload)
            ratio = other.seconds[workload] / one.seconds[workload]
            words = f"for a {workload}, {one.option.name} is {ratio:.2f} times as fast as {other.option.name}"
            (won if ratio >= NOTICEABLE else lost).append(words)
        for found, use in (
            (lost, "it does not pay there"),
            (won, f"use it if that dominates the cost and {enough} is good enough"),
        ):
            if found:
                words = " and ".join(found)
                text += f" {words[0].upper()}{words[1:]}: {use}."
        return text

    @property
    def peers(self) -> str:
        """The fastest format of castlm against the fastest way of torch, for each workload."""
        ratios = []
        for workload in self.workloads:
            peer = min((row for row in self.rows if row.option.by_torch), key=lambda row: row.seconds[workload])
            kinds = {row.option.is_sparse for row in self.rows if not row.option.by_torch}
            best = min((self.best(kind, workload) for kind in kinds), key=lambda row: row.seconds[workload])
            ratio = peer.seconds[workload] / best.seconds[workload]
            ratios.append(f"{ratio:.2f} for {workload} ({best.option.name} against {peer.option.name})")
        return (
            "Compared with castlm's dense formats and with what torch runs here. Times as fast as the fastest of "
            f"torch: {', '.join(ratios)}. OpenVINO and llama.cpp were not timed: benchmarks/frontier.py times them "
            "where they are installed."
        )

    def as_dict(self) -> dict[str, Any]:
        """The ranking as plain JSON."""
        rows = [
            {
                **asdict(row),
                "name": row.option.name,
                "speedup": {name: self.speedup(row, name) for name in row.seconds},
            }
            for row in self.rows
        ]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "verdict": self.verdict,
            "peers": self.peers,
            "rows": rows,
            "file_bytes": self.file_bytes,
            "notes": [*self.load.note, *self.notes],
        }

    def text(self) -> str:
        """A table with the speeds relative to dense `dtype`, the verdict, and the conditions of the figures."""
        known = any(row.perplexity is not None for row in self.rows)
        table = [["format", "MB", *self.workloads, *(["perplexity"] if known else [])]]
        for row in self.rows:
            speeds = [f"{self.speedup(row, name):.2f}x" for name in self.workloads]
            line = [row.option.name, f"{row.num_bytes / 1e6:,.1f}", *speeds]
            if known:
                line.append("" if row.perplexity is None else f"{row.perplexity:.2f}")
            table.append(line)
        if self.file_bytes is not None:
            empty = ["" for _ in table[0][2:]]
            table.append(["your file, by llama.cpp (not timed)", f"{self.file_bytes / 1e6:,.1f}", *empty])
        source = [f"Perplexity before rounding: {self.quality.source}."] if known else []
        parts = [aligned(table), self.load.note, [self.verdict], [self.peers], [*self.notes, *source]]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)


def rank(
    shapes: Shapes,
    *,
    dtype: str = "bf16",
    patterns: Sequence[NM] = (TWO_OF_FOUR,),
    workloads: Mapping[str, int] = WORKLOADS,
    seconds: float = SECONDS,
    quality: Quality = Quality(),
    file_bytes: int | None = None,
    progress: Progress = silent,
) -> Ranking:
    """Times all linear layers of a model in every option on this CPU.

    Args:
        shapes: from `layer_shapes` or `shapes_of`.
        dtype: bf16, fp16 or fp32, for weights that are not rounded.
        patterns: n:m of the sparse options; without one, only dense options are compared.
        workloads: rows of a layer's input by name.
        seconds: total time for all shapes; each is timed in at least three rounds.
        quality: the perplexities that are known.
        file_bytes: as of `Ranking`.
        progress: called with (shapes done, in all).

    Raises:
        InputError: as `check_can_time`.
    """
    check_can_time(dtype)
    compared, load = options(dtype, patterns), Load()
    totals = time_options(compared, shapes, workloads, seconds, load, progress)
    ranked = [
        Ranked(option, totals[option], num_bytes(option, shapes, dtype), quality.of(option, dtype))
        for option in compared
    ]
    first = next(iter(workloads))
    notes = [
        *untimed_note(shapes.num_untimed),
        "int3 runs on the kernels of int4 and takes its memory, and needs training: castlm train --weight-bits 3.",
        "torch's dynamic int8 is a reference for speed: activations have one scale a tensor. SmolLM2-135M then has a "
        "perplexity of 127, where the unrounded model has 36.",
        f"Speed of the linear layers and the head, timed on {cpu_name()} (threads: {torch.get_num_threads()}), "
        "without attention, norms and caches.",
        "MB of the weights in a file. Perplexity against bytes and speed: docs/results/frontier.md.",
    ]
    return Ranking(
        cpu_name(), dtype, sorted(ranked, key=lambda row: row.seconds[first]), notes, quality, file_bytes, load
    )


def time_options(
    compared: Sequence[Option],
    shapes: Shapes,
    workloads: Mapping[str, int],
    seconds: float,
    load: Load,
    progress: Progress = silent,
) -> dict[Option, dict[str, float]]:
    """Seconds of all linear layers of a model in each option, by workload; see `rank`."""
    assert min(workloads.values()) >= 1
    totals = {option: dict.fromkeys(workloads, 0.0) for option in compared}
    parts = [(shape, count, False) for shape, count in shapes.blocks.items()]
    parts += [(shapes.head, 1, True)] if shapes.head else []
    for done, (shape, count, is_head) in enumerate(parts, 1):
        rows = {name: 1 if is_head and name.startswith("prompt") else number for name, number in workloads.items()}
        # By the timed product, so that a layer that several options multiply alike is timed once.
        specs = {o: o.spec(shape, is_head) for o in compared}
        timed = {
            o: FLOATS.get(o.values, torch.int8) if o.by_torch else replace(spec, values=FORMATS[spec.values].runs_as)
            for o, spec in specs.items()
        }
        distinct = sorted(set(rows.values()))
        found = time_layer(set(timed.values()), shape, distinct, seconds / len(parts) / len(distinct), load)
        for option in compared:
            for name, number in rows.items():
                totals[option][name] += count * found[number][timed[option]]
        progress(done, len(parts))
    return totals


def check_can_time(dtype: str) -> None:
    """Raises `InputError` if the kernels were not built, or `dtype` is not bf16, fp16 or fp32."""
    native.built()
    if dtype not in FLOATS:
        raise InputError(f"this CPU has no {dtype}: choose one of {', '.join(FLOATS)}")


def untimed_note(num_weights: int) -> list[str]:
    """The note on weights that are not timed, for a model that has some."""
    return [f"The {num_weights:,} weights of the experts are not in these figures."] if num_weights else []
