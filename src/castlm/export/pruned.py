"""`castlm prune` and `castlm cut` as functions: from the name of a dense model to a verified folder of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.core.sparsify import SparseLayer, scope_of
from castlm.data.calibration import CalibrationText
from castlm.data.tokens import Encoder, open_encoder
from castlm.dtypes import dtype_name
from castlm.export.hf import check_export, export_blocks, export_model
from castlm.export.origin import origin_of
from castlm.export.verify_report import ALLOW_DENSE
from castlm.facts import Cut, DrawnText, Facts, Perplexities
from castlm.files.record import command_of
from castlm.hardware import available_memory, keep_freed_memory, return_freed_memory, why_slow
from castlm.models.architecture import is_vision_language, move_
from castlm.models.io import Loaded, config_hash, fp32_bytes, load_model, save_dtype, tokenizer_hash
from castlm.models.loading import StoredWeights, fingerprint, open_sharded
from castlm.oneshot.draw import Draw
from castlm.oneshot.folder import PROGRESS, begun_work, block_file, partial_folder, remove_work
from castlm.oneshot.options import Refinements
from castlm.oneshot.report import OneshotReport
from castlm.oneshot.run import run_start
from castlm.oneshot.source import MemoryModel, Source, StoredModel
from castlm.oneshot.steps.base import Step
from castlm.progress import note, shown_progress
from castlm.say import silent
from castlm.structured.cut import check_cut, cut_units
from castlm.structured.units import Units
from castlm.world import World
from castlm_runtime.reading import read_json_object

Memory = Literal["model", "block"]


def prune_folder(
    name: str,
    folder: Path,
    method: str,
    pattern: Pattern,
    steps: Sequence[Step],
    *,
    draw: Draw | None,
    memory: Memory = "model",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: str = "source",
    allow_dense: float = ALLOW_DENSE,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    evaluate: Callable[[Loaded], tuple[float, dict[str, Any]]] | None = None,
    world: World | None = None,
) -> OneshotReport:
    """Takes the steps of a start in a dense model, and writes the result to `folder` at the end.

    Until then, finished blocks are in `partial_folder(folder)`, so that a killed prune continues. A model in memory
    that reads no text is pruned in seconds, and begins again.

    Args:
        name: a model folder, hub id, GGUF file or "demo".
        method: the name of the method, for castlm.json; `castlm.oneshot.methods.steps_of` gives its `steps`.
        draw: the calibration text.
        memory: "block" keeps one transformer block at a time in memory.
        dtype: "bf16", "fp16" or "fp32", the dtype of the files; "source" is the dtype of the stored model.
        allow_dense: see `castlm.export.verify.verify`.
        overwrite: replace an earlier result in `folder`, and begin again if an unfinished prune has other options or is
            damaged.
        evaluate: measures the model in memory before and after it is pruned: returns its perplexity, and further
            entries of castlm.json, by name.
        world: the ranks that prune together, block by block, and of which the main one writes the result; by default,
            this process.

    Raises:
        InputError: as `run_start`, `load_model` and `export_model`.
    """
    world = world or World(0, 1, device, None)
    assert world.size == 1 or (memory == "block" and evaluate is None)
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    works: AbstractContextManager[Path | None] = nullcontext()
    if draw is not None or memory == "block":
        works = world.context_on_main(begun_work(folder))
    with works as work:
        in_fp32 = draw is not None or evaluate is not None
        loaded, checkpoint = _opened(name, memory, in_fp32, loading)
        model, kept_dtype = loaded.model, save_dtype(dtype, loaded.dtype)
        scope = scope_of(model, pattern)
        layers, left_dense = scope.layers, scope.left_dense
        stored: StoredModel | None = None
        share = check_export(model, pattern, allow_dense=allow_dense)
        tokenizer_sha256 = tokenizer_hash(loaded.tokenizer)  # before `options` give it another template
        if checkpoint is None:
            weights = fingerprint(model)
        else:
            stored = StoredModel(model, checkpoint, layers, device, kept_dtype, scope.pattern, world=world)
            weights = checkpoint.fingerprint(world)

        def read_text() -> tuple[CalibrationText | None, DrawnText | None]:
            if draw is None:
                return None, None
            encoder = open_encoder([draw.documents], loaded.tokenizer, name, draw.options, **loading)
            return _drawn(draw, model, layers, encoder, device)

        text, calibration = world.on_main(read_text, patient=True)
        if stored is None:
            move_(model, device)
        source: Source = stored or MemoryModel(model, layers, scope.pattern)
        before = evaluate(loaded)[0] if evaluate else None
        facts = {"model": loaded.source, "weights": weights, "config": config_hash(model.config)}
        facts |= {"tokenizer": tokenizer_sha256, "memory": memory, "dtype": dtype_name(kept_dtype)}
        with shown_progress(f"{method}, transformer blocks", before=None, is_main=world.is_main) as progress:
            report = run_start(
                source,
                steps,
                text,
                work,
                facts=facts,
                restart=overwrite,
                say=note if world.is_main else silent,
                progress=progress,
                world=world,
            )
        step_options = {key: value for step in steps for key, value in step.options().items()}
        record = Facts(
            pattern=None,  # the export writes it, and which layers are dense
            left_dense={},
            **vars(origin_of(name, revision)),
            **vars(report.solved()),
            method=method,
            refinements={f.name: step_options[f.name] for f in fields(Refinements) if f.name in step_options},
            calibration=calibration,
        )
        if evaluate:
            after, further = evaluate(loaded)
            record = replace(record, perplexity=Perplexities(dense=before, pruned=after), **further)
        if stored is None:
            move_(model, "cpu")
            export_model(
                model,
                loaded.tokenizer,
                folder,
                pattern=pattern,
                left_dense=left_dense,
                record=record,
                dtype=kept_dtype,
                overwrite=overwrite,
            )
        else:
            assert work is not None
            written = [block_file(work, index) for index in range(len(stored.blocks))]

            def export() -> None:
                export_blocks(
                    model,
                    loaded.tokenizer,
                    folder,
                    blocks=written,
                    outside=stored.outside(),
                    pattern=pattern,
                    left_dense=left_dense,
                    record=record,
                    dtype=kept_dtype,
                )

            world.on_main(export, patient=True)
        if work is not None and world.is_main:
            remove_work(work)
    report.share = share
    return report


def _opened(
    name: str, memory: Memory, in_fp32: bool, loading: Mapping[str, Any]
) -> tuple[Loaded, StoredWeights | None]:
    """The model in memory and None; or the model without weights and the checkpoint that holds them.

    Args:
        in_fp32: solvers, changes of basis and an evaluation compute in fp32; magnitude can compare weights in their
            stored dtype.

    Raises:
        InputError: a model that cannot be pruned with one block in memory.
    """
    if memory == "model":
        keep_freed_memory()
        return load_model(name, dtype=torch.float32 if in_fp32 else None, **loading), None
    return_freed_memory()
    opened = open_sharded(name, **loading)
    if opened is None or is_vision_language(opened[0].model.config):
        raise InputError(
            f"memory block is not for {name}: it takes weights that are read one by one, without images; use memory "
            "model"
        )
    return opened


def _drawn(
    draw: Draw,
    model: PreTrainedModel,
    layers: Mapping[str, SparseLayer],
    encoder: Encoder,
    device: torch.device,
) -> tuple[CalibrationText, DrawnText]:
    """The calibration text for `layers`, and its record."""
    text = draw.text(model, layers, encoder, device, note)
    if slow := why_slow(text.precision, device):
        note(slow)
    return text, DrawnText(**draw.source(), **text.record())


def cut_folder(
    name: str,
    folder: Path,
    units: Units,
    score: str,
    *,
    draw: Draw | None,
    refits: bool = True,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: str = "source",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Cut:
    """Cuts channels or heads out of a dense model with `cut_units`, and writes the smaller model to `folder`.

    Args:
        draw, dtype, overwrite: as of `prune_folder`.

    Raises:
        InputError: as `cut_units`, `load_model` and `export_model`.
    """
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    keep_freed_memory()
    loaded = load_model(name, dtype=torch.float32, **loading)
    model, kept_dtype = loaded.model, save_dtype(dtype, loaded.dtype)
    layers = check_cut(model, units)
    text, calibration = None, None
    if draw is not None:
        encoder = open_encoder([draw.documents], loaded.tokenizer, name, draw.options, **loading)
        text, calibration = _drawn(draw, model, layers, encoder, device)
    move_(model, device)
    with shown_progress(f"{score}, transformer blocks", before=None) as progress:
        small, cut, report = cut_units(
            model,
            units,
            score,
            calibration=None if text is None else text.sequences,
            extras=None if text is None else text.extras,
            refits=refits,
            precision="fp32" if text is None else text.precision,
            say=note,
            progress=progress,
        )
    record = Facts(
        pattern=None,
        left_dense={},
        **vars(origin_of(name, revision)),
        **vars(report.solved()),
        method=score,
        calibration=calibration,
        cut=cut,
        num_params=sum(parameter.numel() for parameter in small.parameters()),
    )
    move_(small, "cpu")
    export_model(small, loaded.tokenizer, folder, pattern=None, record=record, dtype=kept_dtype, overwrite=overwrite)
    return cut


def choose_memory(model: str, revision: str | None, folder: Path, device: str) -> Memory:
    """Chooses "block" if the whole model does not fit in memory, with a note why, else "model".

    A prune that continues keeps its choice.
    """
    partial = partial_folder(folder)
    if command_of(partial) == "prune" and (partial / PROGRESS).is_file():
        begun = read_json_object(partial / PROGRESS).get("options", {}).get("memory")
        return "block" if begun == "block" else "model"
    needed, free = fp32_bytes(model, revision), available_memory(device)
    if needed <= free:
        return "model"
    note(
        f"the model takes {needed / 2**30:.1f} GiB in fp32 and {free / 2**30:.1f} GiB are free: one transformer "
        "block at a time is in memory (memory block)"
    )
    return "block"
