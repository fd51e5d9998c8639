"""Loads a model that no rank holds whole: builds it without memory, shards it, and reads each rank's rows.

Buffers such as rotary frequencies are computed and not stored. They are real from the beginning, and are kept over
`to_empty`, which would silently leave garbage in them. A fingerprint of a few numbers of every weight tells two models
apart without reading them whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from castlm.core.errors import InputError, check_finite
from castlm.core.experts import ExpertLinear
from castlm.core.shards import local, own_rows
from castlm.core.sparsify import SparseLayer, dense_name
from castlm.distributed.world import World
from castlm.files.stored import StoredTensor, count_non_finite, read_header
from castlm.models.architecture import auto_class, linearize_
from castlm.models.gguf import GgufWeights, forget_gguf, gguf_weights
from castlm.models.io import Loaded, as_input_error, open_model, quiet, stored_dtype, weights_of
from castlm.models.layout import OLD_BUFFERS
from castlm.models.stored_layout import Part, StoredLayout

FIRST = 64
"""The number of values that a fingerprint reads of each parameter: the first ones of its first row or expert."""


def fingerprint(model: nn.Module) -> str:
    """A hash of the first 64 numbers of every parameter's first row, by name, of a dense model in memory."""
    return fingerprint_of({name: p.detach()[:1].flatten()[:FIRST] for name, p in model.named_parameters()})


def fingerprint_of(first: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model from the first numbers of its parameters, by name, in any dtype."""
    digest = hashlib.sha256()
    for name, numbers in sorted(first.items()):
        digest.update(name.encode())
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()


Reader = Callable[[Path], Any]
"""Opens a safetensors file, each file once."""


class _WeightsOnMeta(TorchFunctionMode):
    """Inside the context, weights, which layers make with `torch.empty`, take no memory; buffers are real."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function is torch.empty else {}))


@dataclass(frozen=True)
class Place:
    """The place of a parameter: a tensor in a file."""

    file: Path
    key: str
    transposed: bool = False

    def read(self, read: Reader, rows: slice) -> Tensor:
        """Reads some rows of the parameter; some experts of a 3-D one."""
        stored = read(self.file).get_slice(self.key)
        if not self.transposed:
            return stored[rows]  # rows 768 to 1536 of (1536, 576): only their bytes are read
        # Conv1D's (in, out): our rows are columns of the file, (96, 32) <- (32, 96). Experts, (experts, in, out), are
        # sharded by their first axis.
        return stored[:, rows].T if len(stored.get_shape()) == 2 else stored[rows].mT

    def first(self, read: Reader, count: int) -> Tensor:
        """The first `count` numbers (up to count,) of the parameter's first row, or expert."""
        stored = read(self.file).get_slice(self.key)
        num_axes = len(stored.get_shape())
        first, most = slice(0, 1), slice(0, count)
        if not self.transposed:
            found = stored[first] if num_axes == 1 else stored[first, most]
        elif num_axes == 2:
            found = stored[most, first].T  # (in, out) -> (1, count)
        else:
            found = stored[first, :, most].mT  # (experts, in, out) -> (1, count, in)
        return found.flatten()[:count]


@dataclass(frozen=True)
class ExpertPlaces:
    """The place of a 3-D parameter: for each expert, the matrices that are stacked by rows."""

    matrices: tuple[tuple[Place, ...], ...]

    def read(self, read: Reader, rows: slice) -> Tensor:
        """Reads the weights of some experts."""
        whole = slice(None)
        # gate and up of each of 4 experts, (48, 32) each, one below the other: (4, 96, 32)
        return torch.stack([torch.cat([place.read(read, whole) for place in of]) for of in self.matrices[rows]])

    def first(self, read: Reader, count: int) -> Tensor:
        """The first `count` numbers (up to count,) of the first expert."""
        return torch.cat([place.read(read, slice(0, count)) for place in self.matrices[0]]).flatten()[:count]


@dataclass(frozen=True)
class GgufPlace:
    """The place of a parameter in a GGUF file. A read dequantizes all of it."""

    weights: GgufWeights
    name: str
    """As transformers names it."""
    transposed: bool = False

    @property
    def file(self) -> Path:
        return self.weights.file

    def read(self, read: Reader, rows: slice) -> Tensor:
        """Reads some rows of the parameter, in fp32."""
        whole = self.weights.read(self.name)
        return (whole.mT if self.transposed else whole)[rows]

    def first(self, read: Reader, count: int) -> Tensor:
        """The first `count` numbers (up to count,) of the parameter's first row."""
        if self.transposed:
            return self.read(read, slice(0, 1)).flatten()[:count].clone()  # not a view that holds all of it
        return self.weights.first_row(self.name)[:count].clone()


AnyPlace = Place | ExpertPlaces | GgufPlace


def _matrices_of(place: AnyPlace) -> list[Place | GgufPlace]:
    """The places of the matrices of a parameter."""
    return [each for of in place.matrices for each in of] if isinstance(place, ExpertPlaces) else [place]


@dataclass(frozen=True)
class Checkpoint:
    """The place of each parameter of a model, by its name without weight scaling."""

    source: str
    places: Mapping[str, AnyPlace]

    def read(self, name: str) -> Tensor:
        """Reads a whole parameter, in its stored dtype."""
        with opened_files() as read:
            return self.places[name].read(read, slice(None))

    def states(self) -> list[list[Any]]:
        """Name, size and time of each weight file; hashing their content would take a pass over the disk."""
        files = sorted({matrix.file for place in self.places.values() for matrix in _matrices_of(place)})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def fingerprint(self) -> str:
        """The `castlm.distributed.loading.fingerprint` of the model with these weights."""
        with opened_files() as read:
            return fingerprint_of({name: place.first(read, FIRST) for name, place in self.places.items()})


def open_sharded(name: str, *, trust_remote_code: bool, revision: str | None) -> tuple[Loaded, Checkpoint] | None:
    """The model that `load_model` would load, without its weights: parameters on the meta device, buffers real.

    Returns None if a rank cannot read its weights one by one: for weights that transformers converts while loading,
    and for damaged weights, for which `load_model` then raises.
    """
    where, config, tokenizer = open_model(name, trust_remote_code=trust_remote_code, revision=revision)
    dtype = stored_dtype(where, config)
    model = empty_model(config, trust_remote_code=trust_remote_code)
    if any(buffer.is_meta for buffer in model.buffers()):
        return None
    if where.gguf:
        with quiet(where), as_input_error(where):
            places = _gguf_places(model, Path(where.target) / where.gguf["gguf_file"])
        forget_gguf()  # the header, with the vocabulary
    else:
        places = _places(model, weights_of(where, config))
    if places is None:
        return None
    if model.can_generate() and not where.gguf:
        with quiet(where), contextlib.suppress(OSError):  # the model may have no generation config
            model.generation_config = GenerationConfig.from_pretrained(where.target, revision=where.revision)
    return Loaded(model.eval(), tokenizer, where.source, dtype), Checkpoint(where.source, places)


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with fp32 parameters on the meta device and real buffers; Conv1D and experts are layers."""
    # `torch.device("meta")` would leave buffers without values too, and they cannot be read from the files.
    with _WeightsOnMeta():
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    made = {p: nn.Parameter(p.to("meta")) for p in model.parameters() if not p.is_meta}  # norms, of `torch.ones`
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in made:
                setattr(module, name, made[parameter])
    linearize_(model)
    return model


def _gguf_places(model: PreTrainedModel, file: Path) -> dict[str, AnyPlace] | None:
    """The place of each parameter in a GGUF file; None if it holds one in another shape, or not alone."""
    weights, layout = gguf_weights(file, model), StoredLayout(model)
    places: dict[str, AnyPlace] = {}
    for parameter, names in _names_of_parameters(model).items():
        is_transposed = any(map(layout.is_transposed, names))
        shape = tuple(parameter.mT.shape if is_transposed else parameter.shape)
        found = None if weights is None else next((name for name in names if weights.shape(name) == shape), None)
        if weights is None or found is None:
            return None
        places[names[0]] = GgufPlace(weights, found, is_transposed)
    return places


Stored = Mapping[str, StoredTensor]


def _places(model: PreTrainedModel, stored: Stored) -> dict[str, AnyPlace] | None:
    """The place of each parameter; None if the names and shapes in the files are not the model's own."""
    layout = StoredLayout(model)
    places: dict[str, AnyPlace] = {}
    known: set[str] = set()
    for parameter, names in _names_of_parameters(model).items():
        place: AnyPlace | None = None
        fqn, _, leaf = names[0].rpartition(".")
        parts = layout.parts(fqn) if leaf == "weight" and isinstance(model.get_submodule(fqn), SparseLayer) else []
        if parts and parts[0].expert is not None:  # a stored matrix for each expert
            place = _expert_places(parts, model.get_submodule(fqn), stored)
            possible = [part.name for part in parts]
        else:
            empty = torch.empty(parameter.shape, device="meta")
            renamed = list(layout.to_stored({names[0]: empty}))  # the family may have another name for it on disk
            keys = [layout.key(name) for name in names]
            if len(renamed) != 1 or (parts and parameter.dim() == 3 and renamed != keys):
                return None  # several stored tensors, or experts that transformers converts
            # Every name of a tied weight, each with and without the backbone's prefix `model.`, which older files lack.
            possible = [*(found for key in keys for found in layout.possible_names(key)), *renamed]
            found = next((name for name in possible if name in stored), None)
            if found is not None:
                tensor, is_transposed = stored[found], any(map(layout.is_transposed, names))
                expected = empty.mT.shape if is_transposed else empty.shape
                place = Place(tensor.file, found, is_transposed) if expected == tensor.shape else None
        if place is None:
            return None
        places[names[0]] = place
        known |= set(possible)
    # A stored tensor that no parameter has, or a buffer that is stored, means that transformers would load something
    # else than we read: the whole model is loaded by transformers then.
    unknown = [key for key in stored if key not in known and not OLD_BUFFERS.search(f".{key}")]
    buffers = dict(model.named_buffers())
    has_stored_buffers = any(name in buffers for name in model.state_dict())
    return None if unknown or has_stored_buffers else places


def _names_of_parameters(module: nn.Module) -> dict[Tensor, list[str]]:
    """The names of each parameter; tied weights have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _expert_places(parts: Sequence[Part], layer: nn.Module, stored: Stored) -> ExpertPlaces | None:
    """The places of the experts of a layer; None if the files lack one of its parts."""
    assert isinstance(layer, ExpertLinear)
    of_expert: list[list[Place]] = [[] for _ in range(layer.num_experts)]
    for part in parts:  # in the order of rows
        tensor = stored.get(part.name)
        if tensor is None or tensor.shape != part.shape or part.expert is None:
            return None
        of_expert[part.expert].append(Place(tensor.file, part.name))
    return ExpertPlaces(tuple(map(tuple, of_expert))) if all(of_expert) else None


def materialize_(module: nn.Module, device: torch.device) -> None:
    """Allocates memory for parameters on the meta device, uninitialised, in place; moves buffers and other parameters.

    Tied weights stay tied.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    # `to_empty` gives every tensor new memory: what has values, such as rotary frequencies (32,), is copied back.
    held = {name: local(tensor).detach() for name, tensor in parameters.items() if not local(tensor).is_meta}
    held |= dict(module.named_buffers(remove_duplicate=False))
    names = _names_of_parameters(module)
    module.to_empty(device=device)  # also of what has values, which is why `held` refers to them
    for first, *others in names.values():  # `to_empty` makes one parameter for each name
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, module.get_parameter(first))
    with torch.no_grad():
        tensors = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        for name, tensor in held.items():
            local(tensors[name]).copy_(tensor)


@torch.no_grad()
def load_rows_(model: PreTrainedModel, checkpoint: Checkpoint, world: World) -> None:
    """Reads this rank's rows of every parameter, which must be finite; weight scales are ones."""
    failure = None
    with opened_files() as read:
        for name, parameter in model.named_parameters():
            stored_name = dense_name(name)
            if stored_name not in checkpoint.places:
                local(parameter).fill_(1.0)  # a weight scale
                continue
            rows = own_rows(parameter)
            if rows.stop == rows.start:  # fewer rows than ranks
                continue
            try:
                value = _read_finite(checkpoint, stored_name, read, rows)
            except InputError as error:
                failure = str(error)
                break
            local(parameter).copy_(value)  # casts to the parameter's dtype
    world.check_all(failure)  # of any rank: all ranks call this, and all stop


def check_weights(checkpoint: Checkpoint, world: World) -> None:
    """Checks that all weights can be read and are finite, each by one rank; all ranks call it, and stop together.

    A start reads every weight again, block by block, and checks it again. This pass over the files before it finds in
    seconds what would otherwise end a start in its last block: 8B in bf16 are 16 GB, and take an NVMe disk 11 s of a
    start of many minutes. It reads a file in pieces of 4 MiB, as the pages of a mapped one would count as memory of
    this process.
    """
    failure = None
    header_of = functools.cache(read_header)
    for name in sorted(checkpoint.places)[world.rank :: world.size]:  # each weight is read by one rank
        what = f"{name} of {checkpoint.source}"
        try:
            for matrix in _matrices_of(checkpoint.places[name]):
                if isinstance(matrix, GgufPlace):
                    with opened_files() as read:
                        _read_finite(checkpoint, name, read, slice(None))
                elif count_non_finite(header_of(matrix.file)[matrix.key]):
                    raise InputError(f"{what} holds NaN or infinity: the model is damaged")
        except InputError as error:
            failure = str(error)
            break
        except OSError as error:
            failure = f"{what} cannot be read: {error}"
            break
    world.check_all(failure, patient=True)  # the others may read longer


def _read_finite(checkpoint: Checkpoint, name: str, read: Reader, rows: slice) -> Tensor:
    """Some rows of a weight. Raises `InputError` if they cannot be read or are not finite."""
    what = f"{name} of {checkpoint.source}"
    try:
        value = checkpoint.places[name].read(read, rows)
    except Exception as error:  # safetensors' own type
        raise InputError(f"{what} cannot be read: {error}") from error
    check_finite(what, value)
    return value


@contextlib.contextmanager
def opened_files() -> Iterator[Reader]:
    """Opens safetensors files at their first use, and closes them at the end of the context."""
    with contextlib.ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(file: Path) -> Any:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, "pt"))
            return opened[file]

        yield read
