"""The Trainer: builds model, text, start, objective and optimizer from a config, and takes the steps.

The constructor and `train` are the recipe, from top to bottom. All ranks call each method together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.decay import DECAYS, DecayBudget, decay_budget
from castlm.core.errors import DivergedError, InputError
from castlm.core.nm import NM, pack_mask
from castlm.core.rounding import fit_rounding_
from castlm.core.shards import like_rows, local
from castlm.core.sparsify import dense_name, num_weights, sparse_linears
from castlm.data.columns import Kind
from castlm.data.scored import ScoredText
from castlm.data.tokens import check_vocabulary
from castlm.distributed.gradients import SumsInOrder, clip_, gradient_norm
from castlm.distributed.mask_check import SelfCheck
from castlm.distributed.sharding import average_gradients_, compile_blocks_, sum_over_replicas_
from castlm.export.hf import check_export
from castlm.facts import Start, from_json, to_json
from castlm.files.output import check_beside
from castlm.hardware import (
    arithmetic,
    autocast,
    check_compile,
    choose_fused,
    choose_precision,
    describe,
    peak_memory,
    why_slow,
)
from castlm.methods.base import Retraining, class_of
from castlm.models.architecture import vocab_size
from castlm.models.loading import StoredWeights
from castlm.models.locate import locate
from castlm.oneshot.draw import Draw
from castlm.oneshot.folder import partial_folder
from castlm.oneshot.methods import all_methods, trained_from
from castlm.oneshot.options import EFFORTS
from castlm.packed.native import longest_free_group
from castlm.progress import note
from castlm.signals import Interrupt
from castlm.training.checkpoint import (
    RunFolder,
    Saver,
    check_same_run,
    check_shared,
    load_checkpoint,
    newest,
    read_manifest,
)
from castlm.training.config import TrainConfig
from castlm.training.in_backward import StepInBackward
from castlm.training.metrics import (
    forward_flops,
    held_out_loss,
    mask_figures,
    masked_histogram,
    masked_shares,
    peak_flops,
    trained_rounding,
)
from castlm.training.model import OpenedModel, check_teacher, filter_of, open_dense, open_weights, teacher_options
from castlm.training.objective import Objective, as_teacher_, checkpoint_activations_, pruned, shard_objective_
from castlm.training.options import CheckpointOptions, DataOptions, TeacherOptions
from castlm.training.start import check_pattern, keep_own_masks_, load_start_, open_given, prune_for_start
from castlm.training.teacher_cache import TeacherCache, teacher_dtype
from castlm.training.telemetry import Telemetry, TrackedRun, Tracker, chosen_trackers, open_trackers
from castlm.training.text import TrainingText, open_training_text
from castlm.training.verdict import has_risen
from castlm.world import World
from castlm_runtime.reading import user_path

_MAX_UNCOUNTED = 100
"""A run ends after this many consecutive steps in which no token counts."""


class Trainer:
    """A run: its parts, and the state that a checkpoint holds.

    The constructor builds the parts, and loads the checkpoint of a run that is resumed. Checks that can fail come
    first, and nothing in the output folder changes before `recording`.

    Args:
        config: a config whose `lam` and `learning_rate` are numbers.
        start_beside: the output folder beside which the start leaves its finished blocks; by default that of `config`.
        method_class: the class that trains; by default that of the options `method` and `adapter`.

    Attributes:
        dense: the dense model as it was opened; `model` is the one that is trained.
        text: the training text and the evaluation texts.
        objective: student and teacher.
        method: the method with its `optimizer`.
        names: the name of every trained parameter.
        initial_masks: the masks of step 0 in bits, (out, in / 8) uint8, by parameter name.
        start: the report of the start.
        teacher_fingerprint: a hash of the weights of the option `teacher`; None if the dense model is the teacher.
        dense_perplexity: the perplexity of the dense model, if step 0 has other weights.
        rounding: the format of trained rounding; None without it.
        budget: the decay budget; None if no weights decay, or in a resumed run.
        resumed_from: the checkpoint that the run continues; None if it has started at step 0.
        step: the number of steps that have been taken.
        tokens, seconds: tokens that they have read, and their time.
        figures: the figures of each evaluation, by step.
    """

    start: Start
    dense_perplexity: float | None
    _dense_general: float | None

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        *,
        start_beside: CheckpointOptions | None = None,
        method_class: type[Retraining] | None = None,
    ) -> None:
        self.config, self.world, self.folder = config, world, RunFolder(config.checkpoint.output_dir)
        self.step = self.first_step = self.tokens = 0
        self.seconds = self._eval_seconds = self._save_seconds = 0.0
        self.figures: dict[str, dict[str, float]] = {}
        self._new_arithmetic: list[str] = []
        self._method_class = method_class or class_of(config.method.method, config.adapter.adapter)
        start_beside = start_beside or config.checkpoint

        self._check(user_path(start_beside.output_dir))
        self._open_model_and_text()
        start = self._make_start(user_path(start_beside.output_dir), start_beside.overwrite)
        self._build_objective()
        self._build_optimizer()
        self._set_step_0(start)
        if self.resumed_from is not None:
            self._restore(self.resumed_from)

    def _check(self, start_output: Path) -> None:
        """Refuses in the first second whatever it can, and finds the checkpoint that the run continues."""
        config, world = self.config, self.world
        self._method_class.check(config.method, config.optimizer)
        check_compile(config.runtime.torch_compile, world.device)
        if config.optimizer.moments_on_host and world.device.type == "cpu":
            raise InputError("moments_on_host: this run is on a CPU, where all memory is the host's: omit it")
        if world.size > 1:
            world.check_all(obstacle_on_ranks(config))
        self.trackers, self.resumed_from = world.on_main(lambda: self._look(start_output))
        check_teacher(config.teacher, config.model, seq_len=config.data.seq_len)

    def _look(self, start_output: Path) -> tuple[list[str], Path | None]:
        """The trackers of the run, and the checkpoint that it continues; checks that its start can be made."""
        options, start = self.config.checkpoint, self.config.start.name
        trackers = chosen_trackers(options.report_to)
        checkpoint = self.folder.newest_checkpoint(self.config.as_dict()) if options.resume else None
        if checkpoint is None and start not in all_methods():
            locate(start)
        elif checkpoint is None and start != "magnitude":
            check_beside(partial_folder(start_output))
        return trackers, checkpoint

    def _open_model_and_text(self) -> None:
        """Opens the dense model and the texts, and the teacher cache: one that cannot serve is refused here."""
        config, world, teacher = self.config, self.world, self.config.teacher
        self.dense = open_dense(
            config.model,
            world,
            seq_len=config.data.seq_len,
            teacher_top_k=teacher.teacher_top_k,
            whole_copies=self._method_class.whole_copies,
        )
        self._filter_fn = filter_of(config.model.left_dense, self.model)
        self.text = open_training_text(
            config.model,
            config.data,
            config.evaluation,
            self.dense.tokenizer,
            vocab_size(self.model.config),
            world,
            rows_per_rank=config.optimizer.per_device_train_batch_size,
            repeats=teacher.teacher_cache is not None,
        )
        self.precision = choose_precision(config.runtime.precision, world.device, self.model.config)
        if config.method.row.is_sparse:
            check_export(self.model, config.model.pattern, self._filter_fn)
        self._opened_teacher: OpenedModel | None = None
        self._cache: TeacherCache | None = None
        if teacher.teacher_cache is not None:
            self._opened_teacher = self._open_teacher()
            self._cache = open_teacher_cache(
                teacher, config.data, self.text, self._opened_teacher, self.precision, world
            )
            self._cache.complete = self._cache.covers(self._num_sequences)
        if config.method.row.is_sparse and self.resumed_from is None and not config.is_finetuning:
            self._note_longer_groups()

    def _open_teacher(self) -> OpenedModel:
        """The model that is distilled from: the dense one, unless another is named."""
        teacher, whole_copies = self.config.teacher, self._method_class.whole_copies
        if teacher.teacher is None or not teacher.eta:
            return self.dense
        return open_weights(teacher_options(teacher, self.config.model), self.world, whole_copies=whole_copies)

    def _make_start(self, output: Path, overwrite: bool) -> StoredWeights | None:
        """Makes the start, or opens the given one. It runs before the teacher is loaded, to save memory.

        Returns where its weights are stored; None for magnitude, for fine-tuning and in a resumed run.
        """
        config, world, start = self.config, self.world, self.config.start
        self.start = Start()
        if self.resumed_from is not None or start.name == "magnitude":
            return None
        scope: dict[str, Any] = {"pattern": config.model.pattern, "filter_fn": self._filter_fn}
        if config.is_finetuning:
            check_pattern(start.name, self.dense.read, self.dense, world, **scope)
            return None
        keeps_dense = config.method.step0(start.name) == "dense"
        if trained_from(start.name, config.model.pattern) is None:
            compares_hidden = bool(config.teacher.hidden_weight)
            return open_given(
                start.name,
                self.dense,
                world,
                output,
                **scope,
                keeps_dense=keeps_dense,
                compares_hidden=compares_hidden,
            )
        passes = 3 + (config.teacher.eta > 0)  # forward, twice as much backward, and the teacher's forward
        places, self.start = prune_for_start(
            start,
            self.dense,
            self.text,
            world,
            output,
            **scope,
            draw=Draw(
                documents=self.text.documents,
                num_sequences=start.calibration_sequences,
                seq_len=config.data.seq_len,
                seed=config.data.seed,
                precision=config.runtime.precision,
                effort=EFFORTS[start.start_effort],
            ),
            keeps_dense=keeps_dense,
            training_tokens=passes * self._num_sequences * config.data.seq_len / world.size,
            overwrite=overwrite,
        )
        return places

    def _build_objective(self) -> None:
        """Builds student and teacher in a fixed order: the teacher copies the dense weights, then the method
        parametrizes, then the model is sharded."""
        config, teacher, runtime = self.config, self.config.teacher, self.config.runtime
        opened, self._opened_teacher = self._opened_teacher or self._open_teacher(), None
        self.teacher_fingerprint = None if opened is self.dense else opened.fingerprint
        teacher_model = None
        if teacher.eta > 0 and not (self._cache and self._cache.complete):
            teacher_model = copy.deepcopy(self.model) if opened is self.dense else opened.model
            as_teacher_(teacher_model, teacher_dtype(self.precision))
        self.method = self._method_class(
            self.model,
            config.model.pattern,
            self._filter_fn,
            method=config.method,
            optimizer=config.optimizer,
            adapter=config.adapter,
            start=config.start.name,
            seed=config.data.seed,
        )
        if runtime.gradient_checkpointing:
            checkpoint_activations_(self.model)
        self.objective = Objective(
            self.model,
            teacher_model,
            teacher.eta,
            temperature=teacher.temperature,
            top_k=teacher.teacher_top_k,
            cache=self._cache,
            apart=not config.data.cross_document_attention,
            compares_hidden=bool(teacher.hidden_weight),
            own_attention=not runtime.torch_compile,
        )
        if runtime.torch_compile:
            compile_blocks_(self.objective)
        whole_copies = self._method_class.whole_copies
        shard_objective_(self.objective, self.dense.stored, opened.stored, self.precision, self.world, whole_copies)
        self.names = self.objective.trained_parameters()

    def _build_optimizer(self) -> None:
        """Builds the optimizer over the sharded parameters, and the parts of a step."""
        optimizer, method, world = self.config.optimizer, self.method, self.world
        fused, self.optimizer_text = choose_fused(world.device, sum(p.numel() for p in self.names))
        method.build_optimizer(self.model, fused)
        watched = method.layers if method.decays else {}
        self._self_check = SelfCheck(self.optimizer, watched, self.config.model.pattern, world)
        self._sums = SumsInOrder(self.objective, self.names, world)
        self._in_backward: StepInBackward | None = None
        if optimizer.step_in_backward:
            self._in_backward = StepInBackward(method, self.names, optimizer.max_grad_norm)
        self._num_uncounted = 0  # consecutive steps in which no token counted

    def _set_step_0(self, start: StoredWeights | None) -> None:
        """Measures the dense model, and lets the start set weights and masks; in a resumed run, only finds the masks.

        A resumed run was judged at its step 0, and has the weights of the dense model until they are restored.
        """
        config, method, is_new = self.config, self.method, self.resumed_from is None
        self.dense_perplexity = self._dense_general = None
        changes_weights = start is not None or method.step0 != "dense" or config.method.weight_bits
        if is_new and changes_weights and not config.is_finetuning:
            with method.unmasked():
                self.dense_perplexity = self.perplexity()
                self._dense_general = None if self.text.general is None else self.perplexity(self.text.general)
        if is_new and config.is_finetuning:
            keep_own_masks_(method)
        elif start is not None:
            load_start_(self.model, method, start, self.world)
        elif is_new:
            method.start_from_magnitude_()
        # After the start, whose weights the scales must fit; on resume they are read with the checkpoint.
        fit_rounding_(self.model, keep_scales=not is_new)
        self.initial_masks = {self.names[p]: like_rows(pack_mask(local(m)), p) for p, m in method.masks().items()}
        self.rounding = trained_rounding(self.model, method.layers, config.model.pattern)
        self.budget = self._decay_budget() if is_new else None

    @property
    def model(self) -> PreTrainedModel:
        return self.dense.model

    @property
    def optimizer(self) -> AdamS:
        return self.method.optimizer

    @property
    def total_steps(self) -> int:
        return self.config.optimizer.max_steps

    @property
    def _num_sequences(self) -> int:
        """Sequences of the run, on all ranks."""
        return self.total_steps * self.config.optimizer.sequences_per_step(self.world.size)

    # ------------------------------------------------------------------ the recipe

    def train(self, interrupt: Interrupt) -> None:
        """Takes the steps that are left, with their evaluations and checkpoints; inside `recording`.

        Raises:
            Interrupted: after a signal to any rank, once the state after the current step is saved.
            DivergedError: the run diverged; the last checkpoint is published before.
        """
        config, last = self.config, self.total_steps
        eval_steps, save_steps = config.evaluation.steps_between(last), config.checkpoint.save_steps
        with self.saver:
            if self.step == 0:
                self.evaluate()
            while self.step < last:
                self.world.meet(f"step {self.step + 1}")
                self.saver.finish_if_written()
                try:
                    figures = self.train_step()
                except DivergedError as error:
                    raise self._stopped_by(error) from error
                self.log(figures)
                is_last = self.step == last
                if self.step % eval_steps == 0 or is_last:
                    self.evaluate()
                    if not is_last and (rise := has_risen(config.method.row.step0 == "dense", self.figures)):
                        risen = DivergedError(f"step {self.step}: {rise}; lower learning_rate")
                        risen.on_all_ranks = True
                        raise self._stopped_by(risen)
                # A signal may reach one rank alone: all agree to stop, or the others would wait in their next
                # collective.
                is_stopped = self.world.any(interrupt.requested)
                if is_stopped or (save_steps and (self.step % save_steps == 0 or is_last)):
                    self.save()
                if is_stopped:
                    self.saver.finish()
                    raise interrupt.stopped(self.step, self.folder.path)
        self._cover_teacher_cache()

    def train_step(self) -> dict[str, float]:
        """Takes the next step; returns its figures, for the logs. It reads and writes no files but the text.

        Raises:
            DivergedError: a loss or gradient is not finite, or a weight is NaN.
            InputError: a token outside the vocabulary; or no token has counted for many steps.
        """
        config, step, started = self.config, self.step, time.perf_counter()
        lr = config.optimizer.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate_factor", 1.0)
        micro_batches = [next(self.text.loader) for _ in range(config.optimizer.gradient_accumulation_steps)]
        check_vocabulary(torch.stack([b["input_ids"] for b in micro_batches]), vocab_size(self.model.config))
        # tokens read, and tokens that count, of each micro-batch
        counts = [[b["labels"].numel(), int((b["labels"] != -100).sum())] for b in micro_batches]
        # The loss is the sum over all tokens of the global batch that count, divided by their number. Micro-batches and
        # ranks differ in that number, so a mean of their means would weigh the tokens of a short one more.
        read, num_tokens = self.world.sum(torch.tensor(counts).sum(dim=0).to(self.world.device))  # (..., 2) -> (2,)
        self._check_counted(num_tokens)
        try:
            self.method.before_forward(step)
        except InputError as error:  # NaN has no rank among the weights of a group
            raise self._diverged(str(error)) from error
        self.objective.train()
        take = self._step_after_backward if self._in_backward is None else self._step_in_backward
        (total, ce, kl, hidden), grad_norm = take(micro_batches, num_tokens)

        values = {"loss": total, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}
        if config.teacher.hidden_weight:
            values["hidden"] = hidden
        if self.method.decays:
            values["alpha"] = config.method.alpha(step, self.total_steps)
        if self.text.is_masked:
            values["loss_tokens"] = int(num_tokens)
        seconds = time.perf_counter() - started
        self.step, self.tokens, self.seconds = step + 1, self.tokens + int(read), self.seconds + seconds
        return values | {"tokens": self.tokens, "tokens_per_s": int(read) / seconds}

    def _step_after_backward(
        self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor
    ) -> tuple[list[float], float]:
        """Takes a step when all gradients are there; returns the loss with its parts, and the norm."""
        max_norm = self.config.optimizer.max_grad_norm
        losses = self._accumulate(micro_batches, num_tokens)
        # The norm is taken of the gradients of the whole global batch, before the method changes them.
        norm = gradient_norm(self.names)
        if max_norm:
            clip_(self.names, max_norm, norm)
        grad_norm = self._finite(losses, norm)
        # After the clipping, so that SR-STE's decay is not clipped with the gradient of the loss.
        self.method.before_update(self.step, self.names)
        with self._self_check.around_step(self.step, self.method.mask_interval):  # AdamS refreshes its masks in `step`
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # frees the gradients, as large as the weights
        return losses, grad_norm

    def _step_in_backward(
        self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor
    ) -> tuple[list[float], float]:
        """Takes a step in the backward pass, see `StepInBackward`; returns the loss with its parts, and the norm."""
        parts = self._in_backward
        assert parts is not None
        norm = None
        if parts.clips:  # a pass of its own, whose gradients are only measured
            with parts.measuring():
                losses = self._accumulate(micro_batches, num_tokens)
            self._finite(losses, norm := parts.norm())
        with self._self_check.around_step(self.step, self.method.mask_interval):
            self.optimizer.begin_step()
            with parts.stepping(self.step, norm):
                losses = self._accumulate(micro_batches, num_tokens)
        return losses, self._finite(losses, parts.norm())

    def _accumulate(self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor) -> list[float]:
        """Adds up the gradients of a step; returns the loss and its parts, summed over all ranks.

        Args:
            num_tokens: the number of tokens that count in the loss, over all micro-batches and ranks.
        """
        world, device, objective = self.world, self.world.device, self.objective
        seed = np.random.SeedSequence([self.config.data.seed, self.step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # a function of the step, so that checkpoints need no generator's state
        hidden_weight = self.config.teacher.hidden_weight_at(self.step, self.total_steps)
        sums = torch.zeros(4, device=device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            self._sums.before(number)
            # Replicas add their gradients once a step, in the backward pass of the last micro-batch, not in each.
            if world.num_replicas > 1 and number in (0, last):
                sum_over_replicas_(objective, now=number == last)
            with autocast(device, self.precision):
                on_device = objective.on_device(batch, device)
                loss = objective(num_tokens=num_tokens, hidden_weight=hidden_weight, **on_device)
            # FSDP averages gradients over ranks. The loss is already divided by the tokens of all ranks, so only a sum
            # is wanted: multiplying by the number of ranks undoes the average.
            (loss.loss * world.size).backward()
            sums += torch.stack(loss).detach().float()  # (4,): loss, ce, kl, hidden; each already divided by num_tokens
        self._sums.finish()
        average_gradients_(objective, self.names, world)
        losses: list[float] = world.sum(sums).tolist()
        return losses

    def _check_counted(self, num_tokens: Tensor) -> None:
        """Raises `InputError` if no token has counted in the loss for many steps."""
        self._num_uncounted = 0 if num_tokens else self._num_uncounted + 1
        if self._num_uncounted >= min(_MAX_UNCOUNTED, self.total_steps - self.first_step):
            error = InputError(
                f"step {self.step + 1}: no token has counted in the loss of {self._num_uncounted} steps: raise "
                "seq_len, look at the data, or set assistant_only_loss to false"
            )
            error.on_all_ranks = True
            raise error

    def _finite(self, losses: Sequence[float], norm: Tensor) -> float:
        """The gradient norm as a number. Raises `DivergedError` unless it and the loss are finite."""
        grad_norm = float(norm)
        if not np.isfinite([losses[0], grad_norm]).all():
            raise self._diverged(f"the loss is {losses[0]} and the gradient norm {grad_norm}", on_all_ranks=True)
        return grad_norm

    def _diverged(self, what: str, on_all_ranks: bool = False) -> DivergedError:
        error = DivergedError(f"step {self.step + 1}: {what}; lower learning_rate or look at the data")
        error.on_all_ranks = on_all_ranks
        return error

    def _stopped_by(self, error: DivergedError) -> DivergedError:
        """The error with the last checkpoint, which is published before."""
        self.saver.finish_despite_error(on_all_ranks=error.on_all_ranks)
        path = newest(self.folder.checkpoints)
        return DivergedError(f"{error}; {f'the last checkpoint is {path}' if path else 'there is no checkpoint yet'}")

    # ------------------------------------------------------------------ evaluations, logs and checkpoints

    @contextlib.contextmanager
    def recording(self, *, announce: bool = True) -> Iterator[None]:
        """Begins the output folder and opens the logs; closes them at the end. Nothing is written before.

        Args:
            announce: print the model, the method, the layers and the options without effect.
        """
        config, world, folder, options = self.config, self.world, self.folder, self.config.checkpoint
        opened: list[Tracker] = []

        def open_folder_and_trackers() -> None:
            with folder.begun(config.as_yaml(), resume=options.resume):
                tracked = TrackedRun(folder.path, folder.run_id, config.as_dict(), self.first_step)
                chosen = "auto" not in options.report_to  # a broken client that nobody asked for stops no run
                opened.extend(open_trackers(self.trackers, tracked, None if chosen else note))

        world.on_main(open_folder_and_trackers, patient=True)
        if options.overwrite:
            check_shared(folder.path, world)  # again: `begun` has replaced the folder
        self.telemetry = Telemetry(
            folder.path,
            self.total_steps,
            is_main=world.is_main,
            start_step=self.first_step,
            trackers=opened,
            hidden=self.method.fixed_figures,
        )
        say = self.telemetry.say
        self.saver = Saver(folder.checkpoints, world, background=options.async_save, say=say)
        if announce:
            for line in self._introduction():
                say(line)
        if self.resumed_from is not None:
            say(f"resuming {self.resumed_from}")
            if self._new_arithmetic:
                say(f"sums run in another order ({', '.join(self._new_arithmetic)}): the last bits may differ")
        elif options.resume:
            say(f"{folder.path} holds no checkpoint yet: starting at step 0")
        with self.telemetry:
            yield

    def perplexity(self, text: ScoredText | None = None) -> float:
        """Perplexity of the current forward pass on a part of the held-out tokens; by default on all of them."""
        rows = self.config.optimizer.per_device_train_batch_size
        text, seq_len = text or self.text.held_out, self.config.data.seq_len
        return float(held_out_loss(self.objective, text, seq_len, rows, self.precision, self.world).exp())

    def evaluate(self) -> None:
        """Measures the perplexity of the current forward pass, and of the model if it were pruned now."""
        started = time.perf_counter()
        values = {"tokens": self.tokens, "perplexity": self.perplexity()}
        masks = local_masks(self.method.masks())
        if masks:
            initial = [local(mask) for mask in self.initial_masks.values()]  # in the order of `masks`
            state = mask_figures(masks, initial, self.method.flips(), self.world)
            values["prune_now_ppl"] = values["perplexity"]
            if state["largest_masked"] != 0 and not self.method.masks_forward:  # otherwise the prune changes nothing
                with pruned(masks, on_host=self.config.optimizer.moments_on_host):
                    values["prune_now_ppl"] = self.perplexity()
                    values |= self._general_figures()
            values |= state
        if "general_ppl" not in values:
            values |= self._general_figures()
        if self.step == 0 and self.dense_perplexity is not None:
            values["dense_ppl"] = self.dense_perplexity
        for name, part in self.text.eval_parts.items():
            values[f"perplexity/{name}"] = self.perplexity(part)
        self.figures[str(self.step)] = values  # text, as the keys of JSON are
        details: dict[str, Any] = {"peak_memory_bytes": peak_memory(self.world.device.type)}  # for metrics.jsonl alone
        if masks:
            histogram = masked_histogram(masks, self.world)
            assert histogram is not None  # there are masks
            details["masked_histogram"] = [histogram.zeros, *histogram.counts]
        if masks and self.step == 0:
            names = [dense_name(name).removesuffix(".weight") for name in self.initial_masks]
            details["masked_share"] = dict(zip(names, masked_shares(masks, self.world)))
        self.telemetry.evaluated(self.step, values, details)
        self._eval_seconds = time.perf_counter() - started

    def _general_figures(self) -> dict[str, float]:
        """The perplexity of the general text, at step 0 and at the end; at step 0 also of the dense model."""
        if self.text.general is None or self.step not in (0, self.total_steps):
            return {}
        figures = {"general_ppl": self.perplexity(self.text.general)}
        if self.step == 0 and self._dense_general is not None:
            figures["general_dense_ppl"] = self._dense_general
        return figures

    def log(self, figures: Mapping[str, float]) -> None:
        """Shows and writes the figures of the step that just ended, with the time that is left."""
        values = dict(figures)
        values["eta_s"] = self.seconds_left()
        peak = self.peak_flops
        if peak is not None:
            values["mfu"] = self.flops_per_token * values["tokens_per_s"] / (peak * self.world.size)
        self.telemetry.log(self.step, values)

    def seconds_left(self) -> float:
        """Seconds to the end of the run; each evaluation and save on the way takes as long as the last one."""
        last = self.total_steps
        evaluations = num_left(self.step, last, self.config.evaluation.steps_between(last)) * self._eval_seconds
        saves = num_left(self.step, last, self.config.checkpoint.save_steps) * self._save_seconds
        return self.seconds / self.step * (last - self.step) + evaluations + saves

    @functools.cached_property
    def peak_flops(self) -> float | None:
        """The peak of the device in FLOP/s; None if it is not known."""
        return peak_flops(self.world.device, self.precision)

    @functools.cached_property
    def flops_per_token(self) -> float:
        """FLOPs of a token in a training step; see `forward_flops`. A backward pass takes twice its forward pass."""
        seq_len, teacher = self.config.data.seq_len, self.objective.teacher
        flops = 3 * forward_flops(self.names.items(), self.model.config, seq_len)
        if teacher is not None:
            parameters = {parameter: name for name, parameter in teacher.named_parameters()}
            flops += forward_flops(parameters.items(), teacher.config, seq_len)
        return flops

    def save(self) -> None:
        """Saves a checkpoint of the present step, after finishing the one before."""
        started = time.perf_counter()
        self.saver.finish()
        self._cover_teacher_cache()  # before the save, so that a resumed run continues no later than the cache ends
        manifest = self._manifest()  # a collective: all ranks, before any of them writes
        self.saver.save(self.step, self.tensors(), manifest)
        self._save_seconds = time.perf_counter() - started

    def _cover_teacher_cache(self) -> None:
        """Records the sequences that the teacher cache now holds."""
        if (cache := self.objective.cache) is not None:
            batch = self.config.optimizer.sequences_per_step(self.world.size)
            whole_epoch = self.text.repeats and self.text.loader.state_dict()["epoch"] > 0
            cache.cover(self.first_step * batch, self.step * batch, every_epoch=whole_epoch)

    # ------------------------------------------------------------------ the state of a checkpoint

    def facts(self) -> dict[str, Any]:
        """The facts, besides the config, in which a resumed run must equal the saved one."""
        facts = {
            "world_batch": self.config.optimizer.sequences_per_step(self.world.size),
            "model_fingerprint": self.dense.fingerprint,
            "dataset_sha256": self.text.train_sha256,
            "eval_sha256": self.text.eval_sha256,
            "precision_used": self.precision,
        }
        if self.text.repeats:
            facts["repeats_sequences"] = True
        if self.teacher_fingerprint:
            facts["teacher_fingerprint"] = self.teacher_fingerprint
        if self.text.template_sha256:
            facts["chat_template_sha256"] = self.text.template_sha256
        return facts

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name, as views: loading fills them in place."""
        tensors = dict(self.method.tensors())
        for param, name in self.names.items():
            if param.requires_grad:
                tensors[f"model.{name}"] = param.detach()
                tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[param].items()}
        return tensors | {f"initial_masks.{name}": mask for name, mask in self.initial_masks.items()}

    def _manifest(self) -> dict[str, Any]:
        """The part of a checkpoint that is no tensor."""
        # a sum over ranks, in fp64: exact up to 2^53 entries
        flips = torch.tensor(float(self.method.flips()), device=self.world.device, dtype=torch.float64)
        return {
            "config": self.config.as_dict(),
            "facts": self.facts(),
            "data": self.text.loader.state_dict(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "figures": self.figures,
            "arithmetic": arithmetic(self.world.device),
            "start": to_json(self.start),
            "flips": int(self.world.sum(flips)) // self.world.num_replicas,  # replicas hold the same masks
        }

    def _restore(self, path: Path) -> None:
        """Continues from a checkpoint. Raises `InputError` if it belongs to another run, or is corrupt."""
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts())
        manifest = load_checkpoint(path, self.tensors(), self.world)
        self.text.loader.load_state_dict(manifest["data"])
        self.start = from_json(Start, manifest["start"], str(path))
        self.step = self.first_step = manifest["step"]
        self.tokens, self.seconds, self.figures = (manifest[key] for key in ("tokens", "seconds", "figures"))
        before, now = manifest.get("arithmetic", {}), arithmetic(self.world.device)
        self._new_arithmetic = [f"{k} {before[k]} -> {now[k]}" for k in now if before.get(k, now[k]) != now[k]]
        first_shard = self.world.shard_index == 0  # the total, on one rank of each replica; 0 on the others
        self.method.set_flips(manifest["flips"] if first_shard else 0)

    # ------------------------------------------------------------------ checks and lines before the first step

    def _note_longer_groups(self) -> None:
        """Notes a pattern that this CPU runs as fast and that loses less, if there is one."""
        pattern = self.config.model.pattern
        if not isinstance(pattern, NM) or self.world.device.type != "cpu" or not self.world.is_main:
            return
        layers, _ = sparse_linears(self.model, pattern, self._filter_fn)
        longest = longest_free_group(pattern.n, pattern.m)
        other = pattern.with_longest_groups({layer.in_features for layer in layers.values()}, longest)
        if other != pattern:
            note(
                f"this CPU runs {other} nearly as fast as {pattern}, and its freer masks lose less quality: "
                f"--pattern {other} (GPUs have hardware for 2:4 alone)"
            )

    def _decay_budget(self) -> DecayBudget | None:
        """The decay budget of the run; None if no weights decay."""
        options = self.config.method
        if not self.method.decays or not DECAYS[options.decay].reduces:
            return None
        masks = local_masks(self.method.masks()).items()
        budget = decay_budget(masks, *self.config.schedule(), options.decay, self.world.sum)
        if not budget.reaches_zero and not options.ignore_decay_budget:
            raise InputError(f"{budget.explain()} (ignore_decay_budget trains anyway)")
        return budget

    def _introduction(self) -> Iterator[str]:
        """The lines that describe the run before its first step."""
        config, method, teacher = self.config, self.method, self.config.teacher
        where = describe(self.world.device, self.world.size, self.precision, self.optimizer_text)
        yield f"{self.dense.loaded.source}: {where}"
        if slow := why_slow(self.precision, self.world.device):
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
        if rounding := self.rounding:
            where = f"{rounding.layers} layers, {rounding.bits_per_weight:.2f} bits a weight"
            yield f"rounding: {rounding.kind} in {where}, with trained scales"
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
        if config.off_recipe:
            yield config.off_recipe
        yield from (f"no effect: {reason}" for reason in config.without_effect(is_plain=self.text.is_plain).values())
        if self.trackers:
            yield f"metrics: metrics.jsonl, {', '.join(self.trackers)}"


def open_teacher_cache(
    options: TeacherOptions, data: DataOptions, text: TrainingText, teacher: OpenedModel, precision: str, world: World
) -> TeacherCache:
    """The folder `teacher_cache` of a run whose teacher is `teacher`.

    Raises `InputError` for a cache of another teacher, or a text with images, which the key of a sequence does not
    contain.
    """
    assert options.teacher_cache is not None
    if text.documents.kind is Kind.WITH_EXTRA:
        raise InputError("teacher_cache identifies a sequence by its tokens, not by images: omit teacher_cache")
    stream = [text.train_sha256, data.seed, data.seq_len, data.column, text.template_sha256]
    settings = {
        "weights": teacher.fingerprint,
        "dtype": str(teacher_dtype(precision)),
        "top_k": options.teacher_top_k,
        "temperature": options.temperature,
        "cross_document_attention": data.cross_document_attention,
    }
    return TeacherCache(options.teacher_cache, stream, settings, world)


def num_left(step: int, last: int, every: int) -> int:
    """The number of multiples of `every` from `step` to `last`; `last` always counts as one. 0 if `every` is 0.

    Examples:
        >>> num_left(1, last=10, every=4)  # at 4, 8 and 10
        3
    """
    return -(-last // every) - (step - 1) // every if every else 0


def local_masks(masks: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """This rank's part of every sparse weight, with its mask."""
    return {local(p.data): local(mask) for p, mask in masks.items()}


def obstacle_on_ranks(config: TrainConfig) -> str | None:
    """The reason why several ranks cannot take this run, or not with this sharding; None if they can."""
    method, adapter, sharding = config.method.method, config.adapter.adapter, config.runtime.sharding
    method_class = class_of(method, adapter)
    if method_class.masks_forward:
        return f"method {method} masks whole weights in the forward pass: run it in one process"
    if method_class.whole_copies and sharding != "replicate":
        return (
            f"sharding {sharding}: adapter {adapter} needs the whole model on each rank: set sharding replicate, or "
            "adapter none"
        )
    if config.optimizer.step_in_backward:
        return "step_in_backward is for one rank: several ranks add up their gradients first; omit it"
    return None
