"""`castlm quantize`: a model rounded to int8, float8, int4 or int3, as a plain or a packed folder, and verified."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.nm import Pattern
from castlm.core.sparsify import sparse_linears
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import text_encoder
from castlm.dtypes import dtype_name
from castlm.export.folder import has_own_code, left_dense_reason, read_facts
from castlm.export.gguf import check_layers, write_gguf
from castlm.export.head import hessian_of
from castlm.export.hf import export_blocks, export_model
from castlm.export.origin import origin_of
from castlm.export.packed import groups_of, naming_instead, pack_into
from castlm.facts import Facts, Perplexities
from castlm.files.output import atomic_dir
from castlm.formats.rounding import Rounded
from castlm.hardware import keep_freed_memory, return_freed_memory
from castlm.models.architecture import is_vision_language, move_
from castlm.models.gguf import GgufWeights
from castlm.models.io import config_hash, load_model, open_config, save_dtype, tokenizer_hash
from castlm.models.loading import open_sharded
from castlm.models.stored_layout import StoredLayout
from castlm.oneshot.draw import Draw
from castlm.oneshot.folder import begun_work, block_file, remove_work
from castlm.oneshot.source import MemoryModel, StoredModel
from castlm.oneshot.steps.round import (
    CODES,
    HEAD_HESSIAN,
    SCALES,
    QuantizeReport,
    Round,
    SeeHead,
    layers_to_round,
    round_blocks,
    stored_layers,
)
from castlm.say import Progress, Say, silent
from castlm.world import ALONE
from castlm_runtime.formats import FORMATS
from castlm_runtime.stored import read_header


def check_text(kind: str, head: str | None, has_text: bool, packed: bool) -> str | None:
    """Checks the arguments of `quantize_folder` that go with a calibration text; returns a line if a text would help.

    Raises:
        InputError: a kind that cannot be packed, a head that is not packed, or a text that is missing or has no use.
    """
    form = FORMATS[kind]
    if packed and not form.runs_as:
        raise InputError(f"the packed format does not hold {kind}: leave --packed out")
    if head is not None and not packed:
        raise InputError(f"--head {head} is for the packed format: pass --packed, or leave it out")
    if has_text and not (form.reads_text or _reads_text(head)):
        raise InputError(f"{kind} needs no calibration text: leave --calibration out")
    if not has_text and form.needs_training:
        raise InputError(f"{kind} needs a calibration text: pass --calibration")
    helps = form.reads_text and not has_text
    return f"{kind} without a calibration text, to the nearest: --calibration TEXT loses less" if helps else None


def _reads_text(head: str | None) -> bool:
    return head in FORMATS and FORMATS[head].reads_text


@torch.no_grad()
def quantize_folder(
    name: str,
    folder: Path,
    kind: str,
    *,
    pattern: Pattern | None,
    draw: Draw | None = None,
    packed: bool = False,
    gguf: bool = False,
    head: str | None = None,
    damping: float = 0.01,
    train: Callable[[Path, Path], tuple[PreTrainedModel, dict[str, Rounded]]] | None = None,
    train_steps: int | None = None,
    options: TextOptions = DEFAULTS,
    dtype: str = "source",
    device: str = "cpu",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = silent,
) -> QuantizeReport:
    """Rounds the linear layers of a model, keeps zeros, and writes the result to `folder`.

    A model whose weights are read one by one has one block at a time in memory. Its finished blocks are in
    `partial_folder(folder)` until the result is written, so that the same call continues after a kill.

    Args:
        name: a model folder, hub id, GGUF file or "demo".
        folder: the output, a plain model folder with the rounded values, or a packed one; with `gguf`, a file.
        kind: "int8" or "fp8", to the nearest with a scale per row; "int4", "int3", by GPTQ with a scale per 64 columns;
            "q4_0", as GGUF files have it, with a scale per 32.
        pattern: the model's pattern, verified before and after; None for a dense model.
        draw: a calibration text, of whose sequences a model reads as much as fits its context. int3 needs it; without
            it int4 is rounded to the nearest.
        packed: store the integers and scales in castlm's packed format.
        gguf: write a GGUF file, as `castlm.export.gguf`, from the GGUF file `name`.
        head: with `packed`, as of `pack_folder`. A calibration text serves int6 and int4 too.
        damping: int4, int3: fraction of the mean diagonal to add to the Hessian.
        train: int4, int3: trains the scales of the rounded model in a folder, and returns the model, whole in memory,
            with its codes and scales by layer. The second folder is for its checkpoints, from which the same call
            continues.
        train_steps: the steps of `train`.
        options: a chat template of theirs is saved.
        dtype: "bf16", "fp16" or "fp32", the dtype of a plain folder; "source" is the dtype of the stored model.
        overwrite: replace an earlier result in `folder`, and begin again if an unfinished one has other options or is
            damaged.
        progress: called with (finished blocks, all blocks).

    Returns:
        Codes, scales and errors by layer.

    Raises:
        InputError: as `check_text`; a model without the pattern, or `folder` holds something (without `overwrite`).
            `folder` stays unchanged after any error.
    """
    groups = groups_of(name, pattern)
    facts = read_facts(Path(name))
    if facts.rounded is not None:
        raise InputError(
            f"{name} was trained as {facts.rounded.kind}, which castlm pack stores: quantize another model"
        )
    if packed and has_own_code(open_config(name, trust_remote_code=trust_remote_code).to_dict()):
        raise InputError(f"{name} has its own code, which the packed format does not hold: leave --packed out")
    sharded = open_sharded(name, trust_remote_code=trust_remote_code, revision=None)
    if sharded is not None and not _goes_by_block(sharded[0].model):
        sharded = None
    of_file: GgufWeights | None = None
    if gguf:
        of_file = None if sharded is None else sharded[1].gguf
        if sharded is None or of_file is None:
            raise InputError(f"the layers of {name} are not each one tensor of its file: leave --gguf out")
        check_layers(of_file, sharded[0].model)
    if sharded is None:
        keep_freed_memory()
        # GPTQ computes in fp32; rounding to the nearest takes fp32 a layer at a time, and what is written is the same.
        held = None if draw is None and dtype == "source" else torch.float32
        loaded, checkpoint = load_model(name, dtype=held, trust_remote_code=trust_remote_code), None
    else:
        return_freed_memory()
        loaded, checkpoint = sharded
    model, kept_dtype = loaded.model, save_dtype(dtype, loaded.dtype)
    # in fp32 a product of code and scale is exact, from which the training takes both again
    rounded_dtype = kept_dtype if train is None else torch.float32
    tokenizer_sha256 = tokenizer_hash(loaded.tokenizer)  # before `options` give it another template
    encoder = text_encoder(loaded.tokenizer, options)
    left_dense: dict[str, str] = {}
    if groups is not None:
        layers, left_dense = sparse_linears(model, groups)
        left_dense |= facts.left_dense
        for layer, module in layers.items():
            weight, key = module.weight, f"{layer}.weight"
            if left_dense_reason(key, left_dense) is not None:
                continue
            if checkpoint is not None:
                weight = checkpoint.read(key)
            if groups.violations(weight):
                raise InputError(f"{name} is not {groups} in {layer}: pass its own pattern, or prune it first")
    text, of_text = None, dict[str, Any]()
    if draw is not None:
        of_text = draw.source()
        text = draw.within_context(model).text(model, {}, encoder, torch.device("cpu"), say)
    sees_head = packed and text is not None and (head is None or _reads_text(head))
    see_head = SeeHead() if sees_head and train is None else None
    to_round, then = layers_to_round(model), [see_head] if see_head else []
    integers: Mapping[str, Rounded]
    with contextlib.ExitStack() as stack:
        work = None
        if checkpoint is not None or train is not None:
            work = stack.enter_context(begun_work(folder))
        if checkpoint is None:
            move_(model, device)
            step = Round(kind, damping, "memory" if packed else "none")
            report = round_blocks(MemoryModel(model, to_round), step, text, then=then, progress=progress, say=say)
            move_(model, "cpu")
            write = functools.partial(export_model, model, loaded.tokenizer)
            integers, hessian = stored_layers(model, report.layers), None if see_head is None else see_head.hessian
        else:
            assert work is not None
            stored = StoredModel(model, checkpoint, to_round, torch.device(device), rounded_dtype)
            step = Round(kind, damping, "blocks" if (packed or gguf) and train is None else "none")
            known = {"model": loaded.source, "weights": checkpoint.fingerprint(ALONE)}
            known |= {"config": config_hash(model.config), "tokenizer": tokenizer_sha256}
            known |= {"dtype": dtype_name(rounded_dtype), **of_text}
            report = round_blocks(
                stored, step, text, work, then=then, facts=known, restart=overwrite, progress=progress, say=say
            )
            blocks = [block_file(work, index) for index in range(len(stored.blocks))]
            write = functools.partial(
                export_blocks, model, loaded.tokenizer, blocks=blocks, outside=stored.outside(), linked=False
            )
            integers, hessian = _CodesOfBlocks(model, kind, blocks), _head_hessian(blocks[-1])
        if train is not None:
            assert work is not None
            plain, run = work / "rounded", work / "scales"
            shutil.rmtree(plain, ignore_errors=True)
            unseen = Facts(pattern=None, left_dense={})
            write(plain, pattern=pattern, left_dense=left_dense, record=unseen, overwrite=False, dtype=rounded_dtype)
            trained, layers_of_trained = train(plain, run)
            if sees_head and text is not None:
                hessian = hessian_of(MemoryModel(trained, layers_to_round(trained)), text, progress=progress)
            write = functools.partial(export_model, trained, loaded.tokenizer)
            integers = stored_layers(trained, layers_of_trained)
        if of_file is not None:
            write_gguf(of_file, integers, folder, say)
            _drop(work)
            return report
        origin = origin_of(name)
        record = replace(
            facts,  # their `earlier` and their own step stay: `quantized` is a step after it
            base_model=origin.base_model,
            license=origin.license,
            quantized=replace(report.facts(), source=name, train_steps=train_steps, **of_text),
            pattern=None if pattern is None else str(pattern),
            # no longer true
            packed=None,
            proof=None,
            perplexity=Perplexities(),
            figures=[
                row if row.name == "dense" else replace(row, name=f"{row.name}, before {kind}")
                for row in facts.figures or []
            ]
            or None,
        )
        write = functools.partial(
            write, pattern=pattern, left_dense=left_dense, record=record, overwrite=overwrite, dtype=kept_dtype
        )
        if packed:
            with atomic_dir(folder, overwrite) as temporary:
                plain = temporary / ".plain" / folder.name
                with naming_instead(temporary, folder), naming_instead(plain, name):
                    write(plain)
                    pack_into(temporary, plain, groups, head=head, integers=integers, hessian=hessian, say=say)
                shutil.rmtree(plain.parent)
        else:
            write(folder)
        _drop(work)
    return report


def _drop(work: Path | None) -> None:
    """Deletes the work of a result that is complete."""
    if work is not None:
        for trained in ("rounded", "scales"):
            shutil.rmtree(work / trained, ignore_errors=True)
        remove_work(work)


def _head_hessian(last_block: Path) -> Tensor | None:
    with safe_open(last_block, "pt") as opened:
        return opened.get_tensor(HEAD_HESSIAN) if HEAD_HESSIAN in opened.keys() else None  # noqa: SIM118


def _goes_by_block(model: PreTrainedModel) -> bool:
    """Whether the blocks of a model whose weights are read one by one can be rounded alone: not experts or images."""
    has_experts = any(isinstance(layer, ExpertLinear) for layer in model.modules())
    return not has_experts and not is_vision_language(model.config)


class _CodesOfBlocks(Mapping[str, Rounded]):
    """Codes and scales in the files of blocks, read when they are asked for; by the name of the layer in the files."""

    def __init__(self, model: PreTrainedModel, kind: str, blocks: Sequence[Path]) -> None:
        self.kind, layout = kind, StoredLayout(model)
        self.places: dict[str, tuple[Path, str]] = {}
        for file in blocks:
            for key in read_header(file):
                if key.startswith(CODES):
                    layer = key.removeprefix(CODES)
                    (part,) = layout.parts(layer)
                    self.places[part.stem] = file, layer

    def __getitem__(self, stem: str) -> Rounded:
        file, layer = self.places[stem]
        with safe_open(file, "pt") as opened:
            return Rounded(self.kind, opened.get_tensor(f"{CODES}{layer}"), opened.get_tensor(f"{SCALES}{layer}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
