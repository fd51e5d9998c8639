"""A model in the engine: weights from a folder, packed or plain, in the order in which this processor reads them.

`Model.open` reads config.json and the weight files. A model of transformers in memory comes in through `Model`, which
asks a `Weights` for each matrix and vector by its name in the files.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from castlm_runtime import library
from castlm_runtime.errors import InputError, naming
from castlm_runtime.families import Description, describe
from castlm_runtime.formats import FORMATS, PACKABLE
from castlm_runtime.machine import physical_cores, processors
from castlm_runtime.packed import PackedArray, PackedSpec, read_array, read_specs, to_fp32
from castlm_runtime.reading import read_json_object
from castlm_runtime.stored import (
    INDEX,
    PACKED_INDEX,
    SINGLE,
    OpenFiles,
    StoredTensor,
    check_weight_files,
    packed_weights,
    read_headers,
    read_weight_map,
)

BLOCK = 64
"""Positions of a block of the cache (`kBlockTokens` of engine.h)."""

CACHE_KINDS = ("bf16", "int8", "fp32")
"""The formats in which a cache keeps keys and values."""

_ALIGNMENT = 64
_FLOATS = ("F32", "F16", "BF16")
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")

Rows = slice | np.ndarray | None
"""Some rows of a matrix: from one to another, or by number; None for all."""


@dataclass(frozen=True)
class Prepared:
    """A weight whose buffer is in the order of the kernels already, as `castlm`'s packed layers hold it.

    Attributes:
        owner: keeps the buffer alive.
    """

    address: int
    num_bytes: int
    rows: int
    columns: int
    owner: object


class Weights(Protocol):
    """Where the weights of a model come from, by their names in the files."""

    def spec(self, name: str) -> PackedSpec | None:
        """The shape and format of a matrix, or of a tensor of all experts; None if there is none of this name."""

    def matrix(self, name: str, rows: Rows) -> PackedArray | Prepared:
        """A matrix, or some of its rows."""

    def vector(self, name: str) -> np.ndarray | None:
        """A norm or a bias in fp32; None if there is none of this name."""


class StoredWeights:
    """The weights of a file, or of the files of an index. Raises `InputError` where they are damaged or incomplete."""

    def __init__(self, file: Path):
        if not file.is_file():
            raise InputError(f"{file} does not exist: name the folder of a model in safetensors")
        weight_map = read_weight_map(file) if file.name in (PACKED_INDEX, INDEX) else {}
        files = [file.parent / name for name in sorted({*weight_map.values()} or {file.name})]
        check_weight_files(files, file.parent)
        self._files = OpenFiles()
        self.tensors = read_headers(files, weight_map, file)
        self.specs = read_specs(self.tensors)

    def spec(self, name: str) -> PackedSpec | None:
        if name in self.specs:
            return self.specs[name]
        tensor = self._plain(name)
        if tensor is None:
            return None
        values = next((kind for kind in PACKABLE if FORMATS[kind].stored == tensor.dtype), None)
        if len(tensor.shape) not in (2, 3) or tensor.dtype not in _FLOATS or values is None:
            raise InputError(
                f"{tensor.name} is {tensor.dtype} {tensor.shape}: a matrix of bf16, fp16 or fp32 is needed"
            )
        return PackedSpec.of_stored(tensor.shape, len(tensor.shape) - 1, 0, 0, values)

    def _plain(self, name: str) -> StoredTensor | None:
        return self.tensors.get(f"{name}.weight") or self.tensors.get(name)

    def matrix(self, name: str, rows: Rows) -> PackedArray:
        spec, plain = self.spec(name), self._plain(name)
        assert spec is not None
        if name in self.specs:
            parts = {suffix: self.tensors[f"{name}.{suffix}"] for suffix in spec.tensors()}
        else:
            assert plain is not None
            parts = {"values": plain._replace(shape=(spec.rows, spec.columns))}
        if isinstance(rows, slice):
            parts = {suffix: tensor.rows(rows.start, rows.stop) for suffix, tensor in parts.items()}
            spec = replace(spec, rows=rows.stop - rows.start, experts=0)
        found = PackedArray.read(spec, parts, self._files)
        return found.take(rows) if isinstance(rows, np.ndarray) else found

    def vector(self, name: str) -> np.ndarray | None:
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.dtype not in _FLOATS or len(tensor.shape) != 1:
            raise InputError(f"{name} is {tensor.dtype} {tensor.shape}: a vector of floats is needed")
        return to_fp32(read_array(tensor, self._files), tensor.dtype)


def _weight_file(config: Mapping[str, Any], folder: Path) -> Path:
    """The file or index of the weights that config.json names: of a packed folder, or else of a plain one."""
    packing, other = config.get("quantization_config"), config.get("transformers_weights")
    if name := packed_weights(packing, f"config.json of {folder}"):
        return folder / name
    if packing is not None:
        method = packing.get("quant_method") if isinstance(packing, dict) else packing
        raise InputError(f"{folder} is quantized by {method!r:.40}, which castlm-runtime does not read: pack the model")
    if other is not None:
        raise InputError(f"config.json of {folder} names the weights {other!r:.200}: remove transformers_weights")
    return folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)


@dataclass
class Part:
    """The new tokens of one sequence in a pass: part of a prompt, or one token.

    Attributes:
        tokens: their ids.
        position: the number of tokens before them, whose keys and values are in `blocks`.
        blocks: the numbers of the blocks of all positions, those of the new tokens among them.
        logits: fp32, written: (vocabulary,) after the last token, or (tokens, vocabulary); None if none are wanted.
    """

    tokens: Sequence[int]
    position: int
    blocks: Sequence[int]
    logits: np.ndarray | None = None


class Model:
    """A model in the engine.

    Args:
        description: see `castlm_runtime.families.describe`.
        weights: its weights, read once.
        threads: of the passes, at most as many as the process may use processors: more would wait for each other; 0
            takes the physical cores.
        progress: takes the finished matrices and all of them.

    Raises:
        InputError: a weight that is missing, has another shape than the config says, or is not finite; or kernels
            that were not built.
    """

    def __init__(
        self,
        description: Description,
        weights: Weights,
        threads: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.description = description
        self.threads = min(threads or physical_cores(), len(processors()))
        self._library = library.built()
        self._kept: list[object] = []
        spec = self._spec(description, weights, progress)
        self._handle = ctypes.c_void_p()
        code = self._library.castlm_model_new(ctypes.byref(spec), ctypes.byref(self._handle))
        library.check_memory(code)
        if code:
            raise InputError("the sizes in config.json do not fit the weights: fetch or pack the model again")
        self._free = weakref.finalize(self, self._library.castlm_model_free, self._handle)
        library.trim_memory()

    @classmethod
    def open(cls, folder: str | Path, threads: int = 0) -> Model:
        """The model of a folder, packed or plain. Raises `InputError` as `describe` and `Model` do."""
        folder = Path(folder)
        config = read_json_object(folder / "config.json", "name the folder of a model")
        return cls(describe(config), StoredWeights(_weight_file(config, folder)), threads)

    @property
    def vocabulary(self) -> int:
        return self.description.vocabulary

    @property
    def context(self) -> int:
        """The most tokens of a sequence."""
        return self.description.context

    # ---- weights

    def _spec(self, of: Description, weights: Weights, progress: Callable[[int, int], None]) -> ctypes.Structure:
        plan = _plan(of, weights)
        wanted = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for _, _, size in plan.values())
        arena, offset = library.allocate(wanted), 0
        self._kept.append(arena)
        weight_ref, layer_spec = library.structure("WeightRef"), library.structure("LayerSpec")
        expert_spec = library.structure("ExpertSpec")
        references: dict[str, Any] = {}
        for number, (place, (name, rows, size)) in enumerate(plan.items(), 1):
            with naming(name):
                found = weights.matrix(name, rows)
                if isinstance(found, Prepared):
                    self._kept.append(found.owner)
                    references[place] = weight_ref(found.address, found.num_bytes, found.rows, found.columns, None)
                else:
                    buffer = arena[offset : offset + size]
                    found.repack_(buffer, self.threads)
                    shape = found.spec.rows, found.spec.columns
                    references[place] = weight_ref(library.address(buffer), size, *shape, None)
                    offset += -(-size // _ALIGNMENT) * _ALIGNMENT
                bias = weights.vector(f"{name}.bias")
                if bias is not None:
                    references[place].bias = self._vector(bias if rows is None else bias[rows], of_name=f"{name}.bias")
            progress(number, len(plan))
        layers = (layer_spec * of.num_layers)()
        tables = self._rotary_tables(of)
        for i in range(of.num_layers):
            at, names = f"{of.family.root}.layers.{i}", of.family.norms
            norms = [None if norm is None else self._norm(weights, f"{at}.{norm}.weight", of.hidden) for norm in names]
            width = of.heads * of.head_dim if of.family.wide_head_norms else of.head_dim
            kv_width = of.kv_heads * of.head_dim if of.family.wide_head_norms else of.head_dim
            cosines, sines = tables.get(id(of.ropes[i]), (None, None))
            parts = [*_ATTENTION, *_MLP, "router"]
            experts = [
                expert_spec(**{part: references[f"{i}.{e}.{part}"] for part in _MLP})
                for e in range(of.num_experts if of.routed[i] else 0)
            ]
            array = (expert_spec * len(experts))(*experts)
            self._kept.append(array)
            layers[i] = layer_spec(
                **{part: references[f"{i}.{part}"] for part in parts if f"{i}.{part}" in references},
                experts=ctypes.addressof(array) if experts else None,
                attention_norm=norms[0],
                mlp_norm=norms[1],
                post_attention_norm=norms[2],
                post_mlp_norm=norms[3],
                q_norm=self._norm(weights, f"{at}.self_attn.q_norm.weight", width, is_needed=False),
                k_norm=self._norm(weights, f"{at}.self_attn.k_norm.weight", kv_width, is_needed=False),
                cosines=cosines,
                sines=sines,
                window=of.windows[i],
            )
        self._kept.append(layers)
        rotary = next((2 * len(rope.frequencies) for rope in of.ropes if rope is not None), of.head_dim)
        return library.structure("ModelSpec")(
            num_layers=of.num_layers,
            hidden=of.hidden,
            heads=of.heads,
            kv_heads=of.kv_heads,
            head_dim=of.head_dim,
            intermediate=of.intermediate,
            vocabulary=of.vocabulary,
            max_positions=of.context,
            rotary_dim=rotary,
            activation=library.codes("activations")[of.activation],
            wide_head_norms=of.family.wide_head_norms,
            layer_norms=of.family.has_layer_norms,
            is_parallel=of.is_parallel,
            num_experts=of.num_experts,
            experts_per_token=of.experts_per_token,
            expert_intermediate=of.expert_intermediate,
            normalizes_experts=of.normalizes_experts,
            epsilon=of.epsilon,
            attention_scale=of.attention_scale,
            embedding_scale=of.embedding_scale,
            residual_scale=of.residual_scale,
            logit_scale=of.logit_scale,
            logit_cap=of.logit_cap,
            layers=ctypes.addressof(layers),
            norm=self._norm(weights, f"{of.family.root}.{of.family.norm}.weight", of.hidden),
            head=references["head"],
            embedding=references.get("embedding", references["head"]),
        )

    def _vector(self, values: np.ndarray, of_name: str) -> int:
        if not np.isfinite(values).all():
            raise InputError(f"{of_name} holds NaN or infinity: the model is damaged")
        values = np.ascontiguousarray(values, np.float32)
        self._kept.append(values)
        return library.address(values)

    def _norm(self, weights: Weights, name: str, width: int, is_needed: bool = True) -> int | None:
        values = weights.vector(name)
        if values is None and not is_needed:
            return None
        if values is None or values.shape != (width,):
            found = "missing" if values is None else f"of shape {values.shape}"
            raise InputError(f"{name} is {found}, and config.json asks for {width}: fetch or pack the model again")
        values = values + np.float32(self.description.family.norm_offset)
        if not is_needed or not self.description.family.has_layer_norms:
            return self._vector(values, name)
        bias = weights.vector(name.removesuffix("weight") + "bias")
        if bias is None or bias.shape != (width,):
            raise InputError(f"{name} has no bias of {width} numbers beside it: fetch or pack the model again")
        return self._vector(np.concatenate([values, bias]), name)

    # ---- rotary embeddings: a table for the whole context is reserved, and filled as far as sequences come

    def _rotary_tables(self, of: Description) -> dict[int, tuple[int, int]]:
        self._tables: list[tuple[Any, np.ndarray, np.ndarray]] = []
        self._num_filled = 0
        found = {}
        for rope in of.ropes:
            if rope is not None and id(rope) not in found:
                width = len(rope.frequencies)
                both = [np.frombuffer(library.allocate(4 * of.context * width), np.float32) for _ in range(2)]
                cosines, sines = (table.reshape(of.context, width) for table in both)
                self._tables.append((rope, cosines, sines))
                found[id(rope)] = (library.address(cosines), library.address(sines))
        return found

    def _fill(self, num_positions: int) -> None:
        """Computes cosines and sines of the first `num_positions` positions."""
        if num_positions <= self._num_filled:
            return
        last = min(self.context, max(num_positions, self._num_filled + 1024))
        positions = np.arange(self._num_filled, last, dtype=np.float32)[:, None]
        for rope, cosines, sines in self._tables:
            angles = positions * rope.frequencies
            cosines[self._num_filled : last] = np.cos(angles) * np.float32(rope.factor)
            sines[self._num_filled : last] = np.sin(angles) * np.float32(rope.factor)
        self._num_filled = last

    # ---- passes

    def forward(self, cache: Cache, parts: Sequence[Part]) -> None:
        """Runs the new tokens of many sequences in one pass; writes the logits that they ask for.

        Raises:
            MemoryError: there is no memory for the activations, or for the cache.
        """
        rows: Any = (library.structure("Sequence") * len(parts))()
        held: list[np.ndarray] = []
        for row, part in zip(rows, parts):
            tokens, blocks = np.asarray(part.tokens, np.int32), np.asarray(part.blocks, np.int32)
            held += [tokens, blocks]
            self._fill(part.position + len(tokens))
            assert len(blocks) == -(-(part.position + len(tokens)) // BLOCK)
            row.tokens, row.count, row.position = library.address(tokens), len(tokens), part.position
            row.blocks = library.address(blocks)
            if part.logits is not None:
                assert part.logits.dtype == np.float32
                row.logits, row.all_logits = library.address(part.logits), int(part.logits.ndim == 2)
                assert part.logits.shape in ((self.vocabulary,), (len(tokens), self.vocabulary))
        code = self._library.castlm_forward(self._handle, cache.handle, rows, len(parts), self.threads)
        library.check_memory(code)
        assert not code, f"the engine refused a pass: {code}"

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits (tokens, vocabulary) after each of the tokens of one sequence, in a cache of its own in fp32."""
        count = -(-len(tokens) // BLOCK)
        cache = Cache(self, "fp32", count)
        try:
            logits = np.empty((len(tokens), self.vocabulary), np.float32)
            self.forward(cache, [Part(tokens, 0, range(count), logits)])
        finally:
            cache.close()
        return logits


class Cache:
    """Keys and values of all layers in blocks of 64 positions; memory is taken as blocks are written.

    Args:
        kind: bf16, int8 or fp32.
    """

    def __init__(self, model: Model, kind: str, num_blocks: int):
        self._model = model
        self.kind, self.num_blocks = kind, num_blocks
        self.handle = ctypes.c_void_p()
        code = model._library.castlm_cache_new(
            model._handle, library.codes("caches")[kind], num_blocks, ctypes.byref(self.handle)
        )
        library.check_memory(code)
        assert not code, "the engine refused the cache"
        self._free = weakref.finalize(self, model._library.castlm_cache_free, self.handle)

    def close(self) -> None:
        """Frees the memory, as the end of the object does."""
        self._free()

    def release(self, blocks: Sequence[int]) -> None:
        """Gives the memory of blocks back to the system."""
        numbers = np.asarray(blocks, np.int32)
        self._model._library.castlm_cache_release(self.handle, library.address(numbers), len(numbers))


def block_bytes(model: Model, kind: str) -> int:
    """Bytes of a block of the cache."""
    return int(model._library.castlm_cache_block_bytes(model._handle, library.codes("caches")[kind]))


# ---- which matrices a model has


def _plan(of: Description, weights: Weights) -> dict[str, tuple[str, Rows, int]]:
    """The matrices of a model by their place in the engine: the name in the files, the rows, the bytes in memory.

    Places are such as "3.q", "3.router", and "3.7.up" of expert 7.
    """
    found: dict[str, tuple[str, Rows, int]] = {}

    def add(name: str, places: Mapping[str, tuple[int, Rows]], columns: int, experts: int = 0) -> None:
        spec, whole = weights.spec(name), sum(rows for rows, _ in places.values())
        wanted = (experts, whole // experts, columns) if experts else (whole, columns)
        if spec is None or spec.unpacked_shape != wanted or spec.transposed:
            shape = "missing" if spec is None else f"of shape {_by(spec.unpacked_shape)}"
            raise InputError(
                f"{name} is {shape}, and config.json asks for {_by(wanted)}: fetch or pack the model again"
            )
        for place, (rows, part) in places.items():
            found[place] = (name, part, library.packed_bytes(spec.values, spec.n, spec.m, rows, columns))

    # The largest ones come first: while a matrix is read, it is there twice, and the others have no memory yet.
    family, embedding = of.family, f"{of.family.root}.{of.family.embedding}"
    head = next((name for name in family.heads if weights.spec(name)), family.heads[0])
    add(embedding if of.is_tied else head, {"head": (of.vocabulary, None)}, of.hidden)
    if not of.is_tied:
        add(embedding, {"embedding": (of.vocabulary, None)}, of.hidden)
    queries, keys = of.heads * of.head_dim, of.kv_heads * of.head_dim
    rows = {"q": queries, "k": keys, "v": keys, "o": of.hidden}
    rows |= {"gate": of.intermediate, "up": of.intermediate, "down": of.hidden}
    for i in range(of.num_layers):
        at, is_routed = f"{family.root}.layers.{i}", of.routed[i]
        for name, parts in family.matrices.items():
            if is_routed and parts[0] in _MLP:
                continue
            columns = queries if parts[0] == "o" else of.intermediate if parts[0] == "down" else of.hidden
            places = _places(parts, rows, of.head_dim if family.interleaves_heads else 0)
            add(f"{at}.{name}", {f"{i}.{part}": rows_of for part, rows_of in places.items()}, columns)
        if not is_routed:
            continue
        assert family.experts is not None
        layouts, width = family.experts.layouts, of.expert_intermediate
        layout = next((names for names in layouts if weights.spec(f"{at}.{next(iter(names)).format(0)}")), layouts[0])
        for name, parts in layout.items():
            columns = width if parts[0] == "down" else of.hidden
            rows_of_expert = {"router": of.num_experts, "gate": width, "up": width, "down": of.hidden}
            if parts == ("router",):
                add(f"{at}.{name}", {f"{i}.router": (of.num_experts, None)}, columns)
            elif "{}" in name:
                places = _places(parts, rows_of_expert, 0)
                for e in range(of.num_experts):
                    here = {f"{i}.{e}.{part}": rows_of for part, rows_of in places.items()}
                    add(f"{at}.{name.format(e)}", here, columns)
            else:
                each = {f"{i}.{e}.{part}": rows_of_expert[part] for e in range(of.num_experts) for part in parts}
                add(f"{at}.{name}", _consecutive(each), columns, of.num_experts)
    return found


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _places(parts: Sequence[str], rows: Mapping[str, int], head_dim: int) -> dict[str, tuple[int, Rows]]:
    """The number of rows of each part of a stored matrix, and which they are.

    Args:
        head_dim: of parts that are stored head by head; 0 where each part is stored whole.
    """
    if len(parts) == 1:
        return {parts[0]: (rows[parts[0]], None)}
    if head_dim:
        # (heads, parts, head_dim): the rows of a part are not together
        numbers = np.arange(len(parts) * rows[parts[0]]).reshape(-1, len(parts), head_dim)
        return {part: (rows[part], numbers[:, j].ravel()) for j, part in enumerate(parts)}
    return _consecutive({part: rows[part] for part in parts})


def _consecutive(rows: Mapping[str, int]) -> dict[str, tuple[int, Rows]]:
    """The number of rows of each place, and the slice that it has in a matrix in which they follow each other."""
    ends = itertools.accumulate(rows.values())
    return {place: (count, slice(end - count, end)) for (place, count), end in zip(rows.items(), ends)}


def blocks_for(num_tokens: int) -> int:
    """Blocks of the cache for so many tokens."""
    return math.ceil(num_tokens / BLOCK)
