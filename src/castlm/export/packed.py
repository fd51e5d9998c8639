"""`castlm pack` and `castlm unpack`: convert between a plain model folder, with zeros, and a packed one without.

One tensor is in memory at a time. The plain folder stays the canonical result. Tensors are written in the order of
their names in the plain folder, so that packing, unpacking and packing again gives the same file.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from castlm import __version__
from castlm.core.blocks import is_block_linear, owners_of_experts, why_dense
from castlm.core.errors import InputError, naming
from castlm.core.nm import NM, Pattern, is_nm_sparse
from castlm.dtypes import FLOATS, STORED, STORED_NAMES, dtype_name
from castlm.export.card import packed_card, unpacked_card
from castlm.export.folder import (
    StoredUse,
    check_layers,
    check_redirections,
    is_packed,
    left_dense_reason,
    read_config,
    read_facts,
    recorded_pattern,
    stored_tensors,
)
from castlm.export.hf import export_model
from castlm.export.loads import check_loads
from castlm.export.origin import origin_of
from castlm.export.verify import Packed, check_dense, check_ok, check_order, take_packed, verify
from castlm.facts import SCHEMA_VERSION, Facts, Packing
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import atomic_dir, refuse_undecodable
from castlm.files.record import OUTPUT, RESULT
from castlm.files.weights import Batch, Layout, file_names, write_weights
from castlm.formats.rounding import Rounded, on_grid, round_table
from castlm.models.architecture import embedding_weight, output_head, shape_model
from castlm.models.gguf import correlation_of_tables, forget_gguf, is_head_finer
from castlm.models.io import load_model, open_config, some_of
from castlm.models.locate import cached_snapshot, local_folder, locate
from castlm.models.stored_layout import StoredLayout
from castlm.models.weights import PACKED_NOTICE, names_no_weights
from castlm.packed.layers import can_pack_tables
from castlm.packed.tensor import (
    PackedTensor,
    cast_weight,
    kept_mask,
    pack,
    pack_integers,
    read_packed,
    read_tensor,
    unpack,
)
from castlm.patterns import DENSE, parse_pattern
from castlm.progress import note
from castlm.say import Progress, Say, silent
from castlm_runtime.formats import DEFAULT_HEAD, FORMATS, HEADS, ITEM_BYTES
from castlm_runtime.packed import PackedSpec, to_metadata
from castlm_runtime.stored import INDEX, PACKED_INDEX, PACKED_SINGLE, QUANT_METHOD, SINGLE, StoredTensor

_SAME_TABLE = 0.95  # of two roundings of one table, the correlation at least; of two tables of a model, far below
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".bin.index.json")


@dataclass(frozen=True)
class PackReport:
    """The result of `pack_folder`."""

    num_packed: int
    """The number of tensors in the packed format."""
    bytes_before: int
    bytes_after: int
    """The bytes of the weight files."""
    pattern: NM | None
    """The n:m that was verified; None for a dense model."""


def pattern_of(name: str | Path, given: Pattern | str | None) -> Pattern | None:
    """The pattern of a model: the given one, else the one in its castlm.json, else 2:4 if its first layer is 2:4.

    Args:
        given: a pattern, or "dense".
    """
    if given is not None:
        return given if isinstance(given, Pattern) else None
    where = locate(name, needs_weights=False)
    folder = cached_snapshot(where.target, None) if where.is_hub else Path(where.target)
    if folder is None or where.gguf:
        return None
    facts = read_facts(folder)
    if facts.pattern is not None or facts.schema_version is not None:  # else castlm did not write the file
        return recorded_pattern(facts)
    stored = stored_tensors(folder, read_config(folder))
    first = next((tensor for name, tensor in stored.items() if is_block_linear(name, tensor.shape)), None)
    if first is None or first.shape[1] % 4:
        return None
    weight = read_tensor(first)
    return NM(2, 4) if weight.is_floating_point() and is_nm_sparse(weight, 2, 4) else None


def groups_of(name: str | Path, pattern: Pattern | None) -> NM | None:
    """The n:m pattern that the packed or rounded weights of a model keep; None for a dense model."""
    if pattern is not None and not isinstance(pattern, NM):
        raise InputError(f"{name} is {pattern}, which has no n:m to keep: pass --pattern n:m, or dense")
    return pattern


@contextlib.contextmanager
def naming_instead(temporary: Path, named: str | Path) -> Iterator[None]:
    """Puts a path that a user knows in the place of a temporary folder, in the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), str(named))) from error


# ---- packing


def pack_folder(
    source: str | Path,
    folder: str | Path,
    pattern: Pattern | str | None = "2:4",
    *,
    dtype: str | None = None,
    head: str | None = None,
    hessian: Tensor | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = silent,
) -> PackReport:
    """Writes the n:m or dense model in `source` to `folder` in the packed format, and verifies what was written.

    Every linear layer inside the transformer blocks is packed: as n:m, or as a dense matrix if castlm.json lists it as
    left dense or the whole model is dense. Layers that were rounded to int4 or int3, in training or by `quantize`, are
    stored as codes and scales. The other tensors are copied. Each packed tensor of floats is unpacked again and
    compared before it is written. What was written is loaded in a fresh process.

    Args:
        source: a model folder in safetensors (the result has as many files); or a hub id, a GGUF file or "demo".
        folder: the output.
        pattern: n:m; None for a dense model.
        dtype: "bf16", "fp16" or "fp32" casts all floating-point tensors first; None keeps their dtype.
        head: "int8" (a scale for each row), "int6" or "int4" (a scale for each 64 columns) rounds the output head and
            the embedding, tied or not; "source" keeps them. None is int6 where the layers are integers and the tables
            more than a tenth of the file, otherwise source.
        hessian: of the output head's input, by which int6 and int4 are rounded, from `castlm.export.head.head_hessian`;
            None rounds them to the nearest.
        overwrite: replace an earlier result in `folder`.
        progress: called with (tensors done, tensors in all).
        say: called with a line about the head where None chooses.

    Returns:
        How many tensors were packed, and the bytes of the weight files before and after.

    Raises:
        InputError: no model there, already packed or quantized, a layer that is not n:m or holds NaN, `folder` taken,
            or the disk full. `folder` is then as it was.
    """
    with (
        atomic_dir(folder, overwrite) as temporary,
        naming_instead(temporary, folder),
        _model_folder(source, temporary) as place,
    ):
        groups = groups_of(source, None if pattern is None else parse_pattern(pattern))
        return pack_into(temporary, place, groups, dtype=dtype, head=head, hessian=hessian, progress=progress, say=say)


@contextlib.contextmanager
def _model_folder(name: str | Path, within: Path) -> Iterator[Path]:
    """The folder of a model in safetensors; a GGUF file is converted to a temporary one."""
    where = locate(name, needs_weights=False)
    if not where.gguf:
        yield local_folder(name)
        return
    place = within / ".plain" / Path(where.source).name
    _dequantize(name, place)
    yield place
    shutil.rmtree(place.parent)


def _dequantize(name: str | Path, folder: str | Path, overwrite: bool = False, tie: bool = False) -> int:
    """Writes the model of a GGUF file as a plain folder; returns the number of its tensors."""
    note(f"dequantizing {name}")
    loaded, where = load_model(name, dtype=None), locate(name)
    file = Path(where.target) / where.gguf["gguf_file"]
    correlation = correlation_of_tables(file)
    is_twice = correlation is not None and correlation >= _SAME_TABLE
    if tie and not is_twice:
        found = "one of them alone" if correlation is None else f"two with the correlation {correlation:.3f}"
        raise InputError(
            f"--tie is for one table that is stored twice, as embedding and as output head, and {name} has {found}: "
            "leave it out"
        )
    if is_twice and not tie:
        note(
            f"{name} holds one table twice, as embedding and as output head, each rounded (correlation "
            f"{correlation:.4f}): --tie keeps the finer one for both"
        )
    if tie:
        table, head = embedding_weight(loaded.model), output_head(loaded.model).weight
        if is_head_finer(file):
            table.data.copy_(head.data)
        loaded.model.config.tie_word_embeddings = True
        loaded.model.tie_weights()
    forget_gguf()
    export_model(
        loaded.model,
        loaded.tokenizer,
        folder,
        pattern=None,
        left_dense={},
        record=Facts(pattern=None, left_dense={}, **vars(origin_of(name))),
        overwrite=overwrite,
        dtype=loaded.dtype,
    )
    return len(loaded.model.state_dict())


def pack_into(
    folder: Path,
    source: Path,
    pattern: NM | None,
    *,
    dtype: str | None = None,
    head: str | None = None,
    integers: Mapping[str, Rounded] | None = None,
    hessian: Tensor | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> PackReport:
    """`pack_folder` into an existing empty folder.

    Args:
        integers: codes and scales to store instead of the weights, by the name of the layer in the files; the weights
            in `source` are their products.
        hessian: as of `pack_folder`.
    """
    config, rounded = read_config(source), integers or {}
    if config.get("quantization_config"):
        raise InputError(f"{source} is packed or quantized already: give the model that was")
    check_redirections(source, config)
    stored = dict(sorted(stored_tensors(source, config).items()))
    specs, copied = _specs(source, stored, check_layers(source, stored, config), pattern, dtype, rounded)
    if copied:
        say(f"{len(copied)} weights, {some_of(copied)}, stay floats: no packed layer can multiply in the model's place")
    tables: dict[str, bool] = {}
    if head is None:
        head, tables = DEFAULT_HEAD, _large_tables(source, stored, specs, say)
    elif head in HEADS:
        tables = _tables(source, stored)
    for table in tables:
        rows, columns = stored[table].shape  # (49152, 576)
        specs[table] = PackedSpec(rows, columns, 0, 0, head)
    cast = None if dtype is None else FLOATS[dtype]
    how = _Packing(
        stored, specs, rounded, {name: hessian if is_head else None for name, is_head in tables.items()}, cast
    )
    # one tensor of the model in memory at a time
    weights = _write_weights(folder, how, (PACKED_SINGLE, PACKED_INDEX), progress)
    # config.json comes after the weights that it names, and the checks read what has been written
    _write_packed_rest(source, folder, weights, pattern, cast, head if tables else None)
    if pattern is None:
        check_dense(folder)
    else:
        check_ok(verify(folder, pattern, allow_dense=1.0))
    check_loads(folder)
    before = sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()})
    after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return PackReport(len(specs), before, after, pattern)


@dataclass(frozen=True)
class _Packing:
    """Converts the tensors of a plain folder to the packed format."""

    stored: Mapping[str, StoredTensor]
    specs: Mapping[str, PackedSpec]
    """The specs of the tensors to pack; the others are copied."""
    rounded: Mapping[str, Rounded]
    """Codes and scales to store in place of weights, by the name of the layer."""
    tables: Mapping[str, Tensor | None]
    """The tensors among `specs` that are head or embedding, each with the Hessian of its input if it has one."""
    cast: torch.dtype | None
    """The dtype of all floating-point tensors; None keeps theirs."""

    def layout(self, name: str) -> Layout:
        if (spec := self.specs.get(name)) is not None:
            # up_proj.values (1536, 288), up_proj.mask (1536, 54) at 2:4
            return {f"{spec.stem(name)}.{suffix}": entry for suffix, entry in spec.tensors().items()}
        of = self.stored[name]
        is_cast = self.cast is not None and STORED[of.dtype].is_floating_point
        return {name: (STORED_NAMES[self.cast] if self.cast is not None and is_cast else of.dtype, of.shape)}

    def tensors(self, name: str) -> Iterable[Tensor]:
        tensor, spec = read_tensor(self.stored[name]), self.specs.get(name)
        with naming(name):
            # cast first, so that the mask is made of the values that are stored
            if self.cast is not None and tensor.is_floating_point():
                tensor = cast_weight(tensor, self.cast)
            if spec is None:
                return [tensor]
            rounded = self.rounded.get(spec.stem(name))
            if name in self.tables:
                rounded = round_table(tensor, spec.values, self.tables[name])
            return _packed(spec, tensor, rounded).tensors().values()

    def metadata(self, names: Iterable[str]) -> dict[str, str]:
        specs = {name: self.specs[name] for name in names if name in self.specs}
        return to_metadata({spec.stem(name): spec for name, spec in specs.items()})


def _specs(
    source: Path,
    stored: Mapping[str, StoredTensor],
    uses: Mapping[str, StoredUse],
    pattern: NM | None,
    dtype: str | None,
    integers: Mapping[str, Rounded],
) -> tuple[dict[str, PackedSpec], list[str]]:
    """The specs of the tensors to pack, by name: all linear layers inside the transformer blocks.

    A layer by whose weight other code multiplies, as Mamba's does, or that is stored in one tensor with others, is
    copied: its name is in the second result.
    """
    facts = read_facts(source)
    left_dense, grid = facts.left_dense, None if integers else _grid_of(facts)
    specs: dict[str, PackedSpec] = {}
    copied: list[str] = []
    owners = owners_of_experts(use.parameter for use in uses.values())
    for name, tensor in stored.items():
        use = uses.get(name)
        is_layer = use is not None and why_dense(use.parameter.removesuffix(".weight"), owners) is None
        is_packed_here = is_layer and use is not None and use.can_pack
        if tensor.dtype not in STORED or (is_packed_here and dtype is None and _float_name(tensor) is None):
            raise InputError(f"{name} of {source} is stored as {tensor.dtype}: pass dtype bf16 to cast a wider one")
        if is_layer and use is not None and use.axis is not None and not use.can_pack:
            copied.append(name)
        if not is_packed_here or use is None or use.axis is None:
            continue
        groups = pattern if left_dense_reason(name, left_dense) is None else None
        n, m = (groups.n, groups.m) if groups else (0, 0)
        spec = PackedSpec.of_stored(tensor.shape, use.axis, n, m, values="")
        rounded = integers.get(spec.stem(name))
        # Codes that `quantize` hands over, then those that the weights are multiples of, then the dtype.
        specs[name] = replace(spec, values=rounded.kind if rounded else grid or dtype or str(_float_name(tensor)))
    if not specs:
        raise InputError(f"{source} has no linear layer inside transformer blocks to pack")
    return specs, copied


def _grid_of(facts: Facts) -> str | None:
    """int4 or int3 where the weights are codes times scales of groups: rounded in training, or by `quantize`."""
    if facts.rounded is not None:
        return facts.rounded.kind
    form = FORMATS.get(facts.quantized.kind) if facts.quantized is not None else None
    return form.name if form is not None and form.group and form.runs_as else None


def _float_name(tensor: StoredTensor) -> str | None:
    return next((name for name in FLOATS if FORMATS[name].stored == tensor.dtype), None)


_LARGE_SHARE = 0.1  # of a file


def _large_tables(
    source: Path, stored: Mapping[str, StoredTensor], specs: Mapping[str, PackedSpec], say: Say
) -> dict[str, bool]:
    """`_tables` where the layers are integers and the tables more than a tenth of the file; otherwise none."""
    if not any(spec.rounded for spec in specs.values()):
        return {}

    def plain_bytes(names: Iterable[str]) -> int:
        return sum(math.prod(stored[name].shape) * ITEM_BYTES.get(stored[name].dtype, 4) for name in names)

    try:
        tables = _tables(source, stored)
    except InputError:
        return {}
    packed = sum(spec.num_bytes for spec in specs.values())
    share = plain_bytes(tables) / (plain_bytes(stored.keys() - specs.keys()) + packed)
    if share <= _LARGE_SHARE:
        return {}
    say(f"head and embedding, {share:.0%} of the file, become {DEFAULT_HEAD}: --head source keeps them as they are")
    return tables


def _tables(source: Path, stored: Mapping[str, StoredTensor]) -> dict[str, bool]:
    """The names of the weights of output head and embedding, which are plain tables, and whether each is the head's.

    One name where they are tied.
    """
    opened = open_config(source)
    model = shape_model(opened)
    tables = [module for module in (model.get_output_embeddings(), model.get_input_embeddings()) if module is not None]
    is_plain = can_pack_tables(model)
    paths = {module: path for path, module in model.named_modules() if module in tables}
    stored_names, layout = [], StoredLayout(model)
    for module in tables if is_plain else ():
        names = layout.to_stored({f"{paths[module]}.weight": module.get_parameter("weight")})
        possible = itertools.chain(*map(layout.possible_names, names))
        # DeepSeek-V4 renames `head.weight` alone: `head.values` would find no place.
        places = layout.possible_names(paths[module])
        loads = [name for name in possible if layout.loaded_name(name.removesuffix(".weight")) in places]
        stored_names += [name for name in loads if name in stored][:1]
    has_own = len(set(stored_names)) > 1 or getattr(tables[0], "bias", None) is not None
    if not stored_names or (opened.tie_word_embeddings and has_own):
        raise InputError(
            f"{source} stores {' and '.join(stored_names) or 'no plain head'}, and --head is for a head and an "
            "embedding that look up and multiply alone, and are one table without a bias where config.json ties them: "
            "leave --head out"
        )
    return {name: name == stored_names[0] for name in stored_names}


def _packed(spec: PackedSpec, tensor: Tensor, rounded: Rounded | None) -> PackedTensor:
    # (in, out) -> (out, in), and the matrices of 4 experts one below the other: (4, 96, 32) -> (384, 32)
    weight = (tensor.mT if spec.transposed else tensor).reshape(spec.rows, spec.columns).contiguous()
    if not spec.rounded:
        packed = replace(pack(weight, spec.n, spec.m), spec=spec)
        # The proof for each tensor, before it is written; 0.0 and -0.0 are equal here.
        assert not spec.m or torch.equal(unpack(packed), weight), "it does not come back from its packed form"
        return packed
    if rounded is None:
        rounded = on_grid(weight, spec.values)
    # Of the codes, because integers cannot keep the sign of a zero: so packing again gives the same mask.
    mask = kept_mask(rounded.codes, spec.n, spec.m) if spec.m else None
    return replace(pack_integers(rounded.codes, rounded.scales, spec.values, spec.n, spec.m, mask), spec=spec)


def _write_packed_rest(
    source: Path, folder: Path, weights: str, pattern: NM | None, cast: torch.dtype | None, head: str | None
) -> None:
    """Writes all files of a packed folder except the weights, with the packing in config.json and castlm.json.

    Args:
        weights: name of the weight file, or of the index of several.
        cast: the dtype that all weights were cast to.
        head: the format of output head and embedding.
    """
    name = DENSE if pattern is None else str(pattern)
    config = read_config(source)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "pattern": name,
        "weights": weights,
    }
    config["transformers_weights"] = PACKED_NOTICE
    if cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(cast)
    facts = read_facts(source)
    if pattern is None:
        facts = replace(facts, pattern=None, proof=None)  # the card names a pattern
    else:
        recorded = recorded_pattern(facts) or pattern
        is_counted = recorded == pattern  # by `verify`, in a packed folder
        facts = replace(facts, pattern=str(recorded if is_counted else pattern))
    packing = Packing(castlm=__version__, head=head)
    facts = replace(facts, schema_version=SCHEMA_VERSION, packed=packing)
    _write_small_files(source, folder, config, facts, packed_card(source, facts, name))


# ---- unpacking


def unpack_folder(
    source: str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    tie: bool = False,
    progress: Progress = silent,
) -> int:
    """Writes the packed model in `source` as a plain model folder, with zeros, and verifies it.

    Floating-point values come back bit for bit, except that -0.0 may become 0.0. Integers come back as value times
    scale in the dtype of config.json. A GGUF file, or "demo", is dequantized and rounded to bf16.

    Args:
        tie: keep one table for embedding and output head, the finer one, where a GGUF file holds two roundings of it.

    Returns:
        The number of tensors that were unpacked or dequantized.

    Raises:
        InputError: not a packed folder, damaged files, values that are infinite in the dtype of config.json, `folder`
            taken, or the disk full. `folder` is then as it was.
    """
    if locate(source, needs_weights=False).gguf:
        return _dequantize(source, folder, overwrite, tie)
    if tie:
        raise InputError(f"--tie is for GGUF files, and {source} is none: leave it out")
    source = local_folder(source)
    config = read_config(source)
    stored = stored_tensors(source, config) if is_packed(config) else {}
    packed = take_packed(stored)  # `stored` has the tensors of the plain folder now
    stored = dict(sorted(stored.items()))  # so that packing again writes the same file
    if not packed:
        raise InputError(f"{source} is not a packed model folder: `castlm pack` writes one")
    uses = check_layers(source, stored, config)
    for name in packed:
        check_order(name, packed, uses[name])
    named = str(config.get("dtype") or config.get("torch_dtype"))
    integers_as = next((dtype for dtype in FLOATS.values() if str(dtype) == f"torch.{named}"), torch.float32)
    config.pop("quantization_config", None)
    if names_no_weights(config.get("transformers_weights")):
        config.pop("transformers_weights", None)
    facts = replace(read_facts(source), packed=None)
    with atomic_dir(folder, overwrite) as temporary:
        _write_weights(temporary, _Unpacking(stored, packed, integers_as), (SINGLE, INDEX), progress)
        _write_small_files(source, temporary, config, facts, unpacked_card(source, facts))
        with naming_instead(temporary, source):  # verifies the plain folder
            uses = check_layers(temporary, stored_tensors(temporary, config), config)
            check_dense(temporary)
            dense = [name for name, of in packed.items() if not of.spec.m]
            for n, m in {(of.spec.n, of.spec.m) for of in packed.values() if of.spec.m}:
                check_ok(verify(temporary, NM(n, m), dense, allow_dense=1.0, uses=uses))
    return len(packed)


@dataclass(frozen=True)
class _Unpacking:
    """Converts the tensors of a packed folder to plain ones; `stored` and `packed` have the plain folder's names."""

    stored: Mapping[str, StoredTensor]
    packed: Mapping[str, Packed]
    integers_as: torch.dtype
    """The dtype of weights that are stored as integers."""

    def layout(self, name: str) -> Layout:
        of = self.stored[name]
        is_rounded = name in self.packed and self.packed[name].spec.rounded
        return {name: (STORED_NAMES[self.integers_as] if is_rounded else of.dtype, of.shape)}

    def tensors(self, name: str) -> Iterable[Tensor]:
        if name not in self.packed:
            return [read_tensor(self.stored[name])]
        spec, parts = self.packed[name]
        with naming(name):
            weight = unpack(read_packed(spec, parts), self.integers_as if spec.rounded else None)
        weight = weight.view(*spec.unpacked_shape[:-2], -1, spec.columns)  # (384, 32) -> (4, 96, 32) of experts
        return [weight.mT if spec.transposed else weight]

    def metadata(self, names: Iterable[str]) -> dict[str, str]:
        return {"format": "pt"}


# ---- the files of both kinds


def _write_weights(folder: Path, how: _Packing | _Unpacking, names: tuple[str, str], progress: Progress) -> str:
    """Writes the converted tensors of a model to as many files as they lie in, one tensor at a time.

    Args:
        how: gives, for a tensor of the plain folder, the layout of its stored tensors, and these in the same order.
        names: of the file if there is one, and of the index if there are several.

    Returns:
        The one of the names that was used.
    """
    single, index = names
    done, total = itertools.count(1), len(how.stored)

    def converted(name: str) -> Iterator[Tensor]:
        yield from how.tensors(name)
        progress(next(done), total)

    inside: dict[Path, list[str]] = {}
    for name, tensor in how.stored.items():
        inside.setdefault(tensor.file, []).append(name)
    # Offsets in a safetensors file follow from the layouts alone, so that the header is written before any tensor is
    # read.
    batches = [
        [Batch(how.layout(name), functools.partial(converted, name)) for name in of_file]
        for _, of_file in sorted(inside.items())
    ]
    metadata = [how.metadata(of_file) for _, of_file in sorted(inside.items())]
    files = file_names(len(batches), single)
    write_weights(folder, dict(zip(files, batches)), dict(zip(files, metadata)), index=index)
    return single if len(files) == 1 else index


def _shortened_tokenizer(text: str) -> str:
    """A tokenizer.json without indents, and with each merge as one text: "a b" in place of ["a", "b"].

    That of SmolLM2-135M has 1.4 MB in place of 3.5, and is read in three quarters of the time. A file from which the
    library tokenizers makes another tokenizer then stays as it is.
    """
    from tokenizers import Tokenizer

    try:
        content = json.loads(text)
        model = content.get("model") or {}
        merges = [merge for merge in model.get("merges") or () if not isinstance(merge, str)]
        if merges and all(" " not in part for merge in merges for part in merge):
            model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        shortened = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        is_same = Tokenizer.from_str(shortened).to_str() == Tokenizer.from_str(text).to_str()
    except Exception:  # of any type: the library is written in Rust. What it cannot read is copied
        return text
    return shortened if is_same else text


def _write_small_files(source: Path, folder: Path, config: Mapping[str, Any], facts: Facts, card: str) -> None:
    """Writes config.json, castlm.json, and the card if it has content; copies all other files but weights."""
    for path in sorted([*source.iterdir(), *source.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja")]):
        is_copied = path.name not in (RESULT, OUTPUT, "README.md") and not path.name.endswith(_WEIGHTS)
        if path.is_file() and not path.name.startswith(".") and is_copied:
            refuse_undecodable({"the file": path})
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            if path.name == "tokenizer.json" and facts.packed is not None:
                copy.write_text(_shortened_tokenizer(path.read_text(encoding="utf-8")), encoding="utf-8")
    atomic_write_json(folder / "config.json", config)
    if facts.packed is not None or (source / RESULT).is_file():
        atomic_write_json(folder / RESULT, facts.to_json())
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
