"""A run: its components and the facts about it. `castlm.training.train` makes it, steps it and records it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.decay import DecayBudget
from castlm.core.shards import local
from castlm.core.sparsify import num_weights
from castlm.distributed.world import World
from castlm.facts import Start, TrainedRounding, to_json
from castlm.hardware import arithmetic, describe, why_slow
from castlm.methods.base import Retraining
from castlm.training.checkpoint import check_same_run, load_checkpoint, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.metrics import Evaluator
from castlm.training.objective import Objective
from castlm.training.run_folder import RunFolder
from castlm.training.source import Source, TrainingText

LARGE = 300e6
"""Weights from which on the default learning rate is too high: one of 0.5B went from 21.7 to 46.4 in 4 steps."""


def num_left(step: int, last: int, every: int) -> int:
    """The number of multiples of `every` from `step` to `last`; `last` always counts as one. 0 if `every` is 0.

    Examples:
        >>> num_left(1, last=10, every=4)  # at 4, 8 and 10
        3
    """
    return -(-last // every) - (step - 1) // every if every else 0


@dataclass
class Progress:
    """The steps, tokens, time and evaluations of a run so far."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """The figures of each evaluation, by step."""
    first_step: int = 0
    """The step from which this process started."""
    new_arithmetic: list[str] = field(default_factory=list)
    """The changes since the checkpoint that it continues, which change the last bits of a result; see `arithmetic`."""
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    """The duration of the last evaluation, and of the last save, in this process."""

    def seconds_left(self, last: int, *, eval_steps: int, save_steps: int) -> float:
        """Seconds to the end of step `last`; each evaluation and save on the way takes as long as the last one."""
        evaluations = num_left(self.step, last, eval_steps) * self.eval_seconds
        saves = num_left(self.step, last, save_steps) * self.save_seconds
        return self.seconds / self.step * (last - self.step) + evaluations + saves


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run before, between and after its steps: components that are never replaced, and facts that never change.

    What the components hold changes, such as weights, masks and the position in the text; `progress` counts the steps.
    """

    config: TrainConfig
    world: World
    folder: RunFolder
    source: Source
    teacher_fingerprint: str | None
    """A hash of the weights of the option `teacher`; None if the dense model is the teacher."""
    text: TrainingText
    objective: Objective
    """Student and teacher."""
    method: Retraining
    """The method with its optimizer."""
    optimizer_text: str
    """The implementation of the optimizer's update, in words."""
    evaluator: Evaluator
    names: dict[Tensor, str]
    """Name of every trained parameter; collected right after sharding, when each is a DTensor among several ranks."""
    initial_masks: dict[str, Tensor]
    """The masks of step 0 in bits, (out, in / 8) uint8, by parameter name."""
    dense_perplexity: float | None
    """Perplexity of the dense model, if step 0 has other weights."""
    start: Start
    """The report of the start."""
    rounding: TrainedRounding | None
    """The format of trained rounding; None without it."""
    budget: DecayBudget | None = None
    trackers: Sequence[str] = ()
    resumed_from: Path | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def optimizer(self) -> AdamS:
        return self.method.optimizer

    @property
    def total_steps(self) -> int:
        return self.config.optimizer.max_steps

    @property
    def facts(self) -> dict[str, Any]:
        """The facts, besides the config, in which a resumed run must equal the saved one."""
        facts = {
            "world_batch": self.config.optimizer.sequences_per_step(self.world.size),
            "model_fingerprint": self.source.fingerprint,
            "dataset_sha256": self.text.train_sha256,
            "eval_sha256": self.text.eval_sha256,
            "precision_used": self.evaluator.precision,
        }
        if self.teacher_fingerprint:
            facts["teacher_fingerprint"] = self.teacher_fingerprint
        if self.text.template_sha256:
            facts["chat_template_sha256"] = self.text.template_sha256
        return facts

    def introduction(self) -> Iterator[str]:
        """The lines that describe a run before its first step."""
        config, method, teacher = self.config, self.method, self.config.teacher
        where = describe(self.world.device, self.world.size, self.evaluator.precision, self.optimizer_text)
        yield f"{self.source.loaded.source}: {where}"
        if slow := why_slow(self.evaluator.precision, self.world.device):
            yield slow
        by_reason: dict[str, list[str]] = {}
        for name, reason in method.left_dense.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"left dense: {shown} ({reason})"
        sparse = sum(map(num_weights, method.layers.values()))
        total = sum(parameter.numel() for parameter in method.own_parameters(self.names))
        masks = f"{config.model.pattern} from {config.start.name}" if method.layers else "no masks"
        masks += method.trained_part(self.names)
        yield f"{config.method.method}: {sparse:,} of {total:,} weights in {len(method.layers)} layers, {masks}"
        if found := self.rounding:
            where = f"{found.layers} layers, {found.bits_per_weight:.2f} bits a weight"
            yield f"rounding: {found.kind} in {where}, with trained scales"
        if self.text.is_masked:
            yield self.text.explain()
        if self.teacher_fingerprint:
            yield f"teacher: {teacher.teacher}"
        if teacher.teacher_cache:
            is_whole = self.objective.teacher_model is None
            state = (
                "every sequence is in the cache: no teacher is loaded" if is_whole else "missing sequences are added"
            )
            yield f"teacher: top {teacher.teacher_top_k} tokens, cached in {teacher.teacher_cache} ({state})"
        if teacher.hidden_weight:
            yield f"hidden states: their distance to the teacher's has weight {teacher.hidden_weight:g}, falling to 0"
        if self.budget is not None:
            yield self.budget.explain()
        if "learning_rate" not in config.given and not config.is_finetuning and total > LARGE:
            yield (
                f"learning_rate {config.optimizer.learning_rate:g} is the default, which suits models of about 100M "
                f"weights: with {total / 1e6:,.0f}M try 1e-4 (2e-5 from 7B on), or the file of its family in configs/"
            )
        yield from (f"no effect: {reason}" for reason in config.without_effect(is_plain=self.text.is_plain).values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name, as views: loading fills them in place."""
        found = dict(self.method.tensors())
        for param, name in self.names.items():
            if param.requires_grad:
                found[f"model.{name}"] = param.detach()
                found |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[param].items()}
        found |= {f"initial_masks.{name}": mask for name, mask in self.initial_masks.items()}
        return found

    def manifest(self) -> dict[str, Any]:
        """The part of a checkpoint that is no tensor; all ranks call it."""
        # a sum over ranks, in fp64: exact up to 2^53 entries
        flips = torch.tensor(float(self.method.flips()), device=self.world.device, dtype=torch.float64)
        return {
            "config": self.config.as_dict(),
            "facts": self.facts,
            "data": self.text.loader.state_dict(),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "figures": self.progress.figures,
            "arithmetic": arithmetic(self.world.device),
            "start": to_json(self.start),
            "flips": int(self.world.sum(flips)) // self.world.num_replicas,  # replicas hold the same masks
        }

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint. Raises `InputError` if it belongs to another run, or is corrupt."""
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts)
        manifest, progress = load_checkpoint(path, self.tensors(), self.world), self.progress
        self.text.loader.load_state_dict(manifest["data"])
        progress.step = progress.first_step = manifest["step"]
        progress.tokens, progress.seconds, progress.figures = (manifest[k] for k in ("tokens", "seconds", "figures"))
        before, now = manifest.get("arithmetic", {}), arithmetic(self.world.device)
        progress.new_arithmetic = [f"{k} {before[k]} -> {now[k]}" for k in now if before.get(k, now[k]) != now[k]]
        first_shard = self.world.shard_index == 0  # the total, on one rank of each replica; 0 on the others
        self.method.restore_flips(manifest["flips"] if first_shard else 0)


def local_masks(masks: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """This rank's part of every sparse weight, with its mask."""
    return {local(p.data): local(mask) for p, mask in masks.items()}
