"""`castlm quantize`: a model rounded to int8, float8, int4 or int3, as a plain or a packed folder, and verified."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.errors import InputError
from castlm.core.experts import ExpertLinear
from castlm.core.nm import Pattern
from castlm.core.sparsify import sparse_linears
from castlm.data.documents import open_documents
from castlm.data.options import DEFAULTS, TextOptions
from castlm.data.tokens import text_encoder
from castlm.distributed.loading import StoredWeights, open_sharded
from castlm.distributed.world import World
from castlm.dtypes import dtype_name
from castlm.export.folder import has_own_code, left_dense_reason, read_facts
from castlm.export.gguf import check_layers, write_gguf
from castlm.export.head import CalibrationOptions, hessian_of
from castlm.export.hf import export_blocks, export_model
from castlm.export.origin import origin_of
from castlm.export.packed import groups_of, naming_instead, pack_into
from castlm.facts import Facts, Perplexities
from castlm.files.output import atomic_dir
from castlm.formats.rounding import Rounded
from castlm.hardware import keep_freed_memory, return_freed_memory
from castlm.models.architecture import is_vision_language, move_
from castlm.models.gguf import GgufWeights
from castlm.models.io import Loaded, config_hash, load_model, open_config, save_dtype, tokenizer_hash
from castlm.models.stored_layout import StoredLayout
from castlm.oneshot.folder import begun_work, block_file, partial_folder, remove_work
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
from castlm_runtime.formats import FORMATS


class Train(Protocol):
    """Trains the scales of a rounded model; `castlm.training.scales` does, which this room may not import."""

    @property
    def steps(self) -> int: ...

    def __call__(self, rounded: Path, run: Path) -> tuple[PreTrainedModel, dict[str, Rounded]]:
        """The model in the folder `rounded` with trained scales, and its codes and scales by layer.

        `run` is a folder for checkpoints, from which the same call continues.
        """


@torch.no_grad()
def quantize_folder(
    name: str,
    folder: Path,
    kind: str,
    *,
    pattern: Pattern | None,
    calibration: CalibrationOptions | None = None,
    packed: bool = False,
    gguf: bool = False,
    head: str | None = None,
    damping: float = 0.01,
    train: Train | None = None,
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
        calibration: int3 needs it; without it int4 is rounded to the nearest.
        packed: store the integers and scales in castlm's packed format.
        gguf: write a GGUF file, as `castlm.export.gguf`, from the GGUF file `name`.
        head: with `packed`, as of `pack_folder`. A calibration text serves int6 and int4 too.
        damping: int4, int3: fraction of the mean diagonal to add to the Hessian.
        train: int4, int3: trains the scales of the rounded model, which is then in memory whole.
        options: how the calibration text is read; a chat template is also saved.
        dtype: "bf16", "fp16" or "fp32", the dtype of a plain folder; "source" is the dtype of the stored model.
        overwrite: replace an earlier result in `folder`, and begin again if an unfinished one has other options or is
            damaged.
        progress: called with (finished blocks, all blocks).

    Returns:
        Codes, scales and errors by layer.

    Raises:
        InputError: a model without the pattern, a kind that cannot be packed, or a missing or superfluous calibration
            text, or `folder` holds something (without `overwrite`). `folder` stays unchanged after any error.
    """
    if packed and not FORMATS[kind].runs_as:
        raise InputError(f"the packed format does not hold {kind}: leave --packed out")
    if head is not None and not packed:
        raise InputError(f"--head {head} is for the packed format: pass --packed, or leave it out")
    form = FORMATS[kind]
    head_reads = head in FORMATS and FORMATS[head].reads_text
    if calibration is not None and not (form.reads_text or head_reads):
        raise InputError(f"{kind} needs no calibration text: leave --calibration out")
    if calibration is None and form.needs_training:
        raise InputError(f"{kind} needs a calibration text: pass --calibration")
    if calibration is None and form.reads_text:
        say(f"{kind} without a calibration text, to the nearest: --calibration TEXT loses less")
    groups = groups_of(name, pattern)
    facts = read_facts(Path(name))
    if facts.rounded is not None:
        raise InputError(
            f"{name} was trained as {facts.rounded.kind}, which castlm pack stores: quantize another model"
        )
    if packed and has_own_code(open_config(name, trust_remote_code=trust_remote_code).to_dict()):
        raise InputError(f"{name} has its own code, which the packed format does not hold: leave --packed out")
    documents = None if calibration is None else open_documents(calibration.text, options)
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
        held = None if calibration is None and dtype == "source" else torch.float32
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
    tokens: Tensor | None = None
    text: dict[str, Any] = {}
    if documents is not None and calibration is not None:
        tokens = calibration.draw(documents, encoder, model, say)
        text = calibration.record(documents)
    sees_head = packed and tokens is not None and (head is None or head_reads)
    see_head = SeeHead() if sees_head and train is None else None
    if checkpoint is None:
        step = Round(kind, damping, "memory" if packed else "none")
        rounded = _rounded_whole(loaded, step, see_head, tokens, device, progress, None if train is None else folder)
    else:
        step = Round(kind, damping, "blocks" if (packed or gguf) and train is None else "none")
        weights = checkpoint.fingerprint(World(0, 1, torch.device(device), None))
        known = {"model": loaded.source, "weights": weights, "config": config_hash(model.config)}
        known |= {"tokenizer": tokenizer_sha256, **text}
        rounded = _rounded_by_block(
            loaded, checkpoint, rounded_dtype, step, see_head, tokens, device, progress, folder, known, overwrite, say
        )
    origin = origin_of(name)
    with contextlib.ExitStack() as stack:
        result = stack.enter_context(rounded)
        if train is not None:
            unseen = {"pattern": pattern, "left_dense": left_dense, "record": Facts(pattern=None, left_dense={})}
            write_rounded = functools.partial(result.write, **unseen, dtype=rounded_dtype)
            read_head = tokens if sees_head else None
            trained = _with_trained_scales(result, write_rounded, train, folder, loaded, read_head, progress)
            result = stack.enter_context(trained)
        report, write, integers, hessian = result
        if of_file is not None:
            write_gguf(of_file, integers(), folder, say)
            return report
        record = replace(
            facts,  # their `earlier` and their own step stay: `quantized` is a step after it
            base_model=origin.base_model,
            license=origin.license,
            quantized=replace(report.facts(), source=name, **text, train_steps=None if train is None else train.steps),
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
        write_plain = functools.partial(
            write,
            pattern=pattern,
            left_dense=left_dense,
            record=record,
            overwrite=overwrite,
            dtype=kept_dtype,
        )
        if not packed:
            write_plain(folder)
            return report
        with atomic_dir(folder, overwrite) as temporary:
            plain = temporary / ".plain" / folder.name
            with naming_instead(temporary, folder), naming_instead(plain, name):
                write_plain(plain)
                pack_into(temporary, plain, groups, head=head, integers=integers(), hessian=hessian, say=say)
            shutil.rmtree(plain.parent)
    return report


class _Result(NamedTuple):
    """A model whose layers are rounded."""

    report: QuantizeReport
    write: Callable[..., Facts]
    """Writes it as a plain folder: `export_model` or `export_blocks`, with the model."""
    integers: Callable[[], Mapping[str, Rounded]]
    """Codes and scales by the name of the layer in the files."""
    hessian: Tensor | None
    """The Hessian of the output head's input; None without a calibration text for it."""


@contextlib.contextmanager
def _with_trained_scales(
    rounded: _Result,
    write: Callable[..., Facts],
    train: Train,
    folder: Path,
    loaded: Loaded,
    read_head: Tensor | None,
    progress: Progress,
) -> Iterator[_Result]:
    """Trains the scales of a rounded model; its checkpoints stay until the context ends without error.

    Args:
        write: writes the rounded model as a plain folder.
        folder: the output, whose `partial_folder` is begun.
        read_head: sequences for the Hessian of the output head's input.
    """
    plain, run = (partial_folder(folder) / name for name in ("rounded", "scales"))
    shutil.rmtree(plain, ignore_errors=True)
    write(plain, overwrite=False)
    model, layers = train(plain, run)
    hessian = None
    if read_head is not None:
        hessian = hessian_of(MemoryModel(model, layers_to_round(model)), read_head, progress=progress)
    write_trained = functools.partial(export_model, model, loaded.tokenizer)
    yield _Result(rounded.report, write_trained, lambda: stored_layers(model, layers), hessian)
    for done in (plain, run):
        shutil.rmtree(done)


@contextlib.contextmanager
def _rounded_whole(
    loaded: Loaded,
    step: Round,
    see_head: SeeHead | None,
    tokens: Tensor | None,
    device: str,
    progress: Progress,
    folder: Path | None,
) -> Iterator[_Result]:
    """Rounds the layers of a model in memory.

    Args:
        folder: the output, whose `partial_folder` is begun and stays until the context ends without error; or None.
    """
    with contextlib.ExitStack() as stack:
        work = None if folder is None else stack.enter_context(begun_work(folder))
        yield _round_whole(loaded, step, see_head, tokens, device, progress)
        if work is not None:
            remove_work(work)


def _round_whole(
    loaded: Loaded, step: Round, see_head: SeeHead | None, tokens: Tensor | None, device: str, progress: Progress
) -> _Result:
    model = loaded.model
    move_(model, device)
    source, then = MemoryModel(model, layers_to_round(model)), [see_head] if see_head else []
    report = round_blocks(source, step, tokens, then=then, progress=progress)
    move_(model, "cpu")
    write = functools.partial(export_model, model, loaded.tokenizer)
    return _Result(
        report, write, lambda: stored_layers(model, report.layers), None if see_head is None else see_head.hessian
    )


@contextlib.contextmanager
def _rounded_by_block(
    loaded: Loaded,
    checkpoint: StoredWeights,
    dtype: torch.dtype,
    step: Round,
    see_head: SeeHead | None,
    tokens: Tensor | None,
    device: str,
    progress: Progress,
    folder: Path,
    facts: Mapping[str, Any],
    restart: bool,
    say: Say,
) -> Iterator[_Result]:
    """Rounds the layers of a model one block at a time; the finished blocks stay until the context ends without error.

    Args:
        dtype: of the files of the blocks.
        folder: the output.
        facts: everything else on which the result depends.
    """
    model, here = loaded.model, torch.device(device)
    source = StoredModel(model, checkpoint, layers_to_round(model), here, dtype)
    with begun_work(folder) as work:
        known = {**facts, "dtype": dtype_name(dtype)}
        report = round_blocks(
            source,
            step,
            tokens,
            work,
            then=[see_head] if see_head else [],
            facts=known,
            restart=restart,
            progress=progress,
            say=say,
        )
        blocks = [block_file(work, index) for index in range(len(source.blocks))]
        write = functools.partial(
            export_blocks, model, loaded.tokenizer, blocks=blocks, outside=source.outside(), linked=False
        )
        yield _Result(report, write, lambda: _codes_of(model, step.kind, blocks), _head_hessian(blocks[-1]))
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

    def __init__(self, kind: str, places: Mapping[str, tuple[Path, str]]) -> None:
        self.kind, self.places = kind, places

    def __getitem__(self, stem: str) -> Rounded:
        file, layer = self.places[stem]
        with safe_open(file, "pt") as opened:
            return Rounded(self.kind, opened.get_tensor(f"{CODES}{layer}"), opened.get_tensor(f"{SCALES}{layer}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _codes_of(model: PreTrainedModel, kind: str, blocks: Sequence[Path]) -> _CodesOfBlocks:
    layout = StoredLayout(model)
    places: dict[str, tuple[Path, str]] = {}
    for file in blocks:
        with safe_open(file, "pt") as opened:
            layers = [key.removeprefix(CODES) for key in opened.keys() if key.startswith(CODES)]  # noqa: SIM118
        for layer in layers:
            (part,) = layout.parts(layer)
            places[part.stem] = file, layer
    return _CodesOfBlocks(kind, places)
