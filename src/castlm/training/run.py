"""A run in progress: one optimizer step, an evaluation, a checkpoint. `castlm.training.train` puts them in order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.decay import DecayBudget
from castlm.core.errors import DivergedError, InputError
from castlm.core.nm import pack_mask
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import dense_name, num_weights
from castlm.data.tokens import check_vocabulary
from castlm.distributed.mask_check import SelfCheck
from castlm.distributed.sharding import average_gradients_, sum_over_replicas_
from castlm.distributed.world import World
from castlm.facts import Start, TrainedRounding, to_json
from castlm.hardware import autocast, describe, peak_memory, why_slow
from castlm.methods.base import Retraining
from castlm.models.architecture import vocab_size
from castlm.progress import note
from castlm.training.checkpoint import Saver, check_same_run, load_checkpoint, newest, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.metrics import (
    Evaluator,
    forward_flops,
    mask_figures,
    masked_histogram,
    masked_shares,
    peak_flops,
    trained_rounding,
)
from castlm.training.objective import Objective, pruned
from castlm.training.run_folder import RunFolder, check_shared
from castlm.training.source import Source, TrainingText
from castlm.training.telemetry import Telemetry, TrackedRun, Tracker, open_trackers

LARGE = 300e6
"""Weights from which on the default learning rate is too high: one of 0.5B went from 21.7 to 46.4 in 4 steps."""
_MOST_UNCOUNTED = 100
"""A run ends after this many consecutive steps in which no token counts."""


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
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    """The duration of the last evaluation, and of the last save, in this process."""

    def seconds_left(self, last: int, *, eval_steps: int, save_steps: int) -> float:
        """Seconds to the end of step `last`; each evaluation and save on the way takes as long as the last one."""
        evaluations = num_left(self.step, last, eval_steps) * self.eval_seconds
        saves = num_left(self.step, last, save_steps) * self.save_seconds
        return self.seconds / self.step * (last - self.step) + evaluations + saves


@dataclass(kw_only=True)
class Run:
    """A run: its components, its progress, and after `begin` its logs and checkpoints."""

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
    dense_perplexity: float | None
    """Perplexity of the dense model, if step 0 has other weights."""
    start: Start
    """The report of the start."""
    budget: DecayBudget | None = None
    trackers: Sequence[str] = ()
    resumed_from: Path | None = None
    progress: Progress = field(default_factory=Progress)
    initial_masks: dict[str, Tensor] = field(init=False)
    """The masks of step 0 in bits, by parameter name."""
    rounding: TrainedRounding | None = field(init=False)
    """The format of trained rounding; None without it."""
    telemetry: Telemetry = field(init=False)
    saver: Saver = field(init=False)
    self_check: SelfCheck = field(init=False)
    flops_per_token: float = field(init=False)
    peak_flops: float | None = field(init=False)
    """The peak of a device in FLOP/s, if it is known."""
    _uncounted: int = field(default=0, init=False)
    """Consecutive steps in which no token counted."""

    def __post_init__(self) -> None:
        masks = self.method.masks()
        self.initial_masks = {self.names[p]: like_rows(pack_mask(local(mask)), p) for p, mask in masks.items()}
        self.rounding = trained_rounding(self.model, self.method.layers, self.config.model.pattern)

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def optimizer(self) -> AdamS:
        return self.method.optimizer

    @property
    def total_steps(self) -> int:
        return self.config.optimizer.max_steps

    def begin(self, *, announce: bool = True) -> Self:
        """Claims the output folder for this run and opens its logs; returns itself. Nothing is written before.

        With `announce` it prints the model, the method, the layers and the options without effect.
        """
        options = self.config.checkpoint
        self.progress.first_step = self.progress.step
        watched = self.method.layers if self.method.decays else {}
        self.self_check = SelfCheck(self.optimizer, watched, self.config.model.pattern, self.world)
        seq_len, teacher = self.config.data.seq_len, self.objective.teacher
        self.flops_per_token = 3 * forward_flops(self.names.items(), self.model.config, seq_len)  # backward: twice it
        if teacher is not None:
            parameters = {parameter: name for name, parameter in teacher.named_parameters()}
            self.flops_per_token += forward_flops(parameters.items(), teacher.config, seq_len)
        self.peak_flops = peak_flops(self.world.device, self.evaluator.precision)
        opened: list[Tracker] = []

        def open_folder_and_trackers() -> None:
            with self.folder.begun(self.config.as_yaml(), resume=options.resume):
                self.text.indexes.save(self.folder.text_index)
                run = TrackedRun(self.folder.path, self.folder.run_id, self.config.as_dict(), self.progress.step)
                chosen = "auto" not in options.report_to  # a broken client that nobody asked for stops no run
                opened.extend(open_trackers(self.trackers, run, None if chosen else note))

        self.world.on_main(open_folder_and_trackers, patient=True)
        if options.overwrite:
            check_shared(self.folder.path, self.world)  # again: `begun` has replaced the folder
        self.telemetry = Telemetry(
            self.folder.path,
            self.total_steps,
            is_main=self.world.is_main,
            start_step=self.progress.step,
            trackers=opened,
            hidden=self.method.fixed_figures,
        )
        say = self.telemetry.say
        self.saver = Saver(
            self.folder.checkpoints, options.save_total_limit, self.world, background=options.async_save, say=say
        )
        if announce:
            for line in self.introduction():
                say(line)
            if self.trackers:
                say(f"metrics: metrics.jsonl, {', '.join(self.trackers)}")
        if self.resumed_from is not None:
            say(f"resuming {self.resumed_from}")
        elif options.resume:
            say(f"{self.folder.path} holds no checkpoint yet: starting at step 0")
        return self

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
            is_whole = self.objective.teacher is None
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

    def train_step(self) -> None:
        """One optimizer step, with its log line.

        Raises:
            DivergedError: a loss or gradient is not finite, or a weight is NaN.
            InputError: a token outside the vocabulary; or no token has counted for many steps.
        """
        config, step, started = self.config, self.progress.step, time.perf_counter()
        optimizer = config.optimizer
        seed = np.random.SeedSequence([config.data.seed, step, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # a function of the step, so that checkpoints need no generator's state
        lr = optimizer.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(self.text.loader) for _ in range(optimizer.gradient_accumulation_steps)]
        check_vocabulary(torch.stack([b["input_ids"] for b in micro_batches]), vocab_size(self.model.config))
        counts = [[b["labels"].numel(), int((b["labels"] != -100).sum())] for b in micro_batches]
        # Tokens that count differ between micro-batches and ranks, so the loss is normalised by their number in the
        # whole global batch: a mean of means would weigh the tokens of a short micro-batch more.
        read, num_tokens = self.world.sum(torch.tensor(counts).sum(dim=0).to(self.world.device))
        total, ce, kl, hidden = self.world.sum(self._accumulate(micro_batches, num_tokens)).tolist()
        self._uncounted = 0 if num_tokens else self._uncounted + 1
        if self._uncounted >= min(_MOST_UNCOUNTED, self.total_steps - self.progress.first_step):
            self.saver.finish_despite_error(on_all_ranks=True)
            raise InputError(
                f"step {step + 1}: no token has counted in the loss of {self._uncounted} steps: raise seq_len, look at "
                "the data, or set assistant_only_loss to false"
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.names if p.grad is not None])
        if optimizer.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.names, optimizer.max_grad_norm, norm)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not np.isfinite([total, grad_norm]).all():
            what = f"the loss is {total} and the gradient norm {grad_norm}"
            raise DivergedError(self._diverged(what, on_all_ranks=True))
        self.method.before_update(step)
        with self.self_check.around_step(step, self.method.mask_interval):  # AdamS refreshes its masks in `step`
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        values = {"loss": total, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}
        if config.teacher.hidden_weight:
            values["hidden"] = hidden
        if self.method.decays:
            values["alpha"] = config.method.alpha(step, self.total_steps)
        if self.text.is_masked:
            values["loss_tokens"] = int(num_tokens)
        self._log_step(values, num_read=int(read), seconds=time.perf_counter() - started)

    def _accumulate(self, micro_batches: Sequence[dict[str, Any]], num_tokens: Tensor) -> Tensor:
        """Adds up the gradients of a step; returns this rank's sums of the loss and its parts, float32, (4,).

        Args:
            num_tokens: the number of tokens that count in the loss, over all micro-batches and ranks.
        """
        objective, device = self.objective, self.world.device
        try:
            self.method.before_forward(self.progress.step)
        except InputError as error:  # NaN has no rank among the weights of a group
            raise DivergedError(self._diverged(str(error))) from error
        objective.hidden_weight = self.config.teacher.hidden_weight_at(self.progress.step, self.total_steps)
        objective.train()
        if objective.teacher is not None:
            objective.teacher.eval()
        sums = torch.zeros(4, device=device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            if self.world.num_replicas > 1 and number in (0, last):
                sum_over_replicas_(objective, now=number == last)
            with autocast(device, self.evaluator.precision):
                loss = objective(num_tokens=num_tokens, **objective.on_device(batch, device))
            # FSDP averages gradients over ranks. The loss is already divided by the tokens of all ranks, so only a sum
            # is wanted: multiplying by the number of ranks undoes the average.
            (loss.loss * self.world.size).backward()
            sums += torch.stack(loss).detach().float()
        average_gradients_(objective, self.names, self.world)
        return sums

    def _log_step(self, values: dict[str, float], num_read: int, seconds: float) -> None:
        """Counts a finished step, and logs it with its speed."""
        progress, options = self.progress, self.config.checkpoint
        progress.step += 1
        progress.tokens += num_read
        progress.seconds += seconds
        eval_steps = self.config.evaluation.steps_between(self.total_steps)
        values |= {
            "tokens": progress.tokens,
            "tokens_per_s": num_read / seconds,
            "eta_s": progress.seconds_left(self.total_steps, eval_steps=eval_steps, save_steps=options.save_steps),
        }
        if self.peak_flops is not None:
            values["mfu"] = self.flops_per_token * num_read / seconds / (self.peak_flops * self.world.size)
        self.telemetry.log(progress.step, values)

    def _diverged(self, what: str, on_all_ranks: bool = False) -> str:
        self.saver.finish_despite_error(on_all_ranks=on_all_ranks)
        found = newest(self.folder.checkpoints)
        last = f"the last checkpoint is {found}" if found else "there is no checkpoint yet"
        return f"step {self.progress.step + 1}: {what}; {last}; lower learning_rate or look at the data"

    def evaluate(self) -> None:
        """Measures the perplexity of the current forward pass, and of the model if it were pruned now."""
        started = time.perf_counter()
        values = {"tokens": self.progress.tokens, "perplexity": self.evaluator.perplexity()}
        masks = local_masks(self.method.masks())
        if masks:
            initial = [local(mask) for mask in self.initial_masks.values()]  # in the order of `masks`
            state = mask_figures(masks, initial, self.method.flips(), self.world)
            values["prune_now_ppl"] = values["perplexity"]
            if state["largest_masked"] != 0 and not self.method.masks_forward:  # otherwise the prune changes nothing
                with pruned(masks):
                    values["prune_now_ppl"] = self.evaluator.perplexity()
            values |= state
        if self.progress.step == 0 and self.dense_perplexity is not None:
            values["dense_ppl"] = self.dense_perplexity
        for name, part in self.text.eval_parts.items():
            values[f"perplexity/{name}"] = self.evaluator.perplexity(part)
        self.progress.figures[str(self.progress.step)] = values
        details: dict[str, Any] = {"peak_memory_bytes": peak_memory(self.world.device.type)}  # for metrics.jsonl alone
        if masks:
            histogram = masked_histogram(masks, self.world)
            assert histogram is not None  # there are masks
            details["masked_histogram"] = [histogram.zeros, *histogram.counts]
        if masks and self.progress.step == 0:
            names = [dense_name(name).removesuffix(".weight") for name in self.initial_masks]
            details["masked_share"] = dict(zip(names, masked_shares(masks, self.world)))
        self.telemetry.evaluated(self.progress.step, values, details)
        self.progress.eval_seconds = time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name, as views: loading fills them in place."""
        found = dict(self.method.tensors())
        for param, name in self.names.items():
            if param.requires_grad:
                found[f"model.{name}"] = param.detach()
                found |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[param].items()}
        found |= {f"initial_masks.{name}": mask for name, mask in self.initial_masks.items()}
        if self.objective.stream_basis is not None:
            found["stream_basis"] = self.objective.stream_basis
        return found

    def save(self) -> None:
        started = time.perf_counter()
        self.saver.finish()
        self.cover_teacher_cache()  # before the save, so that a resumed run continues no later than the cache ends
        flips = torch.tensor(float(self.method.flips()), device=self.world.device, dtype=torch.float64)
        manifest = {
            "config": self.config.as_dict(),
            "facts": self.facts,
            "data": self.text.loader.state_dict(),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "figures": self.progress.figures,
            "start": to_json(self.start),
            "flips": int(self.world.sum(flips)) // self.world.num_replicas,
        }
        self.saver.save(self.progress.step, self.tensors(), manifest)
        self.progress.save_seconds = time.perf_counter() - started

    def cover_teacher_cache(self) -> None:
        """Records the sequences that the teacher cache now holds."""
        if self.objective.cache is not None:
            batch = self.config.optimizer.sequences_per_step(self.world.size)
            whole_epoch = self.config.data.repeat_sequences and self.text.loader.state_dict()["epoch"] > 0
            first, last = self.progress.first_step * batch, self.progress.step * batch
            self.objective.cache.cover(first, last, every_epoch=whole_epoch)

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint. Raises `InputError` if it belongs to another run, or is corrupt."""
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts)
        manifest = load_checkpoint(path, self.tensors(), self.world)
        self.text.loader.load_state_dict(manifest["data"])
        self.progress = Progress(manifest["step"], manifest["tokens"], manifest["seconds"], manifest["figures"])
        first_shard = self.world.shard_index == 0  # the total, on one rank of each replica; 0 on the others
        self.method.restore_flips(manifest["flips"] if first_shard else 0)


def local_masks(masks: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """This rank's part of every sparse weight, with its mask."""
    return {local(p.data): local(mask) for p, mask in masks.items()}
