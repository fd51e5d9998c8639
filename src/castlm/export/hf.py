"""Writes a finished model as a Hugging Face folder, which gets its name only after verification from the disk.

Verification reads the files back as a user would: it counts every group of every sparse layer, compares every tensor
bit for bit with the one in memory, and measures the perplexity again. A model that does not fit in memory is assembled
from files of its transformer blocks, with at most one tensor in memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import in_block, is_tower
from castlm.core.errors import InputError, MostlyDenseError, one_line
from castlm.core.nm import Pattern
from castlm.core.sparsify import (
    FilterFn,
    SparseLayer,
    filter_for,
    is_sparse_linear,
    num_weights,
    scope_of,
    sparse_linears,
)
from castlm.dtypes import STORED_NAMES, dtype_name, equal_in_bits
from castlm.export.card import model_card
from castlm.export.origin import origin_in_memory
from castlm.export.verify import check_dense, check_ok, verify
from castlm.facts import SCHEMA_VERSION, Facts, Proof
from castlm.files.atomic_file import atomic_write_json
from castlm.files.output import atomic_dir
from castlm.files.record import RESULT
from castlm.files.weights import Batch, file_names, into_files, write_file, write_index_of, write_weights
from castlm.hardware import model_versions, trim_memory
from castlm.models.architecture import check_of_transformers, eval_mode
from castlm.models.io import (
    MAX_SHARD_BYTES,
    check_tokenizer,
    load_model,
    parameters_in,
    quiet_transformers,
    save_model,
    some_of,
    write_all_but_weights,
)
from castlm.models.products import plain_on_meta, uses_of
from castlm.models.stored_layout import StoredLayout, by_block
from castlm.patterns import parse_pattern
from castlm_runtime.reading import user_path
from castlm_runtime.stored import INDEX, StoredTensor, read_header

_PROBE_TOKENS = 16  # on which the model in memory and the model read back must have the same logits


def check_export(
    model: PreTrainedModel, pattern: Pattern, filter_fn: FilterFn = is_sparse_linear, allow_dense: float = 1.0
) -> float:
    """Checks, before the work, that the result of `model` can be verified: in what products its weights are used.

    Args:
        allow_dense: see `verify`.

    Returns:
        The share of the weights in products of the transformer blocks that become sparse.

    Raises:
        InputError: the model multiplies by a layer along another axis than a linear layer does.
        MostlyDenseError: a larger share than `allow_dense` would stay dense.
    """
    scope = scope_of(model, pattern, filter_fn)
    layout, sparse, multiplied = StoredLayout(model), 0, 0
    with quiet_transformers():
        plain = plain_on_meta(model)
    shapes = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    uses = uses_of(plain)
    for name, layer in scope.layers.items():
        key = layout.key(f"{name}.weight")
        if uses[key].axis != (-2 if layout.is_transposed(f"{name}.weight") else -1):
            raise InputError(f"{name} cannot be made {pattern}: it has {uses[key]}; leave it dense (left_dense)")
        sparse += num_weights(layer)
    for name, use in uses.items():
        is_inside = in_block(name) and not is_tower(name)
        multiplied += shapes[name] if is_inside and (use.axis is not None or not use.is_known) else 0
    share = sparse / max(1, multiplied)
    if share < 1 - allow_dense:
        dense = [name for name in scope.left_dense if in_block(name) and not is_tower(name)]
        raise MostlyDenseError(
            f"only {share:.2%} of the weights that the transformer blocks multiply by would be {pattern}, and "
            f"{some_of(dense)} would stay dense: allow_dense {math.ceil(100 * (1 - share)) / 100:g} permits it"
        )
    return share


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    pattern: Pattern | str | None = "2:4",
    left_dense: Mapping[str, str] | None = None,
    record: Facts | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    eval_fn: Callable[[PreTrainedModel], float] | None = None,
) -> Facts:
    """Writes `model` to `folder` with castlm.json and a model card, reads it back and verifies it.

    Args:
        model: pruned and folded: its parameters are plain, without parametrizations.
        folder: the output; it is replaced once everything is written and verified.
        pattern: the pattern of the sparse layers, such as 2:4. None for a dense model, whose values are only checked
            to be finite; it gets no model card.
        left_dense: the reason for each dense module or parameter, by name; default: as `sparse_linears` finds them.
        record: further entries of castlm.json, by the names of `castlm.facts.Facts`. The model card shows `base_model`
            (hub id or path; default: what the model was loaded from, as its config names it, with its licence and the
            steps that made it), `license`, `method`, and `figures`: rows of `name, perplexity, seq_len, stride, text,
            num_tokens, tokenizer`.
        dtype: the dtype of the files; default: the model's. The weights of `model` are rounded to it too, in their own
            dtype, so that verification and evaluation see the written values.
        eval_fn: returns the perplexity of a model; called for the model read back.

    Returns:
        The content of castlm.json.

    Raises:
        InputError: weight scaling that is not folded, an entry of `record` that is none of castlm.json's, a folder
            that is not empty, a full disk, or a verification that fails.

    Examples:
        >>> castlm.export_model(model, tokenizer, "folder", record={"base_model": "gpt2"})  # doctest: +SKIP
    """
    check_of_transformers(model)
    check_tokenizer(tokenizer)
    folder = Path(os.path.realpath(user_path(folder)))
    pattern = None if pattern is None else parse_pattern(pattern)
    if left_dense is None:
        left_dense = {} if pattern is None else sparse_linears(model, pattern)[1]
    if not isinstance(record, Facts):
        record = Facts.from_json(record or {}, "record")
    if record.base_model is None:
        found = vars(origin_in_memory(model)).items()
        record = replace(record, **{name: value for name, value in found if getattr(record, name) is None})
    facts = completed(record, pattern, left_dense, dtype or model.dtype)
    with eval_mode(model), atomic_dir(folder, overwrite) as temporary:
        with parameters_in(model, dtype):
            save_model(model, tokenizer, temporary)
        atomic_write_json(temporary / RESULT, facts.to_json())
        with verification(temporary, folder):
            if pattern is None:
                check_dense(temporary)
            else:
                facts = replace(facts, proof=_verify(temporary, model, pattern, facts.left_dense, eval_fn))
        write_facts(temporary, folder.name, facts)
    return facts


def completed(facts: Facts, pattern: Pattern | None, left_dense: Mapping[str, str], dtype: torch.dtype) -> Facts:
    """`facts` with the entries of every model folder, except `proof`; `dtype` is that of the files.

    The pattern in `facts` stays: it may tell more than `pattern`, the one of the sparse layers, which is None if dense.
    """
    return replace(
        facts,
        schema_version=SCHEMA_VERSION,
        pattern=facts.pattern or (None if pattern is None else str(pattern)),
        dtype=dtype_name(dtype),
        left_dense=dict(left_dense),
        versions=model_versions(),
    )


def write_facts(folder: Path, name: str, facts: Facts) -> None:
    """Writes castlm.json and the model card of the model `name` into `folder`. A dense model has no card."""
    atomic_write_json(folder / RESULT, facts.to_json())
    if facts.pattern is not None:
        (folder / "README.md").write_text(model_card(name, facts), encoding="utf-8")


@contextlib.contextmanager
def verification(temporary: Path, folder: Path) -> Iterator[None]:
    """Turns an error in its block, which verifies the files in `temporary`, into one line that names `folder`."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].replace(str(temporary), str(folder))
        raise InputError(f"the export failed its verification: {reason}") from error


def _verify(
    folder: Path,
    model: PreTrainedModel,
    pattern: Pattern,
    left_dense: dict[str, str],
    eval_fn: Callable[[PreTrainedModel], float] | None,
) -> Proof:
    """Verifies the files in `folder` against `model`; adds to `left_dense` by the names in the files."""
    proof = verify_pattern(folder, model, pattern, left_dense)
    trim_memory()  # a second model follows, and malloc has kept what made the first
    code_is_trusted = type(model).__module__.startswith("transformers_modules")  # its code runs already
    loaded = load_model(str(folder), dtype=model.dtype, trust_remote_code=code_is_trusted).model.eval()
    ours, theirs = model.state_dict(), loaded.state_dict()  # with the persistent buffers
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not equal_in_bits(ours[name], theirs[name]):
            raise InputError(f"{name} has other values in the files")
    _check_logits(loaded, model)
    perplexity = None if eval_fn is None else float(eval_fn(loaded.to(model.device)))
    if perplexity is not None and not math.isfinite(perplexity):
        raise InputError(f"perplexity is {perplexity}")
    return replace(proof, tensors_equal_in_bits=len(ours), perplexity_from_disk=perplexity)


@torch.no_grad()
def _check_logits(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """Raises `InputError` if two models of equal weights have other logits, as another rotary base would give."""
    tokens = (torch.arange(_PROBE_TOKENS) % model.config.get_text_config().vocab_size)[None]
    from_disk, in_memory = (
        each(input_ids=tokens.to(each.device), use_cache=False).logits.float().cpu() for each in (loaded, model)
    )
    if not in_memory.isfinite().all():
        return  # the model overflows with these weights; the evaluation reports it
    difference, largest = float((from_disk - in_memory).abs().max()), float(in_memory.abs().max())
    if not difference <= (1e-3 if model.dtype == torch.float32 else 5e-2) * largest:  # NaN is not
        raise InputError(
            f"the logits of the files differ by {difference:.3g} from those in memory, at most {largest:.3g}"
        )


def verify_pattern(folder: Path, model: PreTrainedModel, pattern: Pattern, left_dense: dict[str, str]) -> Proof:
    """Raises `InputError` unless every sparse layer of `model` has the pattern in the files; completes `left_dense`.

    The names of a layer in the files and in memory may differ, as for experts; transformers' conversions map them.
    Returns the counts, among them the share of dense weights, whatever it is.
    """
    code_is_trusted = type(model).__module__.startswith("transformers_modules")  # its code runs already
    report = verify(folder, pattern, allow_dense=1.0, trust_remote_code=code_is_trusted)
    layout, sparse, chooses = StoredLayout(model), set[str](), filter_for(model)
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseLayer):
            continue
        reason = left_dense.get(name, left_dense.get(f"{name}.weight"))
        if reason is not None:
            reasons |= dict.fromkeys((part.name for part in layout.parts(name)), reason)
        elif chooses(module, name):
            sparse |= {part.name for part in layout.parts(name)}
    other = "not a linear layer of its own in memory"
    for name in report.uncounted.keys() - sparse:
        del report.uncounted[name]
        report.dense[name] = left_dense[name] = reasons.get(name, other)
    for layer in report.layers:
        if layer.left_dense is None and layer.name not in sparse and (layer.problem or layer.num_violations):
            layer.left_dense = left_dense[layer.name] = reasons.get(layer.name, other)
    check_ok(report)
    if missing := sparse - {layer.name for layer in report.sparse_layers}:
        raise InputError(f"{len(missing)} of {len(sparse)} sparse layers are not in {report.path}, as {min(missing)}")
    return Proof(**report.totals())  # type: ignore[arg-type]  # a share among counts


# ---- a model that does not fit in memory, from files of its transformer blocks


def export_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    blocks: Sequence[Path],
    outside: Iterator[tuple[str, Tensor]],
    pattern: Pattern | None,
    left_dense: Mapping[str, str],
    record: Facts,
    dtype: torch.dtype,
    linked: bool = True,
    overwrite: bool = True,
) -> Facts:
    """Writes `folder` with castlm.json and a model card, and verifies it; returns the content of castlm.json.

    Args:
        model: the model on the meta device, for names and shapes.
        blocks: a safetensors file of each block, in `dtype`, with its tensors as `StoredLayout.to_stored` gives them.
        linked: the files of the blocks become those of the model: by links where the file system allows it, otherwise
            as copies. Else the tensors of the model are copied to as few files as `export_model` writes.
        outside: all other weights, which no transformer block has, by name, in the order of
            `model.named_parameters()`; rounded to `dtype`.
        pattern, overwrite: as of `export_model`.
    """
    folder = Path(os.path.realpath(user_path(folder)))
    facts = completed(record, pattern, left_dense, dtype)
    with atomic_dir(folder, overwrite) as temporary:
        parameters, stored_layout = dict(model.named_parameters()), StoredLayout(model)
        headers = {block: read_header(block) for block in blocks}
        known = {name for header in headers.values() for name in header}
        rest, of_blocks = dict(parameters), set[str]()
        for group in by_block(parameters):
            stored_names = stored_layout.to_stored(group).keys()
            if stored_names <= known:
                of_blocks |= stored_names
                for name in group:
                    del rest[name]
        # steps leave other tensors there, too
        inside = {file: {n: t for n, t in header.items() if n in of_blocks} for file, header in headers.items()}
        layout = {name: (STORED_NAMES[dtype], tuple(parameter.shape)) for name, parameter in rest.items()}
        others = Batch(layout, lambda: (tensor.to(dtype) for _, tensor in outside))
        batches = [others, *(_batch_of_block(block, stored) for block, stored in inside.items())]
        total = sum(p.numel() for p in parameters.values())
        if linked:
            files = {name: [batch] for name, batch in zip(file_names(len(batches)), batches)}
            first, *names = files
            write_file(temporary / first, [others], zip(layout, others.tensors()))
            for block, name in zip(blocks, names):
                try:
                    os.link(block, temporary / name)
                except OSError:  # a file system without links
                    shutil.copyfile(block, temporary / name)
            write_index_of(temporary / INDEX, files, total)
        else:
            write_weights(temporary, into_files(batches, MAX_SHARD_BYTES), num_parameters=total)
        write_all_but_weights(model, tokenizer, temporary, dtype)
        with verification(temporary, folder):
            if pattern is None:
                check_dense(temporary)
            else:
                facts = replace(facts, proof=verify_pattern(temporary, model, pattern, facts.left_dense))
        write_facts(temporary, folder.name, facts)
    return facts


def _batch_of_block(file: Path, stored: Mapping[str, StoredTensor]) -> Batch:
    """Some tensors in the file of a block, which are read when they are written."""

    def tensors() -> Iterator[Tensor]:
        with safe_open(file, "pt") as opened:
            for name in stored:
                yield opened.get_tensor(name)

    return Batch({name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}, tensors)


# ---- the hub


def check_login(repo_id: str) -> None:
    """Makes sure before a run that its result can be uploaded to the repository `repo_id`."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except Exception as error:  # of the HTTP client, which depends on huggingface_hub's version
        raise InputError(
            f"push_to_hub to {repo_id}: {one_line(error)}; log in with hf auth login, give another hub_model_id, or "
            "leave it out"
        ) from None


def push(folder: Path, repo_id: str) -> str:
    """Creates the repository `repo_id` if needed and uploads all files of a model folder in one commit.

    The commit removes weights of an earlier upload under other names, which would be loaded instead of these.

    Returns:
        The URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repo_id, exist_ok=True)
        commit: Any = api.upload_folder(
            folder_path=folder,
            repo_id=created.repo_id,
            commit_message="Sparse model, verified by castlm",
            ignore_patterns=["castlm-output.json"],  # records of this disk
            delete_patterns=["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
        )
    except Exception as error:  # of the HTTP client, which depends on huggingface_hub's version
        raise InputError(
            f"push_to_hub: {one_line(error)}; the result is whole: hf upload {repo_id} {folder} sends it"
        ) from error
    return str(getattr(commit, "commit_url", commit))
