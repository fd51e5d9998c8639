"""The quantization method "castlm" of vLLM: packed folders, as `castlm pack` and `castlm quantize --packed` write them.

vLLM asks `CastlmConfig.get_quant_method` for the method of each layer while it builds the model. vLLM's loader skips
the packed tensors. Each layer reads its own from the file when the rest is loaded, and only the rows (or columns) of
its rank, so that memory holds the stored tensors of one layer at a time.

A layer of vLLM may fuse several of the model's: `qkv_proj` is q, k and v. Rows are independent, so those of one format
are repacked one below the other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from castlm_runtime import library
from castlm_runtime.errors import InputError, naming
from castlm_runtime.packed import PackedArray, PackedSpec, read_specs
from castlm_runtime.stored import (
    INDEX,
    PACKED_INDEX,
    OpenFiles,
    StoredTensor,
    check_weight_files,
    packed_weights,
    read_headers,
    read_weight_map,
)
from castlm_vllm.kernels import Repacked

logger = init_logger(__name__)

_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
_SUFFIXES = (".values", ".mask", ".scales")


@dataclass(frozen=True)
class StoredWeight:
    """A packed tensor of the folder: its spec, and its stored tensors by suffix."""

    spec: PackedSpec
    parts: Mapping[str, StoredTensor]

    def rows(self, begin: int, end: int) -> PackedArray:
        """Reads some of its rows."""
        parts = {suffix: part.rows(begin, end) for suffix, part in self.parts.items()}
        return PackedArray.read(replace(self.spec, rows=end - begin), parts, OpenFiles())


class CastlmConfig(QuantizationConfig):
    """`quantization_config` of a packed folder's config.json.

    Args:
        weights: the file with the weights, or the index of several.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        if weights is None:  # --quantization castlm with another folder
            raise InputError("the folder is not packed: castlm pack or quantize it, and serve the packed folder")
        self.weights = weights
        self.is_tied = False
        self.packed: dict[str, StoredWeight] = {}
        self.plain: dict[str, None] = {}  # names without values, as a mapper of vLLM takes them

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
        return cls(packed_weights(config, "config.json"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Reads what the folder holds."""
        if not current_platform.is_cpu():
            raise InputError("castlm's kernels in vLLM are of CPUs: serve the plain folder, as castlm unpack writes it")
        library.built()
        folder = _folder(model_name, revision)
        self.is_tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
        tensors = _tensors(folder, self.weights)
        for stem, spec in read_specs(tensors).items():
            if spec.experts or ".experts." in stem:
                raise InputError(f"{stem} is of packed experts, which castlm's plugin does not run: castlm unpack it")
            parts = {suffix: tensors.pop(f"{stem}.{suffix}") for suffix in spec.tensors()}
            self.packed[stem] = StoredWeight(spec, parts)
        self.plain = dict.fromkeys(tensors)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        for names in ("packed", "plain"):
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
        names = [prefix] if prefix in self.packed else fused  # some models fuse layers in their files too
        if all(name in self.packed for name in names):
            return PackedLinearMethod(prefix, [self.packed[name] for name in names])
        if f"{prefix}.weight" in self.plain or all(f"{name}.weight" in self.plain for name in fused):
            return UnquantizedLinearMethod()
        raise InputError(
            f"{self.weights} has no weights for {prefix} of vLLM's model: castlm unpack it, and serve that"
        )

    def _table_method(self, is_head: bool, prefix: str) -> QuantizeMethodBase | None:
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
                pieces = [piece.columns(begin, begin + self.columns) for piece in pieces]
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


def hold_(layer: nn.Module, pieces: list[PackedArray]) -> None:
    """Gives a layer of vLLM its weights in the order of the kernels, those of one format one below the other."""
    joined: list[PackedArray] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and replace(last.spec, rows=piece.spec.rows) == piece.spec:
            joined[-1] = with_rows(last, piece)
        else:
            joined.append(piece)
    layer.castlm = nn.ModuleList(Repacked(piece) for piece in joined)
    warn_of_few_processors()


def with_rows(above: PackedArray, below: PackedArray) -> PackedArray:
    """Two packed weights of one format and width as one."""

    def join(upper: np.ndarray | None, lower: np.ndarray | None) -> np.ndarray | None:
        return None if upper is None else np.concatenate([upper, lower])

    spec = replace(above.spec, rows=above.spec.rows + below.spec.rows)
    return PackedArray(
        spec,
        np.concatenate([above.values, below.values]),
        join(above.mask, below.mask),
        join(above.scales, below.scales),
    )


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


class PackedTableMethod(QuantizeMethodBase):
    """An embedding, or a head, whose table is one buffer; a tied head multiplies by the embedding's.

    Args:
        stored: None for a tied head, which has no tensors of its own.
    """

    def __init__(self, prefix: str, stored: StoredWeight | None):
        self.prefix, self.stored = prefix, stored
        self.tied_to: VocabParallelEmbedding | None = None

    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None:
        pass

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        self.tied_to = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        if self.tied_to is not None:
            layer.castlm = self.tied_to.castlm
            return
        with naming(self.prefix):
            layer.castlm = Repacked(self._table(layer))

    def _table(self, layer: VocabParallelEmbedding) -> PackedArray:
        if self.stored is None:
            raise InputError("the folder has no weights for it, and vLLM ties it to no embedding: castlm unpack it")
        shard = layer.shard_indices
        table = self.stored.rows(shard.org_vocab_start_index, shard.org_vocab_end_index)
        missing = layer.num_embeddings_per_partition - table.spec.rows  # vLLM rounds the vocabulary up
        empty = {
            suffix: np.zeros((missing, array.shape[1]), array.dtype)
            for suffix, array in (("values", table.values), ("scales", table.scales))
            if array is not None
        }
        return with_rows(table, PackedArray(replace(table.spec, rows=missing), **empty))

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return layer.castlm.look_up(ids).to(layer.params_dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = layer.castlm(x)
        return out if bias is None else out + bias


# ---- files


def _folder(name: str, revision: str | None) -> Path:
    """The folder of a model, which is fetched if `name` is a hub id."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _tensors(folder: Path, weights: str) -> dict[str, StoredTensor]:
    """The tensors of a packed folder, by name; it holds no file beside them that vLLM would read."""
    weight_map = read_weight_map(folder / PACKED_INDEX) if weights == PACKED_INDEX else {}
    files = [folder / name for name in sorted({*weight_map.values()} or {weights})]
    check_weight_files(files)
    # vLLM looks for names by these patterns, whatever config.json says, and an index leaves out some of them.
    found = [file for pattern in ("*.safetensors", "*.bin", "*.pt", INDEX) for file in folder.glob(pattern)]
    if others := sorted({*found} - {*files}):
        raise InputError(f"{others[0]} is beside the packed weights, and vLLM would read it, too: remove it")
    return read_headers(files, weight_map, folder / weights)
