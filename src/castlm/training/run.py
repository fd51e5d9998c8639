"""A run in progress: one optimizer step, an evaluation, a checkpoint. `castlm.training.loop` puts them in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from castlm.core.adams import AdamS
from castlm.core.decay import decay_alpha
from castlm.core.errors import DivergedError, InputError
from castlm.core.pattern import Pattern
from castlm.core.shards import local
from castlm.core.sparsify import dense_name
from castlm.data.tokens import check_vocabulary
from castlm.distributed.mask_check import SelfCheck
from castlm.distributed.sharding import average_gradients_, sum_over_replicas_
from castlm.distributed.world import World
from castlm.hardware import autocast, peak_memory
from castlm.methods.base import Retraining
from castlm.models.architecture import vocab_size
from castlm.training.checkpoint import Saver, check_same_run, checkpoint_steps, load_checkpoint, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.finish import TrainedRun
from castlm.training.flops import flops_per_token, peak_flops
from castlm.training.metrics import mask_figures, masked_histogram, masked_shares
from castlm.training.objective import pruned
from castlm.training.run_folder import RunFolder
from castlm.training.run_progress import Progress
from castlm.training.schedule import hidden_weight, learning_rate
from castlm.training.setup import global_batch, introduction, local_masks, set_up
from castlm.training.telemetry import Telemetry
from castlm.training.trackers import TrackedRun, Tracker, chosen_trackers, open_trackers

_MOST_UNCOUNTED = 100
"""Steps in a row in which no token counts, after which a run ends."""


class Run:
    """A run: its parts, its progress, and what it writes.

    The parts are made first, with all their checks; only then does anything in the output folder change.

    Args:
        config: `lam` is a number by now.
        announce: say what the run consists of.
        before_writing: called when all checks have passed, before anything in the output folder changes.

    Raises:
        InputError: anything that the user can put right; the output folder is as it was.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        *,
        announce: bool = True,
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder(config.output_dir)
        trackers = world.on_main(lambda: chosen_trackers(config.report_to))
        resume_from = world.on_main(lambda: self.folder.newest_checkpoint(config)) if config.resume else None
        resumed = None if resume_from is None else world.on_main(lambda: read_manifest(resume_from)["start"])
        self.parts = set_up(config, world, resumed=resumed)
        self.progress = Progress()
        if resume_from is not None:
            self._restore(resume_from)
        before_writing()
        self.progress.first_step = self.progress.step
        self._uncounted = 0  # steps in a row
        watched = self.method.layers if self.method.decays else {}
        pattern = Pattern.parse(config.pattern)
        self.self_check = SelfCheck(self.optimizer, watched, pattern, world)
        opened: list[Tracker] = []

        def open_folder_and_trackers() -> None:
            with contextlib.nullcontext() if resume_from is not None else self.folder.begun(config):
                tracked = TrackedRun(self.folder.path, self.folder.run_id, config.as_dict(), self.progress.step)
                opened.extend(open_trackers(trackers, tracked))

        world.on_main(open_folder_and_trackers, beats=True)
        self.telemetry = Telemetry(
            self.folder.path,
            config.max_steps,
            is_main=world.is_main,
            start_step=self.progress.step,
            trackers=opened,
            hidden=self.method.fixed_figures,
        )
        has_teacher = self.parts.objective.teacher is not None
        self.flops_per_token = flops_per_token(self.parts.names, self.model.config, config.seq_len, has_teacher)
        self.peak_flops = peak_flops(world.device, self.parts.evaluator.precision)
        keep, say = config.save_total_limit, self.telemetry.say
        self.saver = Saver(self.folder.checkpoints, keep, world, background=config.async_save, say=say)
        for line in introduction(config, self.parts, world) if announce else ():
            self.telemetry.say(line)
        if trackers and announce:
            self.telemetry.say(f"metrics: metrics.jsonl, {', '.join(trackers)}")
        if resume_from is not None:
            self.telemetry.say(f"resuming {resume_from}")

    @property
    def model(self) -> PreTrainedModel:
        return self.parts.source.model

    @property
    def method(self) -> Retraining:
        return self.parts.method

    @property
    def optimizer(self) -> AdamS:
        return self.parts.optimizer

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run has to share with the saved one besides its config."""
        return {
            "world_batch": global_batch(self.config, self.world),
            "model_fingerprint": self.parts.source.fingerprint,
            "dataset_sha256": self.parts.text.train_sha256,
            "eval_sha256": self.parts.text.eval_sha256,
            "precision_used": self.parts.evaluator.precision,
            **({"chat_template_sha256": template} if (template := self.parts.text.template_sha256) else {}),
        }

    def train_step(self) -> None:
        """One optimizer step, with its log line.

        Raises:
            DivergedError: a loss or gradient is not finite, or a weight is NaN.
            InputError: a token outside the vocabulary; or no token has counted for long.
        """
        config, step, started = self.config, self.progress.step, time.perf_counter()
        seed = np.random.SeedSequence([config.seed, step, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # of the step, so that no generator's state has to be saved
        lr = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(self.parts.text.loader) for _ in range(config.gradient_accumulation_steps)]
        check_vocabulary(torch.stack([b["input_ids"] for b in micro_batches]), vocab_size(self.model.config))
        counts = [[b["labels"].numel(), int((b["labels"] != -100).sum())] for b in micro_batches]
        read, num_tokens = self.world.sum(torch.tensor(counts).sum(dim=0).to(self.world.device))
        total, ce, kl, hidden = self.world.sum(self._accumulate(micro_batches, num_tokens)).tolist()
        self._check_counted(int(num_tokens))
        grad_norm = self._clip()
        if not np.isfinite([total, grad_norm]).all():
            what = f"the loss is {total} and the gradient norm {grad_norm}"
            raise DivergedError(self._diverged(what, on_all_ranks=True))
        self.method.before_update(step)
        with self.self_check.around_step(step, self.method.mask_interval):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        values = {"loss": total, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}
        if config.hidden_loss_weight:
            values["hidden"] = hidden
        if self.method.decays:
            values["alpha"] = decay_alpha(step, config.max_steps, config.decay, config.decay_end_used)
        if self.parts.text.documents.is_chat:
            values["loss_tokens"] = int(num_tokens)
        self._log_step(values, num_read=int(read), seconds=time.perf_counter() - started)

    def _accumulate(self, micro_batches: Sequence[dict[str, Any]], num_tokens: Tensor) -> Tensor:
        """Adds up the gradients of a step; returns this rank's sums of the loss and its parts, float32, (4,).

        Args:
            num_tokens: that count in the loss, on all ranks.
        """
        objective, device = self.parts.objective, self.world.device
        try:
            self.method.before_forward(self.progress.step)
        except InputError as error:  # NaN has no rank among the weights of a group
            raise DivergedError(self._diverged(str(error))) from error
        objective.hidden_weight = hidden_weight(self.progress.step, self.config)
        objective.train()
        if objective.teacher is not None:
            objective.teacher.eval()
        sums = torch.zeros(4, device=device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            if self.world.num_replicas > 1 and number in (0, last):
                sum_over_replicas_(objective, now=number == last)
            with autocast(device, self.parts.evaluator.precision):
                ids, labels, positions = (batch[name].to(device) for name in ("input_ids", "labels", "position_ids"))
                images = {name: tensor.to(device) for name, tensor in batch.get("images", {}).items()}
                loss = objective(ids, labels, num_tokens, positions, images=images)
            (loss.loss * self.world.size).backward()  # averaged over ranks; the loss is normalised already
            sums += torch.stack(loss).detach().float()
        average_gradients_(objective, self.parts.names, self.world)
        return sums

    def _log_step(self, values: dict[str, float], num_read: int, seconds: float) -> None:
        """Counts a step that is done, and logs it with its speed."""
        progress = self.progress
        progress.step += 1
        progress.tokens += num_read
        progress.seconds += seconds
        values |= {
            "tokens": progress.tokens,
            "tokens_per_s": num_read / seconds,
            "eta_s": progress.seconds_left(self.config),
        }
        if self.peak_flops is not None:
            values["mfu"] = self.flops_per_token * num_read / seconds / (self.peak_flops * self.world.size)
        self.telemetry.log(progress.step, values, write=progress.step % self.config.log_steps == 0)

    def _check_counted(self, num_tokens: int) -> None:
        """Raises `InputError` after many steps in a row, or a whole run, in which no token counted."""
        self._uncounted = 0 if num_tokens else self._uncounted + 1
        if self._uncounted >= min(_MOST_UNCOUNTED, self.config.max_steps - self.progress.first_step):
            self.saver.finish_despite_error(on_all_ranks=True)
            raise InputError(
                f"step {self.progress.step + 1}: no token has counted in the loss of {self._uncounted} steps: raise "
                "seq_len, look at the data, or set assistant_only_loss to false"
            )

    def _clip(self) -> float:
        gradients = [p.grad for p in self.parts.names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parts.names, self.config.max_grad_norm, norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _diverged(self, what: str, on_all_ranks: bool = False) -> str:
        self.saver.finish_despite_error(on_all_ranks=on_all_ranks)
        whole = checkpoint_steps(self.folder.checkpoints)
        last = f"the last checkpoint is {whole[max(whole)]}" if whole else "there is no checkpoint yet"
        return f"step {self.progress.step + 1}: {what}; {last}; lower learning_rate or look at the data"

    def evaluate(self) -> None:
        """Perplexity of the forward pass as it is, and of the model as the prune would leave it now."""
        started = time.perf_counter()
        values = {"tokens": self.progress.tokens, "perplexity": self.parts.evaluator.perplexity()}
        masks = local_masks(self.method.masks())
        if masks:
            initial = [local(mask) for mask in self.parts.initial_masks.values()]  # in the order of `masks`
            state = mask_figures(masks, initial, self.method.flips(), self.world)
            values["prune_now_ppl"] = values["perplexity"]
            if state["largest_masked"] != 0 and not self.method.masks_forward:  # otherwise the prune changes nothing
                with pruned(masks):
                    values["prune_now_ppl"] = self.parts.evaluator.perplexity()
            values |= state
        if self.progress.step == 0 and self.parts.dense_perplexity is not None:
            values["dense_ppl"] = self.parts.dense_perplexity
        for name, part in self.parts.text.eval_parts.items():
            values[f"perplexity/{name}"] = self.parts.evaluator.perplexity(part)
        self.progress.figures[str(self.progress.step)] = values
        self.telemetry.evaluated(self.progress.step, values, self._details(masks))
        self.progress.eval_seconds = time.perf_counter() - started

    def _details(self, masks: dict[Tensor, Tensor]) -> dict[str, Any]:
        """What metrics.jsonl holds of an evaluation beside single figures."""
        histogram = masked_histogram(masks, self.world)
        details: dict[str, Any] = {"peak_memory_bytes": peak_memory(self.world.device.type)}
        if masks:
            details["masked_histogram"] = [histogram["zeros"], *histogram["counts"]]
        if self.progress.step == 0 and masks:
            names = [dense_name(name).removesuffix(".weight") for name in self.parts.initial_masks]
            details["masked_share"] = dict(zip(names, masked_shares(masks, self.world)))
        return details

    def tensors(self) -> dict[str, Any]:
        """All tensors of a checkpoint, by name, as views: loading fills them in place."""
        trained = {name: param for param, name in self.parts.names.items() if param.requires_grad}
        state = {name: self.optimizer.state[param] for name, param in trained.items()}
        weights = {name: param.detach() for name, param in trained.items()}
        basis = self.parts.objective.stream_basis
        return {
            "model": weights,
            "optimizer": state,
            "method": self.method.tensors(),
            "initial_masks": self.parts.initial_masks,
            **({} if basis is None else {"start": {"stream_basis": basis}}),
        }

    def save(self) -> None:
        started = time.perf_counter()
        self.saver.finish()
        self.cover_teacher_cache()  # before the save, so that a resumed run goes on no later than the cache ends
        flips = torch.tensor(float(self.method.flips()), device=self.world.device, dtype=torch.float64)
        manifest = {
            "config": self.config.as_dict(),
            "facts": self.facts,
            "data": self.parts.text.loader.state_dict(),
            "tokens": self.progress.tokens,
            "seconds": self.progress.seconds,
            "figures": self.progress.figures,
            "start": self.parts.start,
            "flips": int(self.world.sum(flips)) // self.world.num_replicas,
        }
        self.saver.save(self.progress.step, self.tensors(), manifest)
        self.progress.save_seconds = time.perf_counter() - started

    def cover_teacher_cache(self) -> None:
        """Records which sequences the teacher cache holds by now."""
        if self.parts.objective.cache is not None:
            batch = global_batch(self.config, self.world)
            whole_epoch = self.config.repeat_sequences and self.parts.text.loader.state_dict()["epoch"] > 0
            first, last = self.progress.first_step * batch, self.progress.step * batch
            self.parts.objective.cache.cover(first, last, every_epoch=whole_epoch)

    def result(self) -> TrainedRun:
        """What `finish` needs to know of the run."""
        progress = self.progress
        return TrainedRun(
            self.config,
            self.world,
            self.folder,
            self.parts,
            progress.figures,
            progress.tokens,
            progress.seconds,
            self.telemetry.say,
        )

    def _restore(self, path: Path) -> None:
        check_same_run(read_manifest(path), self.config.as_dict(), self.facts)
        manifest = load_checkpoint(path, self.tensors(), self.world)
        try:
            self.parts.text.loader.load_state_dict(manifest["data"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"{path} has no usable position in the data ({error}): remove it") from error
        self.progress = Progress(manifest["step"], manifest["tokens"], manifest["seconds"], manifest["figures"])
        first_shard = self.world.shard_index == 0  # one rank of each replica says what all of them changed
        self.method.restore_flips(manifest["flips"] if first_shard else 0)
