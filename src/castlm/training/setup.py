"""What a run consists of before its first step, made in the order in which it can go wrong.

The order of the last part is fixed: teacher, method (which parametrizes), shards, optimizer, start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.budget import DecayBudget, decay_budget
from castlm.core.decay import DECAYS
from castlm.core.errors import InputError
from castlm.core.experts import num_weights
from castlm.core.masks import pack_mask
from castlm.core.pattern import Pattern
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import FilterFn, is_sparse_linear
from castlm.distributed.loading import Checkpoint, load_rows_, materialize_
from castlm.distributed.mask_check import masked_samples
from castlm.distributed.sharding import compile_blocks_, is_sharded, reshard_, shard_
from castlm.distributed.world import World
from castlm.export.hf import check_export
from castlm.hardware import autocast, check_compile, choose_fused, choose_precision, describe, why_slow
from castlm.methods.base import Retraining
from castlm.methods.table import class_of
from castlm.models.architecture import vocab_size
from castlm.training.config import TrainConfig
from castlm.training.effects import without_effect
from castlm.training.metrics import Evaluator
from castlm.training.objective import Objective, make_teacher
from castlm.training.schedule import schedule
from castlm.training.source import Source, open_source
from castlm.training.start import Start, is_untied, make_start, start_, stream_basis
from castlm.training.teacher_cache import TeacherCache
from castlm.training.teacher_pass import claim_teacher_cache, open_teacher_cache, teacher_dtype
from castlm.training.text import TrainingText, open_training_text


@dataclass
class Parts:
    """The parts of a run."""

    source: Source
    text: TrainingText
    objective: Objective
    """Student and teacher."""
    method: Retraining
    optimizer: AdamS
    optimizer_text: str
    """How the optimizer runs, in words."""
    evaluator: Evaluator
    names: dict[Tensor, str]
    """Name of every trained parameter; collected right after sharding, when each is a DTensor among several ranks."""
    initial_masks: dict[str, Tensor]
    """The masks of step 0 in bits, by parameter name."""
    budget: DecayBudget | None
    dense_perplexity: float | None
    """Of the dense model, if step 0 does not compute with its weights any more."""
    start: dict[str, Any]
    """The record of the start; empty if it is magnitude."""


def filter_of(config: TrainConfig) -> FilterFn:
    """Which modules a run makes sparse: those of `is_sparse_linear` without `left_dense`."""

    def is_sparse(module: torch.nn.Module, fqn: str) -> bool:
        return is_sparse_linear(module, fqn) and not any(part in fqn for part in config.left_dense)

    return is_sparse


def check_left_dense(config: TrainConfig, model: torch.nn.Module) -> None:
    """Raises `InputError` if a part of `left_dense` is in the name of no layer that could be sparse."""
    names = [name for name, module in model.named_modules() if is_sparse_linear(module, name)]
    for part in config.left_dense:
        if not any(part in name for name in names):
            raise InputError(f"left_dense {part} is in the name of no sparse layer: they are named like {names[-1]}")


def global_batch(config: TrainConfig, world: World) -> int:
    """Sequences of one optimizer step, on all ranks together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size


def set_up(config: TrainConfig, world: World, *, resumed: dict[str, Any] | None = None) -> Parts:
    """Makes the parts of a run.

    Args:
        resumed: the record of the start of a resumed run, which gets weights and masks from its checkpoint instead.

    Raises:
        InputError: on anything the user can put right.
    """
    method_class = class_of(config.method, config.adapter)
    method_class.check(config)
    check_compile(config.torch_compile, world.device)
    source = open_source(config, world)
    model = source.model
    check_left_dense(config, model)
    text = open_training_text(config, source.tokenizer, vocab_size(model.config), world)
    precision = choose_precision(config.precision, world.device, model.config)
    world.check_all(_why_one_process(config, method_class) if world.size > 1 else None)
    pattern, filter_fn = Pattern.parse(config.pattern), filter_of(config)
    if config.method != "dense":
        check_export(model, pattern, filter_fn)
    has_start = resumed is None and config.start != "magnitude"
    start = make_start(config, source, text, pattern, filter_fn, world) if has_start else Start(record=resumed or {})
    cache = open_teacher_cache(config, text, vocab_size(model.config), world)
    if cache is not None:
        cache.complete = cache.covers(config.max_steps * global_batch(config, world))
    has_teacher = config.eta > 0 and not (cache and cache.complete)
    teacher = make_teacher(model, teacher_dtype(precision)) if has_teacher else None
    if is_untied(start.record):
        source.untie_()
    method = method_class(model, config, pattern, filter_fn)
    objective = _objective(config, model, teacher, cache)
    _shard(objective, source.stored, precision, world, method.whole_copies)
    names = _trained_parameters(objective)
    if cache is not None:
        claim_teacher_cache(cache, config, model, precision)
    fused, optimizer_text = choose_fused(config.fused_optimizer, world.device, sum(p.numel() for p in names))
    optimizer = method.build_optimizer(model, fused)
    evaluator = Evaluator(
        objective, text.held_out, config.seq_len, config.per_device_train_batch_size, precision, world
    )
    dense_perplexity = None if resumed is not None else _begin(config, model, method, start, evaluator, world)
    if config.hidden_loss_weight:
        objective.stream_basis = stream_basis(start, world)
    masks = method.masks()
    initial_masks = {names[p]: like_rows(pack_mask(local(m)), p) for p, m in masks.items()}
    budget = _decay_budget(config, method, local_masks(masks), world)
    return Parts(
        source,
        text,
        objective,
        method,
        optimizer,
        optimizer_text,
        evaluator,
        names,
        initial_masks,
        budget,
        dense_perplexity,
        start.record,
    )


def _objective(
    config: TrainConfig, model: PreTrainedModel, teacher: torch.nn.Module | None, cache: TeacherCache | None
) -> Objective:
    """Student, teacher and loss, with checkpointed and compiled blocks where the config asks for them."""
    if config.gradient_checkpointing:
        how = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.24 on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    objective = Objective(
        model,
        teacher,
        config.eta,
        config.temperature,
        config.teacher_top_k,
        cache,
        not config.cross_document_attention,
        hidden_weight=config.hidden_loss_weight,
    )
    if config.torch_compile:
        compile_blocks_(objective)
    return objective


def _begin(
    config: TrainConfig,
    model: PreTrainedModel,
    method: Retraining,
    start: Start,
    evaluator: Evaluator,
    world: World,
) -> float | None:
    """Gives the model of a new run the weights and masks of step 0.

    Returns:
        The perplexity of the dense model, where step 0 does not compute with its weights any more.
    """
    has_start = config.start != "magnitude"
    dense_perplexity = None
    if (has_start or method.starts_sparse) and not config.is_finetuning:
        with method.unmasked():
            dense_perplexity = evaluator.perplexity()
    if has_start:
        start_(model, method, start, world)
    else:
        method.start_from_magnitude_()
    return dense_perplexity


def _why_one_process(config: TrainConfig, method_class: type[Retraining]) -> str | None:
    """Why a method cannot run on several ranks with these options; None if it can."""
    if method_class.masks_forward:
        return f"method {config.method} masks whole weights in the forward pass: run it in one process"
    if method_class.whole_copies and config.sharding != "replicate":
        return (
            f"sharding {config.sharding}: adapter {config.adapter} needs the whole model on each rank: set "
            "sharding replicate, or adapter none"
        )
    return None


def local_masks(masks: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """This rank's part of every sparse weight, with its mask."""
    return {local(p.data): local(mask) for p, mask in masks.items()}


def _shard(objective: Objective, stored: Checkpoint | None, precision: str, world: World, whole_copies: bool) -> None:
    """Shards student and teacher, and among several ranks reads each rank's rows; or leaves each rank its copy."""
    if stored is None:
        objective.to(world.device)
    if not whole_copies:
        shard_(objective, world, precision)
    if stored is not None:
        materialize_(objective, world.device)
        load_rows_(objective.student, stored, world)
        if objective.teacher is not None:
            load_rows_(objective.teacher, stored, world)
    if is_sharded(objective):
        register_fsdp_forward_method(objective, "prove_head")
        register_fsdp_forward_method(objective, "check_documents_apart")
    with autocast(world.device, precision):  # what is gathered in bf16 multiplies nothing else
        if stored is not None:
            objective.prove_head()
        objective.check_documents_apart()
    reshard_(objective)  # else the root goes on with these weights after a checkpoint is loaded


def _trained_parameters(objective: Objective) -> dict[Tensor, str]:
    """Names of the student's parameters. FSDP leaves the root's parameters unsharded after a forward pass, so that a
    later walk over the model would find other tensors than those that the optimizer steps."""
    names: dict[Tensor, str] = {param: name for name, param in objective.student.named_parameters()}
    if is_sharded(objective):
        whole = [name for param, name in names.items() if not isinstance(param, DTensor)]
        assert not whole, f"{whole[0]} is not sharded"
    return names


def _decay_budget(
    config: TrainConfig, method: Retraining, masks: dict[Tensor, Tensor], world: World
) -> DecayBudget | None:
    if not method.decays or not DECAYS[config.decay].reduces:
        return None
    budget = decay_budget(masked_samples(masks, world), *schedule(config), config.decay)
    if not budget.reaches_zero and not config.ignore_decay_budget:
        raise InputError(f"{budget.explain()} (ignore_decay_budget runs it all the same)")
    return budget


def introduction(config: TrainConfig, parts: Parts, world: World) -> Iterator[str]:
    """The lines that a run begins with."""
    method, source = parts.method, parts.source
    where = describe(world.device, world.size, parts.evaluator.precision, parts.optimizer_text)
    yield f"{source.loaded.source}: {where}"
    if slow := why_slow(parts.evaluator.precision, world.device):
        yield slow
    by_reason: dict[str, list[str]] = {}
    for name, reason in method.left_dense.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        yield f"left dense: {shown} ({reason})"
    sparse = sum(map(num_weights, method.layers.values()))
    total = sum(p.numel() for p in parts.names if config.adapter == "none" or not p.requires_grad)
    masks = f"{config.pattern} from {config.start}" if method.layers else "no masks"
    if config.adapter != "none":
        trained = sum(p.numel() for p in parts.names if p.requires_grad)
        masks += f", adapter {config.adapter} of {trained:,} weights"
    yield f"{config.method}: {sparse:,} of {total:,} weights in {len(method.layers)} layers, {masks}"
    if parts.text.documents.is_chat:
        which = "the assistant's tokens count" if config.assistant_only_loss else "all tokens count"
        what = "conversations with images" if parts.text.documents.has_images else "conversations"
        yield f"{what}: {which} in the loss; the perplexity is over {parts.text.held_out.tokens} tokens"
    if config.teacher_cache:
        here = "every sequence is in the cache: no teacher is loaded"
        kept = here if parts.objective.teacher is None else "missing sequences are added"
        yield f"teacher: top {config.teacher_top_k} tokens, cached in {config.teacher_cache} ({kept})"
    if config.hidden_loss_weight:
        yield f"hidden states: their distance to the teacher's has weight {config.hidden_loss_weight:g}, falling to 0"
    if parts.budget is not None:
        yield parts.budget.explain()
    yield from (f"no effect: {reason}" for reason in without_effect(config, parts.text.has_chat).values())
