"""Writes and verifies the result of a sharded run, one tensor at a time: no rank ever holds the whole model.

Each rank writes whole files, all at the same time. In turns, every writer gets the next tensor of its file: the ranks
that hold rows of it send them, folded and in the dtype of the files, to the writer alone.

    4 ranks, 6 files      rank 0     rank 1     rank 2     rank 3
    first round           file 1     file 2     file 3     file 4
    second round          file 5     file 6     sends rows alone

The verification is the same as in `castlm.export.hf`: it counts the pattern in the files, each rank compares its rows
of every tensor bit for bit with memory, and the perplexity is measured again on the model read from disk.
"""

from __future__ import annotations

import copy
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.shards import local
from castlm.core.sparsify import SparseLayer, computed_weight, weight_parameter
from castlm.distributed.sharding import shard_
from castlm.dtypes import equal_in_bits
from castlm.export.hf import completed, verification, verify_pattern, write_facts
from castlm.facts import Facts
from castlm.files.output import atomic_dir
from castlm.files.weights import Layout, into_files, layout_of, write_file, write_index_of
from castlm.models.io import write_all_but_weights
from castlm.models.loading import empty_model, load_rows_, materialize_, open_sharded
from castlm.models.stored_layout import StoredLayout
from castlm.world import World
from castlm_runtime.stored import INDEX

MAX_SHARD_BYTES = 5 * 10**9
_EVAL_TOLERANCE = 1e-6  # relative: the weights are equal bit for bit, but kernels may sum in another order


@dataclass(frozen=True)
class ShardedResult:
    """A trained and pruned model whose parameters are sharded, with the settings of its export."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    world: World
    pattern: Pattern
    left_dense: Mapping[str, str]
    dtype: torch.dtype
    """The dtype of the files."""
    is_sparse: bool
    """False for the dense control, which has no pattern to verify."""
    root: nn.Module
    """The sharded module that holds `model`."""
    precision: str
    """The precision of the forward pass of `root`."""
    wrap: Callable[[PreTrainedModel], nn.Module]
    """Makes a root like `root` for another model, without a teacher."""
    measure: Callable[[Any], float]
    """Measures the perplexity of the model in a sharded root, in fp32; all ranks call it."""


def export_sharded(result: ShardedResult, record: Facts) -> Facts:
    """Writes `output_dir/model` with its record, and verifies it; returns castlm.json. All ranks call it.

    Raises:
        InputError: the disk is full, or the verification fails.
    """
    world = result.world
    folder = Path(os.path.realpath(result.folder))
    pattern = result.pattern if result.is_sparse else None
    facts = completed(record, pattern, result.left_dense, result.dtype)
    result.root.reshard()  # type: ignore[operator]  # the root is whole still after the last evaluation
    with world.context_on_main(atomic_dir(folder, overwrite=True)) as temporary:  # at its end it hashes all files
        _write_weights(result, temporary)
        world.on_main(lambda: write_all_but_weights(result.model, result.tokenizer, temporary, result.dtype))
        if result.is_sparse:
            with verification(temporary, folder):
                left_dense = facts.left_dense  # is completed on the main rank, which writes it
                proof = world.on_main(
                    lambda: verify_pattern(temporary, result.model, result.pattern, left_dense), patient=True
                )
                failure, measured = _verify_again(result, temporary)
                world.check_all(failure)
            facts = replace(facts, proof=replace(proof, **measured))

        def write() -> Facts:
            write_facts(temporary, folder.name, facts)
            return facts

        return world.on_main(write)


class Folded(NamedTuple):
    """A parameter of a model, as it is once its parametrizations are folded."""

    name: str
    """Its name without parametrizations."""
    parameter: Tensor
    """The trained parameter, beneath a parametrization."""
    layer: SparseLayer | None
    """The layer whose parametrized weight it is; None for a parameter without parametrization."""

    def rows(self) -> Tensor:
        """This rank's rows of the folded value."""
        return local(self.parameter) if self.layer is None else computed_weight(self.layer, local)


def folded_parameters(model: nn.Module) -> Iterator[Folded]:
    """The parameters of a model; one that several modules share comes once for each."""
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        if parametrize.is_parametrized(module, "weight"):
            assert isinstance(module, SparseLayer)
            yield Folded(f"{name}.weight", weight_parameter(module), module)
        for leaf, parameter in module.named_parameters(recurse=False):
            yield Folded(f"{name}.{leaf}", parameter, None)


class _Piece(NamedTuple):
    """A parameter of the result, on its way into a file."""

    layout: Layout
    folded: Folded


@torch.no_grad()
def _write_weights(result: ShardedResult, folder: Path) -> None:
    """Writes the files of the weights and their index. Stops all ranks if one of them cannot write a file."""
    world, layout = result.world, StoredLayout(result.model)
    first_of: dict[Tensor, Folded] = {}
    for folded in folded_parameters(result.model):
        first_of.setdefault(folded.parameter, folded)  # tied weights are written once
    pieces = []
    for folded in first_of.values():
        like = torch.empty(folded.parameter.shape, dtype=result.dtype, device="meta")
        pieces.append(_Piece(layout_of(layout.to_stored({folded.name: like})), folded))
    files = into_files(pieces, MAX_SHARD_BYTES)
    names, failure = list(files), None
    for start in range(0, len(names), world.size):
        writers = dict(enumerate(names[start : start + world.size]))  # the file of each rank
        tensors = _own_tensors(result, layout, {rank: files[name] for rank, name in writers.items()})
        if world.rank in writers and failure is None:
            name = writers[world.rank]
            try:
                write_file(folder / name, files[name], tensors)
            except (InputError, OSError) as error:  # of the disk: this rank can still send what the others write
                failure = str(error) if isinstance(error, InputError) else f"{name} cannot be written: {error!r}"
        # Any other error is of the collectives, which cannot go on: it ends this process, and so the other ranks.
        deque(tensors, maxlen=0)  # sends what others write, also after a failure, so that none waits in vain
    world.check_all(failure, patient=True)
    num_parameters = sum(parameter.numel() for parameter in first_of)
    world.on_main(lambda: write_index_of(folder / INDEX, files, num_parameters))


def _own_tensors(
    result: ShardedResult, layout: StoredLayout, files: Mapping[int, Sequence[_Piece]]
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of this rank's file. All ranks run this to its end, as it sends the rows of the other files.

    Args:
        files: the content of the file that each rank writes.
    """
    # All ranks pass the same tensors in the same order, as a gather is a collective; files are of unequal length.
    for turn in range(max(map(len, files.values()))):
        own: Tensor | None = None
        for writer, content in files.items():
            if turn < len(content):
                found = _rows_to(writer, content[turn].folded, result)
                own = found if found is not None else own
        if own is not None:
            piece = files[result.world.rank][turn]
            yield from zip(piece.layout, layout.to_stored({piece.folded.name: own}).values(), strict=True)


def _rows_to(writer: int, folded: Folded, result: ShardedResult) -> Tensor | None:
    """The folded value in the dtype of the files on the rank `writer`; None on the others, which send it their rows."""
    world, parameter = result.world, folded.parameter
    num_shards = world.size // world.num_replicas
    if world.rank // num_shards != writer // num_shards:  # replicas of the writer's ranks hold the same rows
        return None
    if not isinstance(parameter, DTensor):
        return folded.rows().to(result.dtype) if world.rank == writer else None
    rows = folded.rows().to(result.dtype)
    most = math.ceil(len(parameter) / num_shards)  # rows of a rank; the last ones have fewer, or none
    sent = rows.new_zeros(most, *parameter.shape[1:])
    # A gather wants parts of one size: 193 rows on 2 ranks are sent as 97 and 97, and the last row is cut off below.
    sent[: len(rows)] = rows
    whole = rows.new_empty(num_shards, *sent.shape) if world.rank == writer else None
    parts = None if whole is None else [part.view(torch.uint8) for part in whole]  # gloo does not know all dtypes
    dist.gather(sent.view(torch.uint8), parts, dst=writer, group=parameter.device_mesh.get_group("shard"))
    return None if whole is None else whole.flatten(0, 1)[: len(parameter)]


@torch.no_grad()
def _verify_again(result: ShardedResult, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Reads the files back, each rank its rows, and compares weights and perplexity with the model in memory."""
    opened = open_sharded(str(folder), trust_remote_code=False, revision=None)
    failures = result.world.gather("the files hold other tensors" if opened is None else None)
    if opened is None or any(failures):
        return "the files hold other tensors", {}
    model: PreTrainedModel = opened[0].model
    root = _sharded_root(model, result)
    load_rows_(model, opened[1], result.world)
    stored = dict(model.named_parameters(remove_duplicate=False))
    different = None
    for name, expected in _folded_rows(result):
        if not equal_in_bits(expected, local(stored[name])):
            different = f"{name} has other values in the files"
    different = next((failure for failure in result.world.gather(different) if failure), None)
    root_in_memory = result.root
    if result.precision != "fp32" or result.dtype is not torch.float32:  # else it rounds nothing
        rounded = empty_model(copy.deepcopy(result.model.config)).eval()
        root_in_memory = _sharded_root(rounded, result)
        held = dict(rounded.named_parameters(remove_duplicate=False))
        for name, rows in _folded_rows(result):
            local(held[name]).copy_(rows)
    in_memory, from_disk = result.measure(root_in_memory), result.measure(root)
    if different is None and not math.isclose(in_memory, from_disk, rel_tol=_EVAL_TOLERANCE):
        different = f"perplexity is {from_disk!r} from disk and {in_memory!r} in memory"
    return different, {"tensors_equal_in_bits": len(stored), "perplexity_from_disk": from_disk}


def _sharded_root(model: PreTrainedModel, result: ShardedResult) -> nn.Module:
    """A sharded root around a model on the meta device; allocates memory for its weights, without values."""
    root = result.wrap(model)
    shard_(root, result.world)
    materialize_(root, result.world.device)
    return root


def _folded_rows(result: ShardedResult) -> Iterator[tuple[str, Tensor]]:
    """This rank's rows of every parameter, rounded as in the files, in fp32."""
    for folded in folded_parameters(result.model):
        rows = folded.rows()
        yield folded.name, rows.to(result.dtype).to(rows.dtype)
