"""The numeric formats of weights.

`FORMATS` is the table. A new format whose rows share a scale is a record here: `rounding.round_rows` follows from it. A
format with other scales has a rounding of its own there, and one to multiply by has kernels (`Values` in
castlm_runtime/kernels/matrix.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A numeric format of weights.

    Attributes:
        name: its name in options and records.
        stored: safetensors' name of the dtype of the values in a file.
        bits: bits of a value.
        runs_as: the format of the kernels that multiply it: int3 is widened to int4 when it is loaded. Empty without
            kernels and without a packed form.
        scale: safetensors' name of the dtype of the scales; empty if the values are the weights themselves.
        group: columns of a row that share a scale; 0 is the whole row.
        largest: end of the rounding grid, in units of the scale.
        reads_text: whether its rounding is better with a calibration text.
        needs_training: whether rounding alone loses too much, so that a model is trained with rounded weights.
        of_tables: whether only an output head and an embedding take it, which are dense.
        of_gguf: whether only GGUF files hold it.
    """

    name: str
    stored: str
    bits: int
    runs_as: str
    scale: str = ""
    group: int = 0
    largest: float = math.inf
    reads_text: bool = False
    needs_training: bool = False
    of_tables: bool = False
    of_gguf: bool = False

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded to a grid with scales."""
        return bool(self.scale)

    def groups(self, columns: int) -> list[slice]:
        """The columns of each scale, in a row of `columns` weights."""
        width = self.group or columns
        return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]

    def num_scales(self, columns: int) -> int:
        """Scales of a row of `columns` weights."""
        return len(self.groups(columns))


FORMATS = {
    form.name: form
    for form in (
        Format("bf16", "BF16", 16, "bf16"),
        Format("fp16", "F16", 16, "fp16"),
        Format("fp32", "F32", 32, "fp32"),
        Format("int8", "I8", 8, "int8", "F32", largest=127),
        Format("int6", "U8", 6, "int6", "BF16", group=64, largest=31, reads_text=True, of_tables=True),
        Format("int4", "U8", 4, "int4", "BF16", group=64, largest=7, reads_text=True),
        Format("q4_0", "U8", 4, "", "F16", group=32, largest=7, reads_text=True, of_gguf=True),
        Format("int3", "U8", 3, "int4", "BF16", group=64, largest=3, reads_text=True, needs_training=True),
        Format("fp8", "F8_E4M3", 8, "", "F32", largest=448),
    )
}
ITEM_BYTES = {form.stored: max(8, form.bits) // 8 for form in FORMATS.values()}
"""Bytes of a stored item, by safetensors' name of its dtype."""
PACKABLE = tuple(form.name for form in FORMATS.values() if form.runs_as)
"""The formats that a packed file can hold."""
HEADS = tuple(name for name in PACKABLE if FORMATS[name].rounds and not FORMATS[name].needs_training)
"""The formats that an output head can be rounded to."""
DEFAULT_HEAD = "int6"
"""The one of head and embedding where the layers are integers, and head and embedding a large part of the file."""


def rounded_formats() -> tuple[str, ...]:
    """The formats that `castlm quantize` rounds layers to."""
    return tuple(form.name for form in FORMATS.values() if form.rounds and not (form.of_tables or form.of_gguf))
