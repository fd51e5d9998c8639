"""`castlm pack` and `castlm unpack`: convert between a plain model folder, with zeros, and a packed one without.

One tensor is in memory at a time. The plain folder stays the canonical result. Tensors are written in the order of
their names in the plain folder, so that packing, unpacking and packing again gives the same file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR

from castlm import __version__
from castlm.core.blocks import is_block_linear, is_stacked_experts
from castlm.core.errors import InputError
from castlm.core.nm import NM, Pattern, is_nm_sparse
from castlm.dtypes import FLOATS, STORED, STORED_NAMES
from castlm.export.folder import is_packed, read_config, read_manifest, stored_tensors
from castlm.export.hf import dtype_name, new_manifest
from castlm.export.layers import check_layers
from castlm.export.packed_card import packed_card, unpacked_card
from castlm.export.packed_count import take_packed
from castlm.export.stream import write_safetensors
from castlm.export.verify import left_dense_reason, read_left_dense, verify
from castlm.files.atomic_dir import atomic_dir
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import refuse_undecodable
from castlm.files.reading import read_json_object, user_path
from castlm.files.record import OUTPUT, RESULT
from castlm.files.stored import INDEX, SINGLE, StoredTensor, count_non_finite
from castlm.inference import formats
from castlm.inference.convert import can_pack_tables
from castlm.inference.formats import FORMATS, PackedSpec
from castlm.inference.packed import PackedTensor, cast_weight, equal_as_packed, kept_mask, pack, pack_integers, unpack
from castlm.inference.rounding import Rounded, round_rows
from castlm.models.architecture import shape_model
from castlm.models.conversion import as_stored, possible_names
from castlm.models.io import load_model, parameters_in, save_model
from castlm.models.layout import QUANT_METHOD, experts_input_axis, guess_model_type, stored_transposed
from castlm.models.locate import cached_snapshot, local_folder, locate
from castlm.models.opening import open_config
from castlm.patterns import parse_pattern

DENSE = "dense"
"""The text of a dense model, instead of a pattern."""

Progress = Callable[[int, int], None]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""dtype (safetensors' name) and shape by tensor."""

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".bin.index.json")


@dataclass(frozen=True)
class PackReport:
    """The result of `pack_folder`.

    Attributes:
        num_packed: tensors in the packed format.
        bytes_before, bytes_after: bytes of the weight files.
    """

    num_packed: int
    bytes_before: int
    bytes_after: int


def pack_folder(
    source: str | Path,
    folder: str | Path,
    n: int = 2,
    m: int = 4,
    *,
    dtype: str | None = None,
    head: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Writes the n:m or dense model in `source` to `folder` in the packed format, and verifies what was written.

    Every linear layer inside the transformer blocks is packed: as n:m, or as a dense matrix if castlm.json lists it as
    left dense or the whole model is dense. The other tensors are copied. Each packed tensor of floats is unpacked again
    and compared before it is written.

    Args:
        source: a model folder in safetensors (the result has as many files); or a hub id, a GGUF file or "demo".
        folder: the output.
        n: kept weights of each group; 0, with m 0, for a dense model.
        m: weights of a group.
        dtype: "bf16", "fp16" or "fp32" casts all floating-point tensors first; None keeps their dtype.
        head: "int8" rounds the output head to int8 with a scale for each row, together with the embedding where the two
            are tied. None keeps it.
        overwrite: replace an earlier result in `folder`.
        progress: called with (tensors done, tensors in all).

    Returns:
        How many tensors were packed, and the bytes of the weight files before and after.

    Raises:
        InputError: no model there, already packed or quantized, a layer that is not n:m or holds NaN, `folder` taken,
            or the disk full. `folder` is then as it was.
    """
    with atomic_dir(folder, overwrite) as temporary:
        try:
            with _model_folder(source, temporary) as place:
                return pack_into(temporary, place, n, m, dtype=dtype, head=head, progress=progress)
        except InputError as error:
            raise InputError(str(error).replace(str(temporary), str(folder))) from error


def pack_into(
    folder: Path,
    source: Path,
    n: int,
    m: int,
    *,
    dtype: str | None = None,
    head: str | None = None,
    integers: Mapping[str, Rounded] | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """`pack_folder` into an existing empty folder.

    Args:
        integers: int8 or int4 codes and scales to store instead of the weights, by the name of the layer in the files;
            the weights in `source` are their products.
    """
    plan = _plan(source, n, m, dtype, head, integers or {})
    done, total = 0, len(plan.stored)
    for old, new, names in plan.files:
        layout = {key: entry for name in names for key, entry in plan.layout(name).items()}

        def written(names: list[str] = names, old: Path = old) -> Iterator[tuple[str, Tensor]]:
            nonlocal done
            with safe_open(old, framework="pt") as opened:
                for name in names:
                    yield from _packed_tensors(name, opened.get_tensor(name), plan)
                    done += 1
                    if progress is not None:
                        progress(done, total)

        specs = {plan.specs[name].stem(name): plan.specs[name] for name in names if name in plan.specs}
        write_safetensors(folder / new, layout, written(), formats.to_metadata(specs))
    pattern = NM(n, m) if m else None
    _write_rest(source, folder, plan, pattern)
    if pattern is None:
        check_dense(folder, plan.specs)
    else:
        report = verify(folder, pattern, known_layers=plan.specs)
        if damaged := next(iter(report.non_finite_elsewhere), None):
            raise InputError(f"{damaged} of {source} holds NaN or infinity: the checkpoint is damaged")
        if not report.ok:
            raise InputError(report.summary())
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before = sum(file.stat().st_size for file in {tensor.file for tensor in plan.stored.values()})
    return PackReport(len(plan.specs), before, size)


@contextlib.contextmanager
def _model_folder(name: str | Path, within: Path) -> Iterator[Path]:
    """The folder of a model in safetensors; a GGUF file is converted to a temporary one."""
    if not locate(name, needs_weights=False).gguf:
        yield local_folder(name)
        return
    loaded = load_model(name, dtype=None)
    place = within / ".plain" / Path(loaded.source).name
    place.mkdir(parents=True)
    write_dense(loaded.model, loaded.tokenizer, place, {"base_model": loaded.source}, loaded.dtype)
    yield place
    shutil.rmtree(place.parent)


def write_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes a dense model in `dtype` to a folder that exists, with a castlm.json without a pattern, and checks it."""
    with parameters_in(model, dtype):
        save_model(model, tokenizer, folder)
    manifest = new_manifest("dense", {}, {**record, "dtype": dtype_name(dtype)})
    atomic_write_json(folder / "castlm.json", {**manifest, "pattern": None})
    check_dense(folder, ())


def pattern_of(name: str | Path, given: str | None) -> Pattern | None:
    """The pattern of a model: the given one, else that of its castlm.json, else 2:4 if its first layer is, else None.

    Args:
        given: n:m, a structured pattern, or "dense".
    """
    if given is not None:
        return None if given == DENSE else parse_pattern(given)
    where = locate(name, needs_weights=False)
    folder = cached_snapshot(where.target, None) if where.is_hub else Path(where.target)
    if folder is None or where.gguf:
        return None
    if "pattern" in (manifest := read_manifest(folder)):
        return None if manifest["pattern"] is None else parse_pattern(str(manifest["pattern"]))
    stored = stored_tensors(folder, read_config(folder))
    first = next((tensor for name, tensor in stored.items() if is_block_linear(name, tensor.shape)), None)
    if first is None or first.shape[1] % 4:
        return None
    with safe_open(first.file, framework="pt") as opened:
        weight = opened.get_tensor(first.name)
    return NM(2, 4) if weight.is_floating_point() and is_nm_sparse(weight, 2, 4) else None


def check_dense(folder: Path, names: Collection[str]) -> None:
    """Checks a plain or packed folder of a dense model: it holds the tensors `names`, and every value is finite.

    Raises:
        InputError: a tensor is missing, or holds NaN or infinity.
    """
    tensors = stored_tensors(folder, read_config(folder))
    packed = take_packed(tensors)
    if missing := sorted(set(names) - tensors.keys()):
        raise InputError(f"{folder} lacks {missing[0]}: write it again")
    for name, tensor in tensors.items():
        damaged = packed[name].num_non_finite() if name in packed else count_non_finite(tensor)
        if damaged:
            raise InputError(f"{name} of {folder} holds {damaged:,} values that are NaN or infinite")


# ---- the plan: what is packed, how, and into which files


@dataclass(frozen=True)
class _Plan:
    stored: Mapping[str, StoredTensor]
    """Tensors by name, in the order of writing."""
    specs: Mapping[str, PackedSpec]
    """Specs by the name of the tensor in the source."""
    files: list[tuple[Path, str, list[str]]]
    """Path, new name and tensor names of each file."""
    cast: torch.dtype | None
    integers: Mapping[str, Rounded] = field(default_factory=dict)

    def layout(self, name: str) -> Layout:
        """The stored tensors of `name`."""
        spec = self.specs.get(name)
        if spec is not None:
            return {f"{spec.stem(name)}.{suffix}": entry for suffix, entry in spec.tensors().items()}
        stored = self.stored[name]
        is_float = STORED[stored.dtype].is_floating_point
        return {name: (STORED_NAMES[self.cast] if self.cast and is_float else stored.dtype, stored.shape)}


def _plan(source: Path, n: int, m: int, dtype: str | None, head: str | None, integers: Mapping[str, Rounded]) -> _Plan:
    config, stored = _read_source(source)
    if not config.get("auto_map"):  # the layers of a model with its own code are unknown
        check_layers(source, stored, config)
    config["model_type"] = config.get("model_type") or guess_model_type({name: t.shape for name, t in stored.items()})
    left_dense = read_left_dense(source / "castlm.json")
    specs: dict[str, PackedSpec] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in STORED:
            raise InputError(f"{name} of {source} is stored as {tensor.dtype}, which cannot be packed")
        if not (is_stacked_experts(name, tensor.shape) or is_block_linear(name, tensor.shape)):
            continue
        is_dense = m == 0 or left_dense_reason(name, left_dense) is not None
        if (spec := _spec(name, tensor, config, (0, 0) if is_dense else (n, m), dtype, integers)) is not None:
            specs[name] = spec
    if not specs:
        raise InputError(f"{source} has no linear layer inside transformer blocks to pack")
    if absent := integers.keys() - {spec.stem(name) for name, spec in specs.items()}:
        raise InputError(f"{min(absent)} is not a layer of {source} that is packed")
    if head == "int8":
        table = _table(source, stored)
        specs[table] = PackedSpec(*stored[table].shape, 0, 0, "int8")
    paths = sorted({tensor.file for tensor in stored.values()})
    count = len(paths)
    files = []
    for i, path in enumerate(paths, 1):
        new = formats.FILE if count == 1 else f"castlm-{i:05d}-of-{count:05d}.safetensors"
        files.append((path, new, [name for name, tensor in stored.items() if tensor.file == path]))
    return _Plan(stored, specs, files, None if dtype is None else FLOATS[dtype], integers)


def _spec(
    name: str,
    tensor: StoredTensor,
    config: Mapping[str, Any],
    pattern: tuple[int, int],
    dtype: str | None,
    integers: Mapping[str, Rounded],
) -> PackedSpec | None:
    """The spec of a tensor; None for a dense one with unknown axes, which is copied."""
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
    transposed = _transposed(name, tensor, config)
    if transposed is None:
        if pattern == (0, 0):
            return None
        raise InputError(f"which axis of {name} is its input is not known: name it in left_dense of castlm.json")
    rows, columns = tensor.shape[:-3:-1] if transposed else tensor.shape[-2:]
    if pattern[1] and columns % pattern[1]:
        raise InputError(
            f"{name} has a width of {columns}, which does not divide by m = {pattern[1]}: choose another m"
        )
    stem = name if experts else name.removesuffix(".weight")
    values = integers[stem].kind if stem in integers else dtype or _float_name(tensor)
    return PackedSpec(max(1, experts) * rows, columns, *pattern, values, transposed, experts)


def _transposed(name: str, tensor: StoredTensor, config: Mapping[str, Any]) -> bool | None:
    """Whether the last axis of a tensor is its output axis; None if unknown."""
    if len(tensor.shape) == 2:
        return stored_transposed(config["model_type"], name)
    experts, rows, columns = tensor.shape
    axis = experts_input_axis(config, name, (experts, rows, columns))
    return None if axis is None else axis == 1


def _float_name(tensor: StoredTensor) -> str:
    name = next((name for name in FLOATS if FORMATS[name].stored == tensor.dtype), None)
    if name is None:
        raise InputError(
            f"{tensor.name} is stored as {tensor.dtype}, which cannot be packed: pass dtype bf16 to cast it"
        )
    return name


def _table(source: Path, stored: Mapping[str, StoredTensor]) -> str:
    """The name of the weight of the output head, or of the embedding that it is tied to.

    Raises:
        InputError: the model has no plain head, or its files and its config do not agree on whether it is tied.
    """
    opened = open_config(source)
    model = shape_model(opened)
    if not can_pack_tables(model):
        raise InputError(
            f"the embedding or head of {opened.model_type} does more than look up and multiply: leave --head out"
        )
    tables = [module for module in (model.get_output_embeddings(), model.get_input_embeddings()) if module is not None]
    paths = {module: path for path, module in model.named_modules() if module in tables}
    found = []
    for module in tables:
        names = as_stored(model, f"{paths[module]}.weight", module.weight)
        found += [name for known in names for name in possible_names(model, known) if name in stored][:1]
    if not found:
        raise InputError(f"{source} stores no output head and no embedding: leave --head out")
    if opened.tie_word_embeddings and len(set(found)) > 1:
        raise InputError(f"{source} stores {found[0]}, which its config ties to the embedding: leave --head out")
    if opened.tie_word_embeddings and getattr(tables[0], "bias", None) is not None:
        raise InputError(f"the head of {opened.model_type} is tied and has a bias: leave --head out")
    return found[0]


def _read_source(source: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    config = read_config(source)
    if not config:
        raise InputError(f"{source} has no config.json: give a model folder in Hugging Face format")
    if config.get("quantization_config"):
        raise InputError(f"{source} is packed or quantized already: give the model that was")
    return config, dict(sorted(stored_tensors(source, config).items()))


# ---- packing


def _packed_tensors(name: str, tensor: Tensor, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of one tensor of the source, with the dtypes and shapes of `plan.layout`."""
    spec = plan.specs.get(name)
    try:
        if plan.cast is not None and tensor.is_floating_point():
            tensor = cast_weight(tensor, plan.cast)
        if spec is None:
            yield name, tensor
            return
        packed = _packed(spec, tensor, plan.integers.get(spec.stem(name)))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    for suffix, part in packed.tensors().items():
        yield f"{spec.stem(name)}.{suffix}", part


def _packed(spec: PackedSpec, tensor: Tensor, rounded: Rounded | None) -> PackedTensor:
    weight = (tensor.mT if spec.transposed else tensor).reshape(spec.rows, spec.columns).contiguous()
    if not spec.rounded:
        if not spec.m:
            return PackedTensor(spec, weight, None, None)
        packed = pack(weight, spec.n, spec.m, transposed=spec.transposed, experts=spec.experts)
        if not equal_as_packed(unpack(packed), weight):
            raise InputError("it does not come back from its packed form: please report this")
        return packed
    if rounded is None:  # the head
        rounded = round_rows(weight, spec.values)
    mask = kept_mask(weight, spec.n, spec.m) if spec.m else None
    scales = rounded.scales.to(STORED[FORMATS[spec.values].scale])
    options = {"transposed": spec.transposed, "experts": spec.experts}
    return pack_integers(rounded.codes, scales, spec.values, spec.n, spec.m, mask, **options)


def _write_rest(source: Path, folder: Path, plan: _Plan, pattern: NM | None) -> None:
    """Writes all files except the weights: adds the packing to config.json and castlm.json, and copies the others."""
    name = DENSE if pattern is None else str(pattern)
    _copy_small_files(source, folder)
    config = read_json_object(source / "config.json")
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": formats.VERSION,
        "pattern": name,
        "weights": formats.FILE if len(plan.files) == 1 else formats.INDEX,
    }
    if plan.cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(plan.cast).removeprefix("torch.")
    atomic_write_json(folder / "config.json", config)
    manifest = read_manifest(source)
    if pattern is None:
        manifest["pattern"] = None
        manifest.pop("proof", None)  # the card names a pattern
    else:
        recorded = parse_pattern(str(manifest.get("pattern") or pattern))
        is_counted = recorded.nm == pattern  # by `verify`, in a packed folder
        manifest["pattern"] = str(recorded if is_counted else pattern)
    manifest["packed"] = {"format": formats.VERSION, "castlm": __version__}
    atomic_write_json(folder / "castlm.json", manifest)
    (folder / "README.md").write_text(packed_card(source, manifest, name), encoding="utf-8")
    if len(plan.files) > 1:
        weight_map = {key: new for _, new, names in plan.files for name in names for key in plan.layout(name)}
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        atomic_write_json(folder / formats.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_small_files(source: Path, folder: Path) -> None:
    for path in sorted([*source.iterdir(), *source.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja")]):
        is_other = path.name not in (RESULT, OUTPUT) and not path.name.endswith(_WEIGHTS)  # written by other means
        if path.is_file() and not path.name.startswith(".") and is_other:
            refuse_undecodable({"the file": path})
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


# ---- unpacking


def unpack_folder(
    source: str | Path, folder: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Writes the packed model in `source` as a plain model folder, with zeros, and verifies it.

    Floating-point values come back bit for bit, except that -0.0 may become 0.0. Integers come back as value times
    scale in the dtype of config.json.

    Returns:
        The number of unpacked tensors.

    Raises:
        InputError: not a packed folder, damaged files, values that are infinite in the dtype of config.json, `folder`
            taken, or the disk full. `folder` is then as it was.
    """
    source = user_path(source)
    config = read_config(source)
    stored = stored_tensors(source, config) if is_packed(config) else {}
    paths = sorted({tensor.file for tensor in stored.values()})
    specs = formats.read_specs(paths)
    if not specs:
        raise InputError(f"{source} is not a packed model folder: `castlm pack` writes one")
    integers_as = _dtype_of(config)
    stems = {spec.tensor_name(stem): stem for stem, spec in specs.items()}
    parts = {f"{stem}.{suffix}" for stem, spec in specs.items() for suffix in spec.tensors()}
    if twice := stems.keys() & stored.keys():
        raise InputError(f"{min(twice)} is stored packed and plain: pack the model again")
    weight_map: dict[str, str] = {}
    done = 0
    with atomic_dir(folder, overwrite) as temporary:
        for i, path in enumerate(paths, 1):
            new = SINGLE if len(paths) == 1 else f"model-{i:05d}-of-{len(paths):05d}.safetensors"
            names = [name for name, tensor in stored.items() if tensor.file == path and name not in parts]
            names += [name for name, stem in stems.items() if stored[f"{stem}.values"].file == path]
            layout: Layout = {}
            for name in sorted(names):
                plain = stored.get(name)
                layout[name] = (
                    _unpacked_layout(specs[stems[name]], integers_as) if plain is None else (plain.dtype, plain.shape)
                )

            def written(path: Path = path, layout: Layout = layout) -> Iterator[tuple[str, Tensor]]:
                nonlocal done
                with safe_open(path, framework="pt") as opened:
                    for name in layout:
                        if name in stored:
                            yield name, opened.get_tensor(name)
                            continue
                        yield name, _unpacked(opened, stems[name], specs[stems[name]], integers_as)
                        done += 1
                        if progress is not None:
                            progress(done, len(specs))

            write_safetensors(temporary / new, layout, written(), {"format": "pt"})
            weight_map |= dict.fromkeys(layout, new)
        _copy_small_files(source, temporary)
        config.pop("quantization_config", None)
        atomic_write_json(temporary / "config.json", config)
        if len(paths) > 1:
            total = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            atomic_write_json(temporary / INDEX, index)
        manifest = read_manifest(source)
        if manifest:
            manifest.pop("packed", None)
            atomic_write_json(temporary / "castlm.json", manifest)
        (temporary / "README.md").unlink(missing_ok=True)  # it describes the packed folder
        if card := unpacked_card(source, manifest):
            (temporary / "README.md").write_text(card, encoding="utf-8")
        try:
            _check_unpacked(temporary, {spec.tensor_name(stem): spec for stem, spec in specs.items()})
        except InputError as error:
            raise InputError(str(error).replace(str(temporary), str(source))) from error
    return len(specs)


def _check_unpacked(folder: Path, specs: Mapping[str, PackedSpec]) -> None:
    """Verifies a plain folder: the pattern of each layer that was n:m, and that every value is finite."""
    check_dense(folder, specs)
    for n, m in sorted({(spec.n, spec.m) for spec in specs.values() if spec.m}):
        report = verify(folder, NM(n, m), include=[name for name, s in specs.items() if (s.n, s.m) == (n, m)])
        if not report.ok:
            raise InputError(report.summary())


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights by a config.json; fp32 if it is not one of `FLOATS`."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if found in FLOATS.values() else torch.float32


def _unpacked_layout(spec: PackedSpec, integers_as: torch.dtype) -> tuple[str, tuple[int, ...]]:
    dtype = STORED_NAMES[integers_as] if spec.rounded else FORMATS[spec.values].stored
    return dtype, spec.unpacked_shape


def _unpacked(opened: Any, stem: str, spec: PackedSpec, integers_as: torch.dtype) -> Tensor:
    parts = {suffix: opened.get_tensor(f"{stem}.{suffix}") for suffix in spec.tensors()}
    packed = PackedTensor(spec, parts["values"], parts.get("mask"), parts.get("scales"))
    try:
        weight = unpack(packed, integers_as if spec.rounded else None)
    except InputError as error:
        raise InputError(f"{stem}: {error}") from error
    if spec.experts:
        weight = weight.view(spec.experts, -1, spec.columns)
    return weight.mT if spec.transposed else weight
