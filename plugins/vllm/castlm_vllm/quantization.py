"""The quantization method "castlm" of vLLM: packed folders, and plain n:m folders that are packed after loading.

vLLM asks `CastlmConfig.get_quant_method` for the method of each layer while it builds the model.

- Packed folders (`castlm pack`, `castlm quantize --packed`): vLLM's loader skips the packed tensors. Each layer reads
  its own from the file when the rest is loaded, and only the rows (or columns) of its rank, so that memory holds the
  stored tensors of one layer at a time.
- Plain folders (`--quantization castlm`): vLLM loads and shards dense weights, which are packed in their own dtype or
  rounded to int8.

A layer of vLLM may fuse several of the model's: `qkv_proj` is q, k and v. Rows are independent, so those of one format
are packed one below the other. Only the rooms of castlm that need no transformers are imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from castlm.core.blocks import why_dense
from castlm.core.errors import InputError, naming
from castlm.core.nm import NM, unpack_mask
from castlm.facts import Facts
from castlm.formats.rounding import round_rows, round_table
from castlm.packed import native
from castlm.packed.layers import PackedEmbedding, PackedLinear, prepare_layers_
from castlm.packed.tensor import PackedTensor, pack, pack_integers, read_packed, unpack
from castlm_runtime.formats import FORMATS, HEADS
from castlm_runtime.packed import PackedSpec, read_specs
from castlm_runtime.stored import (
    INDEX,
    PACKED_INDEX,
    PACKED_SINGLE,
    StoredTensor,
    check_weight_files,
    read_headers,
    read_weight_map,
)

logger = init_logger(__name__)

_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
_SUFFIXES = (".values", ".mask", ".scales")


@dataclass(frozen=True)
class StoredWeight:
    """A packed tensor of the folder: its spec, and its stored tensors by suffix."""

    spec: PackedSpec
    parts: Mapping[str, StoredTensor]

    def rows(self, begin: int, end: int) -> PackedTensor:
        """Reads some of its rows."""
        parts = {suffix: part.rows(begin, end) for suffix, part in self.parts.items()}
        return read_packed(replace(self.spec, rows=end - begin), parts)


class CastlmConfig(QuantizationConfig):
    """`quantization_config` of config.json, or of `--hf-overrides` for a plain folder.

    Args:
        weights: the file of a packed folder, or the index of several; None is a plain folder.
        pattern: n:m of a plain folder; None reads its castlm.json.
        values: "int8" rounds the layers of a plain folder; None keeps their dtype.
        head: "int8", "int6" or "int4" rounds the head of a plain folder, and an embedding tied to it; None leaves both
            to vLLM.
    """

    def __init__(
        self, weights: str | None = None, pattern: str | None = None, values: str | None = None, head: str | None = None
    ):
        super().__init__()
        for name, value, known in (("values", values, ("int8",)), ("head", head, HEADS)):
            if value is not None and value not in known:
                raise InputError(
                    f"{name} {value!r} is not {' or '.join(known)}: castlm quantize --packed makes other formats"
                )
        self.weights, self.pattern, self.values, self.head = weights, pattern, values, head
        self.is_tied = False
        self.packed: dict[str, StoredWeight] = {}
        self.plain: dict[str, None] = {}  # names without values, as a mapper of vLLM takes them
        self.left_dense: dict[str, str] = {}

    def get_name(self) -> str:
        return "castlm"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CastlmConfig:
        if "weights" in config or "version" in config:  # as castlm pack writes it
            return cls(weights=config.get("weights", PACKED_SINGLE))
        return cls(pattern=config.get("pattern"), values=config.get("values"), head=config.get("head"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads what the folder holds."""
        if not current_platform.is_cpu():
            raise InputError("castlm's kernels in vLLM are of CPUs: serve the plain folder, as castlm unpack writes it")
        native.built()
        folder = _folder(model_name, revision)
        self.is_tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
        if self.weights is None:
            facts = Facts.read(folder)
            self.pattern = self.pattern or (facts.pattern.rpartition("+")[2] if facts.pattern else None)
            if self.pattern is None:
                raise InputError(
                    f"{model_name} has no castlm.json with a pattern: pass --hf-overrides "
                    """'{"quantization_config": {"quant_method": "castlm", "pattern": "2:4"}}'"""
                )
            NM.parse(self.pattern)
            self.left_dense = facts.left_dense
            return
        tensors = _tensors(folder, self.weights)
        for stem, spec in read_specs(tensors).items():
            if spec.experts or ".experts." in stem:
                raise InputError(f"{stem} is of packed experts, which castlm's plugin does not run: castlm unpack it")
            parts = {suffix: tensors.pop(f"{stem}.{suffix}") for suffix in spec.tensors()}
            self.packed[stem] = StoredWeight(spec, parts)
        self.plain = dict.fromkeys(tensors)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        for names in ("packed", "plain", "left_dense"):
            setattr(self, names, hf_to_vllm_mapper.apply_dict(getattr(self, names)))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drops the packed tensors from the stream that vLLM loads: the layers read them."""
        return WeightsMapper(orig_to_new_suffix=dict.fromkeys(_SUFFIXES))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method(isinstance(layer, ParallelLMHead), prefix)
        return None

    def _linear_method(self, prefix: str) -> LinearMethodBase:
        owner, _, last = prefix.rpartition(".")
        fused = [f"{owner}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
        if self.weights is None:
            if why_dense(prefix) is not None:
                return UnquantizedLinearMethod()
            return PlainLinearMethod(prefix, NM.parse(self.pattern), self.values, fused, self.left_dense)
        names = [prefix] if prefix in self.packed else fused  # some models fuse layers in their files too
        if all(name in self.packed for name in names):
            return PackedLinearMethod(prefix, [self.packed[name] for name in names])
        if f"{prefix}.weight" in self.plain or all(f"{name}.weight" in self.plain for name in fused):
            return UnquantizedLinearMethod()
        raise InputError(
            f"{self.weights} has no weights for {prefix} of vLLM's model: castlm unpack it, and serve that"
        )

    def _table_method(self, is_head: bool, prefix: str) -> QuantizeMethodBase | None:
        if self.weights is None:
            return RoundedTableMethod(prefix, self.head) if self.head else None
        tables = [name for name in self.packed if name.rpartition(".")[2].startswith(_EMBEDDINGS)]
        if not prefix and not is_head and len(tables) == 1:  # some models do not tell their embedding its name
            prefix = tables[0]
        if prefix in self.packed:
            return PackedTableMethod(prefix, self.packed[prefix])
        if is_head and self.is_tied and tables:
            return PackedTableMethod(prefix, None)
        if tables and not is_head and f"{prefix}.weight" not in self.plain:
            raise InputError(f"{self.weights} has no table {prefix} of vLLM's model: castlm unpack it, and serve that")
        return None


# ---- linear layers


class PackedLinearMethod(LinearMethodBase):
    """A layer whose weights, or those of its parts, are in a packed folder."""

    def __init__(self, prefix: str, stored: list[StoredWeight]):
        self.prefix, self.stored = prefix, stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self.columns, self.partitions = input_size_per_partition, output_partition_sizes

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        with naming(self.prefix):
            pieces = [weight.rows(begin, end) for weight, begin, end in self._rows_of_rank(layer)]
            if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
                begin = layer.tp_rank * self.columns
                pieces = [columns_of(piece, begin, begin + self.columns) for piece in pieces]
            hold_(layer, pieces)

    def _rows_of_rank(self, layer: nn.Module) -> list[tuple[StoredWeight, int, int]]:
        """The rows of each partition of this rank, and the stored weight that has them."""
        is_split = not isinstance(layer, RowParallelLinear)  # by rows; a replicated layer counts as one of one rank
        ranks, rank = (getattr(layer, "tp_size", 1), getattr(layer, "tp_rank", 0)) if is_split else (1, 0)
        sharers = [1] * len(self.partitions)
        if isinstance(layer, QKVParallelLinear):  # with fewer key and value heads than ranks, several have the same
            sharers = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
        whole = [size * ranks // sharing for size, sharing in zip(self.partitions, sharers)]
        stored = self.stored
        firsts = [0] * len(whole)
        if len(stored) == 1:  # fused in the file too
            stored, firsts = stored * len(whole), [sum(whole[:part]) for part in range(len(whole))]
            expected = [sum(whole)] * len(whole)
        else:
            expected = whole
        for weight, rows in zip(stored, expected):
            if weight.spec.rows != rows:
                raise InputError(
                    f"the folder has {weight.spec.rows} rows, and vLLM's layer {rows}: castlm unpack it, and serve that"
                )
        begins = [first + rank // sharing * size for first, sharing, size in zip(firsts, sharers, self.partitions)]
        return [(weight, begin, begin + size) for weight, begin, size in zip(stored, begins, self.partitions)]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(layer, x, bias)


class PlainLinearMethod(UnquantizedLinearMethod):
    """A layer of a plain folder, which is packed after vLLM has loaded and sharded it."""

    def __init__(self, prefix: str, pattern: NM, values: str | None, parts: list[str], left_dense: Mapping[str, str]):
        super().__init__()
        self.prefix, self.pattern, self.values, self.left_dense = prefix, pattern, values, left_dense
        self.parts = parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **extra: Any,
    ) -> None:
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **extra)
        self.partitions = output_partition_sizes

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weights = layer.weight.detach().split(self.partitions)
        names = self.parts if len(self.parts) == len(weights) else [self.prefix] * len(weights)
        pieces = []
        for name, weight in zip(names, weights):
            n, m = (0, 0) if is_left_dense(name, self.left_dense) else (self.pattern.n, self.pattern.m)
            with naming(name):
                pieces.append(pack_plain(weight, self.values, n, m))
        del layer.weight
        hold_(layer, pieces)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiply(layer, x, bias)


def is_left_dense(name: str, left_dense: Mapping[str, str]) -> bool:
    """Whether castlm.json lists a layer, or a module that contains it, as left dense."""
    return any(name == owner or name.startswith(f"{owner}.") for owner in left_dense)


def pack_plain(weight: Tensor, values: str | None, n: int, m: int) -> PackedTensor:
    """Packs a weight (rows, columns) in its dtype, or rounded; the zeros of its pattern stay zero."""
    exact = pack(weight.contiguous(), n, m)
    if values is None:
        return exact
    rounded = round_rows(weight, values)
    mask = None if m == 0 else unpack_mask(exact.mask_bits, weight.shape[1])
    return pack_integers(rounded.codes, rounded.scales, values, n, m, mask)


def columns_of(packed: PackedTensor, begin: int, end: int) -> PackedTensor:
    """Some columns of a packed weight.

    Raises:
        InputError: the columns begin or end inside a group of the pattern, or of the scales.
    """
    spec = packed.spec
    group = FORMATS[spec.values].group
    for step in filter(None, (spec.m, group)):
        if begin % step or (end % step and end != spec.columns):
            raise InputError(
                f"{spec.columns} columns cannot be shared in parts of {end - begin}, for {step} of them belong "
                "together: choose another --tensor-parallel-size"
            )
    if packed.scales is None:
        return pack(unpack(packed)[:, begin:end].contiguous(), spec.n, spec.m)
    ones = replace(packed, scales=torch.ones_like(packed.scales))
    codes = unpack(ones)[:, begin:end].to(torch.int8)
    mask = None if packed.mask_bits is None else unpack_mask(packed.mask_bits, spec.columns)[:, begin:end]
    scales = packed.scales[:, begin // group : -(-end // group)] if group else packed.scales
    return pack_integers(codes, scales.float(), spec.values, spec.n, spec.m, mask)


def hold_(layer: nn.Module, pieces: list[PackedTensor]) -> None:
    """Gives a layer of vLLM the castlm layers that multiply by its weights, one below the other."""
    joined: list[PackedTensor] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and replace(last.spec, rows=piece.spec.rows) == piece.spec:
            stacked = {
                suffix: torch.cat([tensor, piece.tensors()[suffix]]) for suffix, tensor in last.tensors().items()
            }
            spec = replace(last.spec, rows=last.spec.rows + piece.spec.rows)
            joined[-1] = PackedTensor(spec, stacked["values"], stacked.get("mask"), stacked.get("scales"))
        else:
            joined.append(piece)
    layer.castlm = nn.ModuleList(PackedLinear(piece.spec).hold_(piece) for piece in joined)
    prepare_layers_({str(number): module for number, module in enumerate(layer.castlm)})
    warn_of_few_processors()


def multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    parts = [part(x) for part in layer.castlm]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out + bias


@functools.cache
def warn_of_few_processors() -> None:
    """castlm's threads run where the thread that begins them may run; Intel's OpenMP binds that to one processor."""
    allowed, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if allowed < threads:
        logger.warning(
            "castlm's %d threads may use %d processors: set VLLM_CPU_OMP_THREADS_BIND=nobind", threads, allowed
        )


# ---- embedding and head


class TableMethod(QuantizeMethodBase):
    """An embedding, or a head, whose table is one buffer of castlm's; a tied head multiplies by the embedding's."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.tied_to: VocabParallelEmbedding | None = None

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        self.tied_to = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        if self.tied_to is not None:
            layer.castlm = self.tied_to.castlm
            return
        with naming(self.prefix):
            packed = self.packed_table(layer)
            table = PackedEmbedding(packed.spec, layer.params_dtype).hold_(packed)
            prepare_layers_({"embedding": table})
        head = PackedLinear(packed.spec)
        head.share_(table.packed)
        layer.castlm = nn.ModuleDict({"embedding": table, "head": head})

    def packed_table(self, layer: VocabParallelEmbedding) -> PackedTensor:
        raise NotImplementedError

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return layer.castlm["embedding"](ids)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = layer.castlm["head"](x)
        return out if bias is None else out + bias


class PackedTableMethod(TableMethod):
    """A table of a packed folder; None is a tied head, which has no tensors of its own."""

    def __init__(self, prefix: str, stored: StoredWeight | None):
        super().__init__(prefix)
        self.stored = stored

    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        pass

    def packed_table(self, layer: VocabParallelEmbedding) -> PackedTensor:
        if self.stored is None:
            raise InputError("the folder has no weights for it, and vLLM ties it to no embedding: castlm unpack it")
        shard = layer.shard_indices
        packed = self.stored.rows(shard.org_vocab_start_index, shard.org_vocab_end_index)
        rows = layer.num_embeddings_per_partition  # vLLM rounds the vocabulary up
        padded = {
            suffix: torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
            for suffix, tensor in packed.tensors().items()
        }
        return PackedTensor(replace(packed.spec, rows=rows), padded["values"], None, padded.get("scales"))


class RoundedTableMethod(TableMethod, UnquantizedEmbeddingMethod):
    """A table of a plain folder, rounded after loading."""

    def __init__(self, prefix: str, kind: str):
        super().__init__(prefix)
        self.kind = kind

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight = embed_tokens.weight
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        super().process_weights_after_loading(layer)
        del layer.weight

    def packed_table(self, layer: VocabParallelEmbedding) -> PackedTensor:
        rounded = round_table(layer.weight.detach(), self.kind)
        return pack_integers(rounded.codes, rounded.scales, self.kind, 0, 0)


# ---- files


def _folder(name: str, revision: str | None) -> Path:
    """The folder of a model, which is fetched if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _tensors(folder: Path, weights: str) -> dict[str, StoredTensor]:
    """The tensors of a packed folder, by name; it holds no file beside them that vLLM would read."""
    if weights not in (PACKED_SINGLE, PACKED_INDEX):
        raise InputError(
            f"config.json of {folder} names the weights {weights!r:.200}, which castlm does not write: pack it again"
        )
    weight_map = read_weight_map(folder / PACKED_INDEX) if weights == PACKED_INDEX else {}
    files = [folder / name for name in sorted({*weight_map.values()} or {PACKED_SINGLE})]
    check_weight_files(files)
    # vLLM looks for names by these patterns, whatever config.json says, and an index leaves out some of them.
    found = [file for pattern in ("*.safetensors", "*.bin", "*.pt", INDEX) for file in folder.glob(pattern)]
    if others := sorted({*found} - {*files}):
        raise InputError(f"{others[0]} is beside the packed weights, and vLLM would read it, too: remove it")
    return read_headers(files, weight_map, folder / weights)
