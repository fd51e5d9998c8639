"""Says whether 2:4 pays off on the NVIDIA GPU of this machine: times each layer shape of a model, dense and 2:4.

As in `castlm.lab.advice.cpu`, the layers have the shapes of the model's config and random weights. Attention, norms and
caches are not timed. Nothing is predicted for a GPU that is not at hand: `docs/how-to/deploy.md` has published figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from castlm.core.errors import InputError
from castlm.core.nm import nm_mask
from castlm.dtypes import FLOATS
from castlm.lab.advice.cpu import NOTICEABLE, Shape, Shapes, untimed_note
from castlm.names import aligned
from castlm.packed.semi_structured import Backend, Cusparselt, race

DENSE, SPARSE = "dense", "2:4"
"""The two ways to multiply a layer, as `race` names them."""

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Row:
    """One layer shape, timed dense and 2:4."""

    shape: Shape
    count: int
    """Layers of this shape in the model."""
    seconds: Mapping[str, float]
    """Seconds of one layer, dense and 2:4. Equal if no 2:4 kernel takes the shape, which then stays dense."""

    @property
    def best(self) -> str:
        """The faster way; dense unless 2:4 is noticeably faster."""
        return SPARSE if self.seconds[DENSE] / self.seconds[SPARSE] >= NOTICEABLE else DENSE


@dataclass(frozen=True)
class GpuAdvice:
    """The answer for one model, GPU, dtype and number of tokens."""

    device: str
    dtype: str
    tokens: int
    rows: Sequence[Row]
    head_seconds: float
    """Seconds of the output head, which stays dense."""
    num_untimed: int
    """Weights of experts, which are not in the figures."""

    @property
    def totals(self) -> dict[str, float]:
        """Seconds of all layers and the head: all layers dense, all 2:4, and each layer the faster way ("mixed")."""
        totals = {way: sum(row.count * row.seconds[way] for row in self.rows) for way in (DENSE, SPARSE)}
        totals["mixed"] = sum(row.count * row.seconds[row.best] for row in self.rows)
        return {way: seconds + self.head_seconds for way, seconds in totals.items()}

    @property
    def speedup(self) -> float:
        """The speed relative to dense if every layer is 2:4."""
        return self.totals[DENSE] / self.totals[SPARSE]

    @property
    def mixed_speedup(self) -> float:
        """The speed relative to dense if each layer is dense or 2:4, as `to_semi_structured_` leaves it."""
        return self.totals[DENSE] / self.totals["mixed"]

    @property
    def verdict(self) -> str:
        """One sentence: whether to use 2:4 for speed."""
        whole, mixed = self.speedup, self.mixed_speedup
        where = f"at {self.tokens:,} token{'s' * (self.tokens > 1)} on {self.device}"
        if mixed < NOTICEABLE:
            kind = "slower than" if whole < 1 / NOTICEABLE else "no faster than"
            return f"Do not use 2:4 for speed {where}: the linear layers are {kind} dense ({whole:.2f}x)."
        if mixed > whole * 1.01:
            return f"Use 2:4 {where} in some layers only: {mixed:.2f}x of dense, {whole:.2f}x if all are 2:4."
        return f"Use 2:4 {where}: the linear layers run {whole:.2f}x as fast as dense."

    @property
    def notes(self) -> list[str]:
        """The conditions of the figures."""
        timed = f"Linear layers and head in {self.dtype}, timed on {self.device} in CUDA graphs with a cold cache"
        return [*untimed_note(self.num_untimed), f"{timed}; without attention, norms and caches."]

    def as_dict(self) -> dict[str, Any]:
        """The advice as plain JSON."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "speedup": self.speedup,
            "mixed_speedup": self.mixed_speedup,
            "rows": [{**asdict(row), "best": row.best} for row in self.rows],
            "notes": self.notes,
        }

    def text(self) -> str:
        """A table of the shapes, the verdict, and the conditions of the figures."""
        table = [["layer (out x in)", "layers", f"{self.dtype} us", SPARSE, "advice"]]
        for row in self.rows:
            dense, sparse = row.seconds[DENSE], row.seconds[SPARSE]
            shape = f"{row.shape[0]} x {row.shape[1]}"
            table.append([shape, str(row.count), f"{dense * 1e6:.1f}", f"{dense / sparse:.2f}x", row.best])
        table.append(["all, with a dense head", "", f"{self.totals[DENSE] * 1e6:.0f}", f"{self.speedup:.2f}x", ""])
        return "\n".join([*aligned(table), "", self.verdict, "", *self.notes])


def advise_on_gpu(shapes: Shapes, *, tokens: int, dtype: str = "bf16", backend: Backend | None = None) -> GpuAdvice:
    """Times every layer shape of a model on this machine's GPU, dense and 2:4.

    Args:
        shapes: from `layer_shapes` or `shapes_of`.
        tokens: rows of a layer's input at once: the batch size in decode, all tokens of the prompts in prefill.
        dtype: bf16 or fp16, in which the model is served now.
        backend: multiplies and times; default: `Cusparselt`.

    Raises:
        InputError: another dtype, or as `Cusparselt`.
    """
    assert tokens >= 1
    if dtype not in ("bf16", "fp16"):
        raise InputError(f"dtype {dtype}: a GPU is timed in bf16 and fp16, which have 2:4 kernels in torch")
    backend, device = (backend, torch.device("cpu")) if backend else (Cusparselt(CUDA), CUDA)
    name = torch.cuda.get_device_name() if device == CUDA else "a stub"

    def made(shape: Shape) -> tuple[nn.Linear, Tensor]:
        """A layer (out, in) of random weights, and an input (tokens, in) for it."""
        layer = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=FLOATS[dtype])
        return layer, torch.randn(tokens, shape[1], device=device, dtype=FLOATS[dtype])

    rows, head_seconds = [], 0.0
    with torch.no_grad():
        for shape, count in shapes.blocks.items():
            layer, x = made(shape)
            if shape[1] % 4 or backend.why_not(layer) is not None:
                found = backend.race({DENSE: layer}, x)
            else:
                layer.weight.masked_fill_(~nm_mask(layer.weight), 0)
                found, _ = race(layer, x, backend)
            rows.append(Row(shape, count, {DENSE: found[DENSE], SPARSE: found.get(SPARSE, found[DENSE])}))
        if shapes.head is not None:
            layer, x = made(shapes.head)
            head_seconds = backend.race({DENSE: layer}, x)[DENSE]
    return GpuAdvice(name, dtype, tokens, rows, head_seconds, shapes.num_untimed)
