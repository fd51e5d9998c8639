"""`castlm pack` and `castlm unpack`: a model folder with its zeros stored, and the packed folder without them.

One tensor is in memory at a time, whatever the size of the model. The plain folder stays the canonical result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import CHAT_TEMPLATE_DIR

from castlm import __version__
from castlm.core.errors import InputError
from castlm.core.pattern import NM, Pattern
from castlm.dtypes import FLOATS, STORED_NAMES
from castlm.export.folder import is_packed, read_config, read_manifest, stored_tensors
from castlm.export.pack_plan import PackPlan, plan_pack
from castlm.export.packed_card import packed_card, unpacked_card
from castlm.export.stream import write_safetensors
from castlm.export.unit_count import groups_of
from castlm.export.verify import verify
from castlm.files.atomic_dir import atomic_dir
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import refuse_undecodable
from castlm.files.reading import read_json_object, user_path
from castlm.files.stored import INDEX, SINGLE
from castlm.inference import format
from castlm.inference.format import PackedSpec
from castlm.inference.packed import PackedTensor, cast_weight, equal_as_packed, pack, pack_integers, unpack
from castlm.inference.rounding import round_rows
from castlm.models.layout import QUANT_METHOD

Progress = Callable[[int, int], None]

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".bin.index.json")


@dataclass(frozen=True)
class PackReport:
    """What `pack_folder` wrote.

    Attributes:
        num_packed: tensors whose zeros are no longer stored.
        bytes_before, bytes_after: of the weight files.
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
    """Writes the n:m model in `source` to `folder` in the packed format, and verifies what was written.

    Every linear layer inside the transformer blocks is packed, except those that castlm.json lists as left dense; the
    other tensors are copied. Each packed tensor is unpacked again and compared before it is written.

    Args:
        source: a model folder in safetensors, one file or several; the result has as many.
        folder: the output.
        n: kept weights of each group.
        m: weights of a group.
        dtype: "bf16", "fp16" or "fp32" casts all floating-point tensors first; None keeps what is stored.
        head: "int8" rounds the output head to int8 with a scale for each row, together with the embedding where the two
            are tied. None keeps it. It is the only lossy option, `dtype` aside.
        overwrite: replace an earlier result in `folder`.
        progress: called with (tensors done, tensors in all).

    Returns:
        How many tensors were packed, and the bytes of the weight files before and after.

    Raises:
        InputError: no model there, already packed or quantized, a layer that is not n:m or holds NaN, `folder` taken,
            or the disk full. `folder` is then as it was.
    """
    source = user_path(source)
    plan = plan_pack(source, n, m, dtype, head)
    done, total = 0, len(plan.stored)
    with atomic_dir(folder, overwrite) as temporary:
        for old, new, names in plan.files:
            packed = {spec.stem(name): spec for name, spec in plan.specs.items() if name in names}
            layout = {key: entry for name in names for key, entry in plan.layout(name).items()}

            def written(names: list[str] = names, old: Path = old) -> Iterator[tuple[str, Tensor]]:
                nonlocal done
                with safe_open(old, framework="pt") as opened:
                    for name in names:
                        yield from _packed_tensors(name, opened.get_tensor(name), plan, dtype)
                        done += 1
                        if progress is not None:
                            progress(done, total)

            write_safetensors(temporary / new, layout, written(), format.to_metadata(packed))
        _write_rest(source, temporary, plan, n, m)
        report = verify(temporary, NM(n, m), known_layers=plan.specs)
        if damaged := next(iter(report.non_finite_elsewhere), None):
            raise InputError(f"{damaged} of {source} holds NaN or infinity: the checkpoint is damaged")
        if not report.ok:
            raise InputError(report.summary().replace(str(temporary), str(folder)))
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    before = sum(file.stat().st_size for file in {tensor.file for tensor in plan.stored.values()})
    return PackReport(len(plan.specs), before, size)


def _packed_tensors(name: str, tensor: Tensor, plan: PackPlan, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """What is written of one tensor of the source, with the dtypes and shapes of `plan.layout`."""
    if dtype is not None and tensor.is_floating_point():
        try:
            tensor = cast_weight(tensor, FLOATS[dtype])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    spec = plan.specs.get(name)
    if spec is None:
        yield name, tensor
        return
    if spec.m:
        weight = (tensor.mT if spec.transposed else tensor).reshape(spec.rows, spec.columns).contiguous()
        try:
            packed = pack(weight, spec.n, spec.m, transposed=spec.transposed, experts=spec.experts)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if not equal_as_packed(unpack(packed), weight):
            raise InputError(f"{name} does not come back from its packed form: please report this")
    else:
        try:
            rounded = round_rows(tensor, "int8")
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        packed = pack_integers(rounded.codes, rounded.scales, "int8", 0, 0)
    for suffix, part in packed.tensors().items():
        yield f"{spec.stem(name)}.{suffix}", part


def _write_rest(source: Path, folder: Path, plan: PackPlan, n: int, m: int) -> None:
    """All files but the weights: config.json and castlm.json with what was done, the others as they are."""
    _copy_small_files(source, folder)
    config = read_json_object(source / "config.json")
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": format.VERSION,
        "pattern": f"{n}:{m}",
        "weights": format.FILE if len(plan.files) == 1 else format.INDEX,
    }
    if plan.cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(plan.cast).removeprefix("torch.")
    atomic_write_json(folder / "config.json", config)
    manifest = read_manifest(source)
    recorded = Pattern.parse(str(manifest.get("pattern") or f"{n}:{m}"))
    is_counted = groups_of(recorded) == NM(n, m)  # by `verify`, in a packed folder
    manifest["pattern"] = str(recorded) if is_counted else f"{n}:{m}"
    manifest["packed"] = {"format": format.VERSION, "castlm": __version__}
    manifest.pop("files", None)  # of the source
    atomic_write_json(folder / "castlm.json", manifest)
    (folder / "README.md").write_text(packed_card(source, manifest, f"{n}:{m}"), encoding="utf-8")
    if len(plan.files) > 1:
        weight_map = {key: new for _, new, names in plan.files for name in names for key in plan.layout(name)}
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        atomic_write_json(folder / format.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_small_files(source: Path, folder: Path) -> None:
    for path in sorted([*source.iterdir(), *source.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja")]):
        is_other = path.name != "castlm.json" and not path.name.endswith(_WEIGHTS)  # both are written by other means
        if path.is_file() and not path.name.startswith(".") and is_other:
            refuse_undecodable({"the file": path})
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def unpack_folder(
    source: str | Path, folder: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Writes the packed model in `source` as a plain model folder, with the zeros stored. Returns how many tensors.

    Floating-point values come back bit for bit, except that -0.0 may become 0.0. Integers come back as value times
    scale in the dtype of config.json.

    Raises:
        InputError: not a packed folder, damaged files, `folder` taken, or the disk full. `folder` is then as it was.
    """
    source = user_path(source)
    config = read_config(source)
    if not is_packed(config):
        raise InputError(f"{source} is not a packed model folder: `castlm pack` writes one")
    stored = stored_tensors(source, config)
    paths = sorted({tensor.file for tensor in stored.values()})
    specs = format.read_specs(paths)
    if not specs:
        raise InputError(f"{source} is not a packed model folder: `castlm pack` writes one")
    if twice := [name for stem, spec in specs.items() if (name := spec.tensor_name(stem)) in stored]:
        raise InputError(f"{twice[0]} is stored packed and plain: pack the model again")
    integers_as = _dtype_of(config)
    parts = {f"{name}.{suffix}" for name, spec in specs.items() for suffix in spec.tensors()}
    weight_map: dict[str, str] = {}
    done = 0
    with atomic_dir(folder, overwrite) as temporary:
        for i, path in enumerate(paths, 1):
            new = SINGLE if len(paths) == 1 else f"model-{i:05d}-of-{len(paths):05d}.safetensors"
            here = {name: spec for name, spec in specs.items() if stored[f"{name}.values"].file == path}
            plain = [name for name, tensor in stored.items() if tensor.file == path and name not in parts]
            layout = {name: (stored[name].dtype, stored[name].shape) for name in plain}
            layout |= {spec.tensor_name(name): _unpacked_layout(spec, integers_as) for name, spec in here.items()}

            def written(path: Path = path, plain: list[str] = plain, here: dict = here) -> Iterator[tuple[str, Tensor]]:
                nonlocal done
                with safe_open(path, framework="pt") as opened:
                    yield from ((name, opened.get_tensor(name)) for name in plain)
                    for name, spec in here.items():
                        yield spec.tensor_name(name), _unpacked(opened, name, spec, integers_as)
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
            manifest.pop("files", None)  # of the packed folder
            atomic_write_json(temporary / "castlm.json", manifest)
        (temporary / "README.md").unlink(missing_ok=True)  # it describes the packed folder
        if card := unpacked_card(source, manifest):
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return len(specs)


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """What a config.json says that the weights are; fp32 of any other than those of `FLOATS`."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if found in FLOATS.values() else torch.float32


def _unpacked_layout(spec: PackedSpec, integers_as: torch.dtype) -> tuple[str, tuple[int, ...]]:
    dtype = STORED_NAMES[integers_as] if spec.values in ("int8", "int4") else format.DTYPES[spec.values]
    return dtype, spec.unpacked_shape


def _unpacked(opened: Any, name: str, spec: PackedSpec, integers_as: torch.dtype) -> Tensor:
    parts = {suffix: opened.get_tensor(f"{name}.{suffix}") for suffix in spec.tensors()}
    packed = PackedTensor(spec, parts["values"], parts.get("mask"), parts.get("scales"))
    try:
        weight = unpack(packed, integers_as if spec.values in ("int8", "int4") else None)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if spec.experts:
        weight = weight.view(spec.experts, -1, spec.columns)
    return weight.mT if spec.transposed else weight
