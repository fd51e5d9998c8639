"""Writes a finished model as a Hugging Face folder, which gets its name only after verification from the disk.

Verification reads the files back as a user would: it counts every group of every sparse layer, compares every tensor
bit for bit with the one in memory, and measures the perplexity again.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from castlm.core.blocks import is_block_weight
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import FilterFn, is_layer, is_sparse_linear, sparse_linears
from castlm.dtypes import bytes_of
from castlm.export.card import model_card
from castlm.export.report import VerifyReport
from castlm.export.verify import check_ok, verify
from castlm.files.atomic_dir import atomic_dir
from castlm.files.atomic_file import atomic_write_json
from castlm.files.reading import user_path
from castlm.files.record import record_output, unused_name
from castlm.files.stored import INDEX
from castlm.models.architecture import eval_mode
from castlm.models.conversion import stored_shapes
from castlm.models.io import copy_processor, load_model, parameters_in, save_model
from castlm.patterns import parse_pattern
from castlm.structured.cut import check_cut, cut_model
from castlm.versions import model_versions

SCHEMA_VERSION = 1
EVAL_TOLERANCE = 1e-6  # relative tolerance: the weights are equal bit for bit, but kernels may sum in another order


def check_export(model: PreTrainedModel, pattern: Pattern, filter_fn: FilterFn = is_sparse_linear) -> None:
    """Checks, before training, that the result of `model` can be cut, written and verified.

    Raises:
        InputError: as `check_cut`, or `verify` would not find the weights of a sparse layer in the files.
    """
    check_cut(model, pattern, filter_fn)
    layers, _ = sparse_linears(model, pattern, filter_fn)
    for name, layer in layers.items():
        for stored, shape in stored_shapes(model, name, layer).items():
            if not is_block_weight(stored, shape):
                raise InputError(
                    f"{name} is stored as {stored} of shape {tuple(shape)}, whose groups castlm verify does not count: "
                    "leave it dense (left_dense)"
                )


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    pattern: Pattern | str,
    left_dense: Mapping[str, str],
    record: Mapping[str, Any],
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    eval_fn: Callable[[PreTrainedModel], float] | None = None,
    keep_rejected: bool = True,
) -> dict[str, Any]:
    """Writes `model` to `folder` with castlm.json and a model card, reads it back and verifies it.

    Args:
        model: pruned and folded: its parameters are plain, without parametrizations. Masked channels and heads are cut
            out of the files, but not of `model` itself.
        folder: the output; it is replaced once everything is written and verified.
        pattern: the pattern of the sparse layers, such as 2:4.
        left_dense: the reason for each dense module or parameter, by name, from `sparse_linears`.
        record: further content of castlm.json. The model card shows `base_model` (hub id or path), `license`, and
            `figures`: rows of `name, perplexity, seq_len, stride, text, num_tokens, tokenizer`.
        dtype: the dtype of the files; default: the model's. The weights of `model` are rounded to it too, in their own
            dtype, so that verification and evaluation see the written values.
        eval_fn: returns the perplexity of a model; called for `model` and for the model read back.
        keep_rejected: keep a result that fails its verification as `<folder>.rejected`.

    Returns:
        The content of castlm.json.

    Raises:
        InputError: weight scaling that is not folded, the folder is not empty, the disk is full, or the verification
            fails.
    """
    folder = Path(os.path.realpath(user_path(folder)))
    pattern = parse_pattern(pattern)
    manifest = new_manifest(pattern, left_dense, {**record, "dtype": dtype_name(dtype or model.dtype)})
    if pattern.cut_out is not None:
        model, done = cut_model(model, pattern)
        manifest["cut"] = asdict(done)
        manifest["num_params"] = sum(p.numel() for p in model.parameters())
    with eval_mode(model), atomic_dir(folder, overwrite) as temporary:
        with parameters_in(model, dtype):
            save_model(model, tokenizer, temporary)
        atomic_write_json(temporary / "castlm.json", manifest)
        try:
            manifest["proof"] = _verify(temporary, model, pattern, manifest["left_dense"], eval_fn)
        except Exception as error:
            raise (rejected(temporary, folder, error) if keep_rejected else failed(error)) from error
        write_record(temporary, folder.name, manifest)
    return manifest


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in config.json and castlm.json, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def new_manifest(pattern: Pattern | str, left_dense: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of castlm.json, except the key `proof`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "pattern": str(pattern),
        **record,
        "left_dense": dict(left_dense),
        "versions": model_versions(),
    }


def write_record(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Writes castlm.json and the model card of the model `name` into `folder`. The dense control (pattern None) has no
    card.
    """
    atomic_write_json(folder / "castlm.json", manifest)
    if manifest["pattern"] is not None:
        (folder / "README.md").write_text(model_card(name, manifest), encoding="utf-8")


def write_all_but_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Writes config, generation config and tokenizer beside weights of `dtype` that the caller wrote."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype_name(dtype)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_processor(config, folder)


def write_index(folder: Path, weight_map: Mapping[str, str], num_parameters: int, dtype: torch.dtype) -> None:
    """Writes the index of several weight files: the file of each tensor by its name."""
    metadata = {"total_parameters": num_parameters, "total_size": num_parameters * dtype.itemsize}
    atomic_write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def rejected(temporary: Path, folder: Path, error: BaseException) -> InputError:
    """Keeps a result that failed its verification beside `folder`; returns the error with the reason and its path."""
    kept = unused_name(folder.with_name(f"{folder.name}.rejected"))
    record_output(temporary, command="result", complete=True)
    temporary.rename(kept)
    return InputError(f"{str(failed(error)).replace(str(temporary), str(kept))} (kept as {kept})")


def failed(error: BaseException) -> InputError:
    """The error for a result that failed its verification."""
    return InputError(f"the export failed its verification: {(str(error) or type(error).__name__).splitlines()[0]}")


def _verify(
    folder: Path,
    model: PreTrainedModel,
    pattern: Pattern,
    left_dense: dict[str, str],
    eval_fn: Callable[[PreTrainedModel], float] | None,
) -> dict[str, Any]:
    """Verifies the files in `folder` against `model`; adds to `left_dense` by the names in the files."""
    report = verify(folder, pattern, known_layers=())  # verify_pattern compares them with `model`
    verify_pattern(report, model, left_dense)
    code_is_trusted = type(model).__module__.startswith("transformers_modules")  # its code runs already
    loaded = load_model(str(folder), dtype=model.dtype, trust_remote_code=code_is_trusted).model.eval()
    num_tensors = _verify_equal(model, loaded)
    proof: dict[str, Any] = {**report.totals(), "tensors_equal_in_bits": num_tensors}
    if eval_fn is not None:
        in_memory = float(eval_fn(model))
        from_disk = float(eval_fn(loaded.to(model.device)))
        if not math.isclose(in_memory, from_disk, rel_tol=EVAL_TOLERANCE):
            raise InputError(f"perplexity is {from_disk!r} from disk and {in_memory!r} in memory")
        proof |= {"perplexity_in_memory": in_memory, "perplexity_from_disk": from_disk}
    return proof


def verify_pattern(report: VerifyReport, model: PreTrainedModel, left_dense: dict[str, str]) -> None:
    """Raises `InputError` unless every sparse layer of `model` has the pattern in the files; completes `left_dense`.

    The names of a layer in the files and in memory may differ, as for experts; transformers' conversions map them.
    """
    sparse: set[str] = set()
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_layer(module):
            continue
        reason = left_dense.get(name, left_dense.get(f"{name}.weight"))
        if reason is not None:
            reasons |= dict.fromkeys(stored_shapes(model, name, module), reason)
        elif is_sparse_linear(module, name):
            sparse |= stored_shapes(model, name, module).keys()
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


def _verify_equal(model: PreTrainedModel, loaded: PreTrainedModel) -> int:
    """Compares all parameters and persistent buffers bit for bit, and returns their number."""
    ours, theirs = model.state_dict(), loaded.state_dict()
    if ours.keys() != theirs.keys():
        raise InputError(f"the files hold other tensors: {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}")
    for name, tensor in ours.items():
        if not equal_in_bits(tensor, theirs[name]):
            raise InputError(f"{name} has other values in the files")
    return len(ours)


def equal_in_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; -0.0 and +0.0 differ."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bytes_of(one), bytes_of(other))
