"""Loads a model that no rank holds whole: builds it without memory, shards it, and reads each rank's rows.

Buffers such as rotary frequencies are computed and not stored. They are real from the beginning, and are kept over
`to_empty`, which would silently leave garbage in them. A fingerprint, a hash of all weights, is the same in memory and
on disk, on one rank and on many.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from castlm.core.errors import InputError, check_finite, one_line
from castlm.core.experts import ExpertLinear
from castlm.core.shards import local, own_rows
from castlm.core.sparsify import SparseLayer, dense_name
from castlm.dtypes import STORED
from castlm.models.architecture import auto_class, linearize_
from castlm.models.gguf import GgufWeights, forget_gguf, gguf_weights
from castlm.models.io import Loaded, as_input_error, open_model, quiet, stored_dtype, weights_of
from castlm.models.stored_layout import Part, StoredLayout
from castlm.models.weights import OLD_BUFFERS
from castlm.world import World
from castlm_runtime.stored import StoredTensor, byte_chunks, read_header

_PIECE = 1 << 22
"""The number of weights that are hashed at a time."""


def fingerprint(model: nn.Module) -> str:
    """A SHA-256 of the name, shape and fp32 values of every parameter and stored buffer of a dense model in memory.

    A weight has the same hash in any dtype that holds its values. 135M weights take 0.4 s.
    """
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    tensors = dict(model.named_parameters()) | buffers
    return _of_digests({name: _digest(_pieces(tensor.detach())) for name, tensor in tensors.items()})


def _of_digests(digests: Mapping[str, str]) -> str:
    """The fingerprint of a model from the digests of its tensors, by name."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _digest(pieces: Iterable[Tensor]) -> str:
    """A SHA-256 of a tensor, which comes in pieces of whole rows."""
    digest, num_rows, shape = hashlib.sha256(), 0, torch.Size()
    for piece in pieces:
        digest.update(piece.float().cpu().contiguous().numpy().data)
        num_rows, shape = num_rows + len(piece), piece.shape[1:]
    digest.update(repr((num_rows, *shape)).encode())
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor in pieces of whole rows, so that no fp32 copy of all of it is made; a scalar as one number."""
    tensor = tensor[None] if not tensor.dim() else tensor
    pieces: tuple[Tensor, ...] = tensor.split(max(1, _PIECE // max(1, tensor[:1].numel())))
    return pieces


def _stored_pieces(tensor: StoredTensor, transposed: bool, num_experts: int | None) -> Iterator[Tensor]:
    """As `_pieces`, read from a file in chunks, as the pages of a mapped file would count as memory of this process."""
    shape, dtype = tensor.shape or (1,), STORED[tensor.dtype]
    if num_experts is not None:  # end to end
        shape = (num_experts, shape[0] // num_experts, *shape[1:])
    is_whole = transposed and len(shape) == 2  # Conv1D's (in, out): a row of ours is a column of the file
    row = tensor.num_bytes // max(1, 1 if is_whole else shape[0])
    for chunk in byte_chunks(tensor, max(1, row)):
        piece = torch.from_numpy(chunk).view(dtype).view(-1, *shape[1:])
        yield piece.mT if transposed else piece


HeaderOf = Callable[[Path], Mapping[str, StoredTensor]]
"""Reads the header of a safetensors file, each file once."""


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
    num_experts: int | None = None
    """Of matrices that lie end to end in the tensor."""

    def read(self, read: Reader, rows: slice) -> Tensor:
        """Reads some rows of the parameter; some experts of a 3-D one."""
        stored = read(self.file).get_slice(self.key)
        part: Tensor
        if self.num_experts is not None:  # experts 2 to 4 of (4 * 96, 32): (2, 96, 32)
            each, (first, last, _) = stored.get_shape()[0] // self.num_experts, rows.indices(self.num_experts)
            part = stored[each * first : each * last].unflatten(0, (-1, each))
            part = part.mT if self.transposed else part
        elif self.transposed and len(stored.get_shape()) == 2:  # Conv1D's (in, out): our rows are columns of the file
            part = stored[:, rows].T  # (96, 32) <- (32, 96)
        elif self.transposed:  # experts, (experts, in, out), are sharded by their first axis
            part = stored[rows].mT
        else:
            part = stored[rows]  # rows 768 to 1536 of (1536, 576): only their bytes are read
        return part

    def pieces(self, header_of: HeaderOf) -> Iterable[Tensor]:
        """The parameter in pieces of whole rows."""
        return _stored_pieces(header_of(self.file)[self.key], self.transposed, self.num_experts)


@dataclass(frozen=True)
class ExpertPlaces:
    """The place of a 3-D parameter: for each expert, the matrices that are stacked by rows."""

    matrices: tuple[tuple[Place, ...], ...]

    def read(self, read: Reader, rows: slice) -> Tensor:
        """Reads the weights of some experts."""
        whole = slice(None)
        # gate and up of each of 4 experts, (48, 32) each, one below the other: (4, 96, 32)
        return torch.stack([torch.cat([place.read(read, whole) for place in of]) for of in self.matrices[rows]])

    def pieces(self, header_of: HeaderOf) -> Iterable[Tensor]:
        """The parameter in pieces of one expert each."""
        for of_expert in self.matrices:
            # gate and up, (48, 32) each, in chunks: (1, 96, 32)
            rows = [piece.clone() for place in of_expert for piece in place.pieces(header_of)]
            yield torch.cat(rows)[None]


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

    def pieces(self, header_of: HeaderOf) -> Iterable[Tensor]:
        """The parameter in pieces of whole rows."""
        whole = self.weights.read(self.name)
        return _pieces(whole.mT if self.transposed else whole)


AnyPlace = Place | ExpertPlaces | GgufPlace


@dataclass(frozen=True)
class StoredWeights:
    """Where each parameter of a model is stored, by its name without weight scaling."""

    source: str
    places: Mapping[str, AnyPlace]

    @property
    def gguf(self) -> GgufWeights | None:
        """The weights of the GGUF file that holds the parameters; None if other files do."""
        place = next(iter(self.places.values()))
        return place.weights if isinstance(place, GgufPlace) else None

    def read(self, name: str) -> Tensor:
        """Reads a whole parameter, in its stored dtype."""
        with opened_files() as read:
            return self.places[name].read(read, slice(None))

    def fingerprint(self, world: World) -> str:
        """The `castlm.models.loading.fingerprint` of the model with these weights; all ranks call it.

        The one pass over the files before the work also checks that every weight can be read and is finite: 8B in bf16
        are 16 GB, which take an NVMe disk 11 s. Each tensor is read by two ranks, r and r + 1, whose digests must be
        equal: so each node is compared with the next one.

        Raises:
            InputError: a weight cannot be read, or is not finite, or a rank has other files.
        """
        digests, failure = dict[str, str](), None
        header_of = functools.cache(read_header)
        for number, name in enumerate(sorted(self.places)):
            if (world.rank - number) % world.size > 1:
                continue
            what = f"{name} of {self.source}"
            try:
                digests[name] = _digest(self._finite(what, self.places[name].pieces(header_of)))
            except InputError as error:
                failure = str(error)
                break
            except Exception as error:  # gguf's own; the other ranks would wait for this one
                failure = f"{what} cannot be read: {one_line(error)}"
                break
        world.check_all(failure, patient=True)  # the others may read longer
        whole: dict[str, str] = {}
        for rank, of_rank in enumerate(world.gather(digests, patient=True)):
            different = [name for name, digest in of_rank.items() if whole.setdefault(name, digest) != digest]
            if different and failure is None:
                failure = f"rank {rank} has another {different[0]} of {self.source}: give all ranks the same files"
        world.check_all(failure)
        return _of_digests(whole)

    @staticmethod
    def _finite(what: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces of a weight, each checked."""
        for piece in pieces:
            check_finite(what, piece)
            yield piece


def open_sharded(name: str, *, trust_remote_code: bool, revision: str | None) -> tuple[Loaded, StoredWeights] | None:
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
            model.generation_config = GenerationConfig.from_pretrained(where.target, revision=where.revision or "main")
    return Loaded(model.eval(), tokenizer, where.source, dtype), StoredWeights(where.source, places)


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with fp32 parameters on the meta device and real buffers; Conv1D and experts are layers."""
    # `torch.device("meta")` would leave buffers without values too, and they cannot be read from the files.
    with _WeightsOnMeta():
        model: PreTrainedModel = auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
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
                layer = model.get_submodule(fqn)
                num_experts = layer.num_experts if isinstance(layer, ExpertLinear) and layer.is_flat else None
                expected = empty.mT.shape if is_transposed and num_experts is None else empty.shape
                if num_experts is not None:
                    expected = layout.in_files(names[0], empty).shape
                place = Place(tensor.file, found, is_transposed, num_experts) if expected == tensor.shape else None
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
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        for name, tensor in held.items():
            local(tensors[name]).copy_(tensor)


@torch.no_grad()
def load_rows_(model: PreTrainedModel, checkpoint: StoredWeights, world: World) -> None:
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
                value = read_finite(checkpoint, stored_name, read, rows)
            except InputError as error:
                failure = str(error)
                break
            local(parameter).copy_(value)  # casts to the parameter's dtype
    world.check_all(failure)  # of any rank: all ranks call this, and all stop


def read_finite(checkpoint: StoredWeights, name: str, read: Reader, rows: slice) -> Tensor:
    """Reads some rows of a weight. Raises `InputError` if they cannot be read or are not finite."""
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
