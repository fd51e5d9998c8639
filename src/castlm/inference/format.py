"""The packed file format, as a reader needs it who has neither torch nor transformers: names, shapes, metadata.

A packed tensor `X.weight` of shape (out, in) is stored in safetensors as
- `X.values`, (out, in / m * n): the kept values of each row in the order of their columns, exactly n of every m, as
  bf16, fp16, fp32 or int8; or uint8 (out, ceil(in / m * n / 2)) of int4, two's complement, the earlier value in the low
  half.
- `X.mask`, uint8 (out, ceil(in / 8)): bit i of byte j is column 8 j + i, 1 where a weight is kept, 0 past `in`.
- `X.scales`, of int8 fp32 (out, 1), of int4 bf16 (out, ceil(in / 64)): a value times its scale is the weight.
A dense quantized tensor has no mask. The order is the same for every processor; `native.repack_` makes the one in which
this processor reads.

The entry "castlm" of the file's metadata is JSON: {"version": 1, "tensors": {X: {"shape", "pattern", "values",
"transposed"}}}. A transposed tensor is one that transformers stores (in, out). A 3-D tensor that holds the matrices
of all experts of a block has "experts", their number, and the shape (experts * out, in); its X is its whole name, even
where that ends in `.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from castlm.core.errors import InputError

FILE = "castlm.safetensors"
"""The weight file of a packed folder. transformers does not look for this name: without castlm it finds no weights."""

INDEX = "castlm.safetensors.index.json"
"""Where there are several files, which one holds each tensor."""

VERSION = 1
METADATA_KEY = "castlm"
INT4_GROUP = 64
"""Columns that share a scale of int4."""

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "int8": "I8", "int4": "U8"}
"""safetensors' name of the dtype of `X.values`, by the name of the values."""

_MOST_COLUMNS = 2**31 - 1


@dataclass(frozen=True)
class PackedSpec:
    """What the metadata say of one packed tensor.

    Attributes:
        rows, columns: shape (out, in) of the weight.
        n, m: the pattern; both 0 of a dense quantized tensor.
        values: a key of DTYPES.
        transposed: whether the unpacked file stores the weight (in, out).
        experts: the number of experts whose matrices lie one below the other in `rows`; 0 of a single matrix.
    """

    rows: int
    columns: int
    n: int
    m: int
    values: str
    transposed: bool = False
    experts: int = 0

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """Of the tensor in the unpacked file."""
        rows = self.rows // self.experts if self.experts else self.rows
        matrix = (self.columns, rows) if self.transposed else (rows, self.columns)
        return (self.experts, *matrix) if self.experts else matrix

    def stem(self, tensor_name: str) -> str:
        """What the packed file calls the tensor that has the name `tensor_name` in the unpacked one."""
        return tensor_name if self.experts else tensor_name.removesuffix(".weight")

    def tensor_name(self, stem: str) -> str:
        """The opposite of `stem`: the name of the tensor in the unpacked file."""
        return stem if self.experts else f"{stem}.weight"

    @property
    def kept(self) -> int:
        """Values of a row."""
        return self.columns // self.m * self.n if self.m else self.columns

    def tensors(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """dtype and shape of the stored tensors, by suffix: "values", "mask", "scales"."""
        width = -(-self.kept // 2) if self.values == "int4" else self.kept
        stored = {"values": (DTYPES[self.values], (self.rows, width))}
        if self.m:
            stored["mask"] = ("U8", (self.rows, -(-self.columns // 8)))
        if self.values == "int8":
            stored["scales"] = ("F32", (self.rows, 1))
        if self.values == "int4":
            stored["scales"] = ("BF16", (self.rows, -(-self.columns // INT4_GROUP)))
        return stored

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": [self.rows, self.columns],
            "pattern": f"{self.n}:{self.m}" if self.m else None,
            "values": self.values,
            "transposed": self.transposed,
            **({"experts": self.experts} if self.experts else {}),
        }


def to_metadata(specs: Mapping[str, PackedSpec]) -> dict[str, str]:
    """The metadata of a file that holds the tensors of `specs`, by X."""
    tensors = {name: spec.as_dict() for name, spec in specs.items()}
    return {"format": "pt", METADATA_KEY: json.dumps({"version": VERSION, "tensors": tensors})}


def read_specs(files: Iterable[str | Path]) -> dict[str, PackedSpec]:
    """The packed tensors of some files, by X; none of files that castlm did not pack.

    Raises:
        InputError: a file that is not readable, metadata of another version or damaged, or stored tensors that are
            missing or of another shape or dtype than the metadata say.
    """
    specs: dict[str, PackedSpec] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                text = (opened.metadata() or {}).get(METADATA_KEY)
                if text is None:
                    continue
                found = _parse(text, file)
                for name, spec in found.items():
                    _check_stored(opened, name, spec, file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is corrupt or cut short ({error}): fetch it again") from error
        specs.update(found)
    return specs


def _parse(text: str, file: str | Path) -> dict[str, PackedSpec]:
    try:
        content = json.loads(text)
        version = content["version"]
        if version == VERSION:
            return {name: _spec(entry) for name, entry in content["tensors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"the castlm metadata of {file} are damaged: pack the model again") from error
    raise InputError(f"{file} is in packed format {version!r}, and this castlm reads {VERSION}: upgrade castlm")


def _spec(entry: Mapping[str, Any]) -> PackedSpec:
    rows, columns = entry["shape"]
    n, m = (int(number) for number in entry["pattern"].split(":")) if entry["pattern"] is not None else (0, 0)
    values, transposed = entry["values"], entry["transposed"]
    experts = entry.get("experts", 0)
    numbers = (rows, columns, n, m, experts)
    if not (all(type(number) is int for number in numbers) and type(transposed) is bool and values in DTYPES):
        raise ValueError
    if not (0 < rows <= _MOST_COLUMNS and 0 < columns <= _MOST_COLUMNS):
        raise ValueError
    if (m and (not 1 <= n < m or columns % m)) or (not m and (n or values not in ("int8", "int4"))):
        raise ValueError
    if experts < 0 or (experts and rows % experts):
        raise ValueError
    return PackedSpec(rows, columns, n, m, values, transposed, experts)


def _check_stored(opened: Any, name: str, spec: PackedSpec, file: str | Path) -> None:
    present = set(opened.keys())
    for suffix, (dtype, shape) in spec.tensors().items():
        if f"{name}.{suffix}" not in present:
            raise InputError(f"{file} lacks {name}.{suffix}: pack the model again")
        stored = opened.get_slice(f"{name}.{suffix}")
        if stored.get_dtype() != dtype or tuple(stored.get_shape()) != shape:
            found = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
            raise InputError(f"{name}.{suffix} in {file} is {found}, expected {dtype} {shape}: pack the model again")
