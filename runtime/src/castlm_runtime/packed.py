"""The packed file format, readable without torch and transformers.

A packed tensor `X.weight` of shape (out, in) is stored in safetensors as
- `X.values`, (out, in / m * n): the kept values of each row in the order of their columns, exactly n of every m, as
  bf16, fp16, fp32 or int8; or as codes of int6, int4 or int3 in uint8 (out, ceil(in / m * n * bits / 8)): the codes of
  a row, in two's complement, follow each other without gaps from the lowest bit on, and a row begins at a byte.
- `X.mask`, uint8: which weights are kept. Where m is 2, 4 or 8, each group is a code: its number among the masks that
  keep n of m, in the order of the masks as binary numbers whose bit i is column i. A code has as few bits as the
  numbers need (3 at 2:4, 7 at 4:8, 5 at 6:8, 2 at 3:4); the codes of a row follow each other without gaps from the
  lowest bit on, and a row begins at a byte. For other m, bit i of byte j is column 8 j + i, and 0 past `in`.
- `X.scales`, fp32 (out, 1) for int8, bf16 (out, ceil(in / 64)) for int6, int4 and int3: weight = value * scale.
A dense tensor has no mask, and int6 is dense. The order is the same for every processor; `native.repack_` converts it
to the order in which this processor reads.

The entry "castlm" of the file's metadata is JSON: {"features": 5, "tensors": {X: {"shape", "pattern", "values",
"transposed"}}}. `features` are the bits of `Feature` that a reader must know. A transposed tensor is one that
transformers stores (in, out). A 3-D tensor that holds the matrices of all experts of a block has "experts", their
number, and the shape (experts * out, in); its X is its whole name, even where that ends in `.weight`.
"""

from __future__ import annotations

import enum
import functools
import itertools
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from castlm_runtime import library
from castlm_runtime.errors import InputError
from castlm_runtime.formats import FORMATS, ITEM_BYTES, PACKABLE
from castlm_runtime.stored import OpenFiles, StoredTensor

METADATA_KEY = "castlm"

_MAX_COLUMNS = 2**31 - 1
_OLD_VERSION = 2  # of files that have a number in place of features


class Feature(enum.IntFlag):
    """What a reader must know beside values of 8 bits and more, bit masks, and scales: the bits that a file names."""

    CODED_MASKS = 1
    INT3 = 2
    INT4 = 4
    INT6 = 8
    TRANSPOSED = 16
    EXPERTS = 32


@dataclass(frozen=True)
class PackedSpec:
    """The metadata of one packed tensor.

    Attributes:
        rows, columns: shape (out, in) of the weight.
        n, m: the pattern; both 0 for a dense tensor.
        values: a name of PACKABLE.
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

    @classmethod
    def of_stored(cls, shape: tuple[int, ...], axis: int, n: int, m: int, values: str) -> PackedSpec:
        """The spec of a tensor of the unpacked file, a matrix or those of all experts, whose input axis is `axis`."""
        transposed, experts = axis == len(shape) - 2, shape[0] if len(shape) == 3 else 0
        return cls(math.prod(shape) // shape[axis], shape[axis], n, m, values, transposed, experts)

    @property
    def pattern(self) -> str:
        """n:m, or "dense"."""
        return f"{self.n}:{self.m}" if self.m else "dense"

    @property
    def unpacked_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the unpacked file."""
        rows = self.rows // self.experts if self.experts else self.rows
        matrix = (self.columns, rows) if self.transposed else (rows, self.columns)
        return (self.experts, *matrix) if self.experts else matrix

    def stem(self, tensor_name: str) -> str:
        """The name in the packed file of the tensor `tensor_name` of the unpacked one."""
        return tensor_name if self.experts else tensor_name.removesuffix(".weight")

    def tensor_name(self, stem: str) -> str:
        """The name in the unpacked file; the opposite of `stem`."""
        return stem if self.experts else f"{stem}.weight"

    @property
    def kept(self) -> int:
        """Values of a row."""
        return self.columns // self.m * self.n if self.m else self.columns

    @property
    def rounded(self) -> bool:
        """Whether the values are integers with scales."""
        return FORMATS[self.values].rounds

    @property
    def features(self) -> Feature:
        """What a reader of this tensor must know."""
        needed = Feature(0)
        if self.m and 8 % self.m == 0:
            needed |= Feature.CODED_MASKS
        if FORMATS[self.values].bits < 8:
            needed |= Feature[self.values.upper()]
        if self.transposed:
            needed |= Feature.TRANSPOSED
        if self.experts:
            needed |= Feature.EXPERTS
        return needed

    def tensors(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """dtype and shape of the stored tensors, by suffix: "values", "mask", "scales"."""
        form = FORMATS[self.values]
        width = -(-self.kept * form.bits // 8) if form.bits < 8 else self.kept
        stored = {"values": (form.stored, (self.rows, width))}
        if self.m:
            # 2:4 has 6 masks, 3 bits a group, 6 for 8 columns: a quarter less than the 8 bits of a plain mask.
            bits = mask_bits(self.n, self.m)
            stored["mask"] = ("U8", (self.rows, -(-self._mask_bytes * bits // 8)))
        if form.rounds:
            stored["scales"] = (form.scale, (self.rows, form.num_scales(self.columns)))
        return stored

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.tensors().values())

    @property
    def _mask_bytes(self) -> int:
        return -(-self.columns // 8)

    def mask_to_bits(self, stored: np.ndarray) -> np.ndarray:
        """Decodes rows of the stored mask to bits: uint8 (rows, ceil(columns / 8)).

        An invalid code gives eight masked columns, so that its groups keep too few weights.
        """
        bits = mask_bits(self.n, self.m)
        if bits == 8:
            return stored
        mask: np.ndarray = _mask_tables(self.n, self.m)[0][split_codes(stored, bits, self._mask_bytes)]
        if self.columns % 8:  # the code 0 of the columns past the last one is a mask too
            mask[:, -1] &= (1 << self.columns % 8) - 1
        return mask

    def mask_to_stored(self, mask: np.ndarray) -> np.ndarray:
        """Encodes a mask of bits, uint8 (rows, ceil(columns / 8)), that keeps exactly n of every m, as stored."""
        bits = mask_bits(self.n, self.m)
        return mask if bits == 8 else join_codes(_mask_tables(self.n, self.m)[1][mask], bits)

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": [self.rows, self.columns],
            "pattern": self.pattern if self.m else None,
            "values": self.values,
            "transposed": self.transposed,
            **({"experts": self.experts} if self.experts else {}),
        }


def join_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Stores rows of codes, uint8 below 2^bits, without gaps from the lowest bit on.

    Returns:
        uint8 (rows, ceil(width * bits / 8)).
    """
    rows, width = codes.shape
    eights = np.pad(codes, ((0, 0), (0, -width % 8))).reshape(rows, -1, 8)  # eight codes fill `bits` bytes
    # Eight codes of 6 bits are one number of 48 bits, of which the lowest six bytes are stored.
    words = np.zeros(eights.shape[:2], "<u8")
    for k in range(8):
        words |= eights[:, :, k].astype(np.uint64) << np.uint64(k * bits)
    stored = words[:, :, None].view(np.uint8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(stored[:, : -(-width * bits // 8)])


def split_codes(stored: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The opposite of `join_codes`: uint8 (rows, width)."""
    rows, eights = len(stored), -(-width // 8)
    padded = np.pad(stored, ((0, 0), (0, eights * bits - stored.shape[1])))
    codes = np.zeros((rows, eights, 8), np.uint8)
    codes[:, :, :bits] = padded.reshape(rows, eights, bits)
    words = codes.view("<u8")[:, :, 0].copy()
    for k in range(8):
        codes[:, :, k] = (words >> np.uint64(k * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :width])


def mask_bits(n: int, m: int) -> int:
    """Stored bits for the mask of 8 columns; 8 if m does not divide 8, since the mask is then not coded."""
    return 8 // m * (math.comb(m, n) - 1).bit_length() if 8 % m == 0 else 8


@functools.cache
def _mask_tables(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask of 8 columns by the codes of their groups, the first group in the lowest bits (2:4 has 64 entries), and
    the codes by the mask (256,).

    An invalid code has the mask 0. Groups past the last column keep nothing, and have the code 0.
    """
    masks = [mask for mask in range(1 << m) if mask.bit_count() == n]
    bits, most = (len(masks) - 1).bit_length(), 8 // m
    mask_of, code_of = np.zeros(1 << mask_bits(n, m), np.uint8), np.zeros(256, np.uint8)
    for count in range(1, most + 1):
        for numbers in itertools.product(range(len(masks)), repeat=count):
            code = sum(number << i * bits for i, number in enumerate(numbers))
            mask = sum(masks[number] << i * m for i, number in enumerate(numbers))
            code_of[mask] = code
            if count == most:
                mask_of[code] = mask
    return mask_of, code_of


def to_metadata(specs: Mapping[str, PackedSpec]) -> dict[str, str]:
    """The metadata of a file that holds the tensors of `specs`, by X."""
    tensors = {name: spec.as_dict() for name, spec in specs.items()}
    features = functools.reduce(operator.or_, (spec.features for spec in specs.values()), Feature(0))
    return {"format": "pt", METADATA_KEY: json.dumps({"features": int(features), "tensors": tensors})}


def read_specs(tensors: Mapping[str, StoredTensor]) -> dict[str, PackedSpec]:
    """The specs of the packed tensors of some files, by X; none for files that castlm did not pack.

    Args:
        tensors: all tensors of the files, by name.

    Raises:
        InputError: damaged metadata or unknown features, stored tensors that are missing or differ from the metadata in
            shape or dtype, parts that the metadata do not name, or a tensor stored plain too.
    """
    specs: dict[str, PackedSpec] = {}
    file = None
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        of_file = {} if text is None else _parse(text, file)
        for stem, spec in of_file.items():
            for suffix, (dtype, shape) in spec.tensors().items():
                part = tensors.get(f"{stem}.{suffix}")
                is_here = part is not None and part.file == file
                stored = f"{part.dtype} {part.shape}" if part is not None and is_here else "missing"
                if stored != f"{dtype} {shape}":
                    raise InputError(
                        f"{stem}.{suffix} of {file} is {stored}, not {dtype} {shape}: pack the model again"
                    )
        specs |= of_file
    known = {f"{stem}.{suffix}" for stem, spec in specs.items() for suffix in spec.tensors()}
    unnamed = {name for name in tensors.keys() - known if name.endswith((".values", ".mask", ".scales"))}
    plain_too = {spec.tensor_name(stem) for stem, spec in specs.items()} & tensors.keys()
    if specs and (wrong := unnamed | plain_too):
        raise InputError(f"the castlm metadata of {file} do not agree with {min(wrong)} in it: pack the model again")
    return specs


def _parse(text: str, file: Path) -> dict[str, PackedSpec]:
    try:
        content = json.loads(text)
        version, features = content.get("version", _OLD_VERSION), content.get("features", 0)
        unknown = features & ~int(~Feature(0)) if type(features) is int and features >= 0 else features
        if version == _OLD_VERSION and unknown == 0:
            return {name: _spec(entry) for name, entry in content["tensors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"the castlm metadata of {file} are damaged: pack the model again") from error
    found = f"features {unknown!r:.40}" if version == _OLD_VERSION else f"the version {version!r:.40}"
    raise InputError(
        f"{file} has {found} of the packed format, which this castlm does not know: use a newer castlm-runtime, or "
        "write it again with castlm pack"
    )


def _spec(entry: Mapping[str, Any]) -> PackedSpec:
    rows, columns = entry["shape"]
    n, m = (int(number) for number in entry["pattern"].split(":")) if entry["pattern"] is not None else (0, 0)
    values, transposed = entry["values"], entry["transposed"]
    experts = entry.get("experts", 0)
    is_typed = all(type(number) is int for number in (rows, columns, n, m, experts)) and type(transposed) is bool
    if not (
        is_typed
        and values in PACKABLE
        and 0 < rows <= _MAX_COLUMNS
        and 0 < columns <= _MAX_COLUMNS
        and (1 <= n < m and columns % m == 0 and not FORMATS[values].of_tables if m else n == 0)
        and (experts == 0 or (experts > 0 and rows % experts == 0))
    ):
        raise ValueError
    return PackedSpec(rows, columns, n, m, values, transposed, experts)


@dataclass(frozen=True)
class PackedArray:
    """The stored tensors of a packed weight as arrays, bf16 as uint16 bits; see the module for shapes."""

    spec: PackedSpec
    values: np.ndarray
    mask: np.ndarray | None = None
    scales: np.ndarray | None = None

    @classmethod
    def read(cls, spec: PackedSpec, parts: Mapping[str, StoredTensor], files: OpenFiles) -> PackedArray:
        """The stored tensors of a file, by suffix."""
        arrays = {suffix: read_array(part, files) for suffix, part in parts.items()}
        return cls(spec, arrays["values"], arrays.get("mask"), arrays.get("scales"))

    def take(self, rows: np.ndarray) -> PackedArray:
        """Some of its rows, by number."""
        arrays = (None if array is None else array[rows] for array in (self.values, self.mask, self.scales))
        values, mask, scales = arrays
        assert values is not None
        return PackedArray(replace(self.spec, rows=len(rows), experts=0), values, mask, scales)

    @property
    def scales_fp32(self) -> np.ndarray | None:
        """The scales, exactly, in fp32."""
        return None if self.scales is None else to_fp32(self.scales, FORMATS[self.spec.values].scale)

    @property
    def values_to_multiply(self) -> np.ndarray:
        """The values in the format of the kernels: int3 widened to int4."""
        form = FORMATS[self.spec.values]
        kernel = FORMATS[form.runs_as]
        if kernel is form:
            return np.ascontiguousarray(self.values)
        codes = split_codes(self.values, form.bits, self.spec.kept)
        sign = 1 << form.bits - 1
        extended = (codes ^ sign) - sign  # 0b100 of int3 is -4, 0b1100 of int4; wraps in uint8
        return join_codes(extended.astype(np.uint8) & ((1 << kernel.bits) - 1), kernel.bits)

    def check_finite(self) -> None:
        """Raises `InputError` if a value holds NaN or infinity, or an integer times its scale may."""
        scales = self.scales_fp32
        if scales is not None:
            floats = scales * np.float32(FORMATS[self.spec.values].largest + 1)
        else:
            floats = to_fp32(self.values, FORMATS[self.spec.values].stored)
        if not np.isfinite(floats).all():
            raise InputError("a packed weight holds NaN or infinity: the model is damaged")

    @property
    def repacked_bytes(self) -> int:
        """Bytes of the buffer that `repack_` fills."""
        spec = self.spec
        return library.packed_bytes(spec.values, spec.n, spec.m, spec.rows, spec.columns)

    def repack_(self, buffer: np.ndarray, threads: int) -> None:
        """Writes the weight to `buffer`, uint8 (repacked_bytes,), in the order in which this processor reads it.

        Raises:
            InputError: a mask that does not keep exactly n of every m, or a value that is not finite.
        """
        spec = self.spec
        self.check_finite()
        values, scales = self.values_to_multiply, self.scales_fp32
        mask = None if self.mask is None else np.ascontiguousarray(spec.mask_to_bits(self.mask))
        library.repack(
            (library.address(buffer), len(buffer)),
            (library.address(values), values.nbytes),
            (library.address(mask), 0 if mask is None else mask.nbytes),
            (library.address(scales), 0 if scales is None else scales.size),
            spec.values,
            spec.n,
            spec.m,
            (spec.rows, spec.columns),
            threads,
        )

    def columns(self, begin: int, end: int) -> PackedArray:
        """Some of its columns.

        Raises:
            InputError: the columns begin or end inside a group of the pattern, or of the scales.
        """
        spec, form = self.spec, FORMATS[self.spec.values]
        for step in filter(None, (spec.m, form.group)):
            if begin % step or (end % step and end != spec.columns):
                raise InputError(f"columns {begin} to {end} cannot be taken, for {step} of them belong together")
        part = replace(spec, columns=end - begin)
        kept = slice(begin // spec.m * spec.n, end // spec.m * spec.n) if spec.m else slice(begin, end)
        if form.bits < 8:
            values = join_codes(split_codes(self.values, form.bits, spec.kept)[:, kept], form.bits)
        else:
            values = self.values[:, kept]
        mask = None
        if self.mask is not None:
            bits = np.unpackbits(spec.mask_to_bits(self.mask), axis=1, bitorder="little")[:, begin:end]
            mask = part.mask_to_stored(np.packbits(bits, axis=1, bitorder="little"))
        scales = self.scales
        if scales is not None and form.group:
            scales = scales[:, begin // form.group : -(-end // form.group)]
        return PackedArray(part, values, mask, scales)


def read_array(tensor: StoredTensor, files: OpenFiles) -> np.ndarray:
    """A tensor of a file; bf16 as uint16 bits."""
    return files.read_bytes(tensor).view(_NUMPY[tensor.dtype]).reshape(tensor.shape)


def to_fp32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floats of a file in fp32; `dtype` is safetensors' name of theirs, since numpy has no bf16."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}
"""numpy's dtypes of stored tensors that the engine reads."""
