"""One optimizer step of a run: batches in, an update out. It reads and writes no files."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from castlm.core.errors import DivergedError, InputError
from castlm.data.tokens import check_vocabulary
from castlm.distributed.gradients import SumsInOrder, clip_, gradient_norm
from castlm.distributed.mask_check import SelfCheck
from castlm.distributed.sharding import average_gradients_, sum_over_replicas_
from castlm.hardware import autocast
from castlm.models.architecture import vocab_size
from castlm.training.in_backward import StepInBackward
from castlm.training.run import Run

_MOST_UNCOUNTED = 100
"""A run ends after this many consecutive steps in which no token counts."""


class Stepper:
    """Takes the steps of a run, one at a time; all ranks call it together."""

    def __init__(self, run: Run) -> None:
        self.run = run
        watched = run.method.layers if run.method.decays else {}
        self._self_check = SelfCheck(run.optimizer, watched, run.config.model.pattern, run.world)
        self._sums = SumsInOrder(run.objective, run.names, run.world)
        self._in_backward = None
        if run.config.optimizer.step_in_backward:
            self._in_backward = StepInBackward(run.method, run.names, run.config.optimizer.max_grad_norm)
        self._uncounted = 0
        """Consecutive steps in which no token counted."""

    def step(self) -> dict[str, float]:
        """Takes the next step and counts it in `run.progress`; returns its figures, for the logs.

        Raises:
            DivergedError: a loss or gradient is not finite, or a weight is NaN.
            InputError: a token outside the vocabulary; or no token has counted for many steps.
        """
        run, config, step, started = self.run, self.run.config, self.run.progress.step, time.perf_counter()
        optimizer, world = config.optimizer, run.world
        lr = optimizer.learning_rate_at(step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = [next(run.text.loader) for _ in range(optimizer.gradient_accumulation_steps)]
        check_vocabulary(torch.stack([b["input_ids"] for b in micro_batches]), vocab_size(run.model.config))
        # tokens read, and tokens that count, of each micro-batch
        counts = [[b["labels"].numel(), int((b["labels"] != -100).sum())] for b in micro_batches]
        # Tokens that count differ between micro-batches and ranks, so the loss is normalised by their number in the
        # whole global batch: a mean of means would weigh the tokens of a short micro-batch more.
        read, num_tokens = world.sum(torch.tensor(counts).sum(dim=0).to(world.device))  # (micro-batches, 2) -> (2,)
        self._uncounted = 0 if num_tokens else self._uncounted + 1
        if self._uncounted >= min(_MOST_UNCOUNTED, run.total_steps - run.progress.first_step):
            error = InputError(
                f"step {step + 1}: no token has counted in the loss of {self._uncounted} steps: raise seq_len, look at "
                "the data, or set assistant_only_loss to false"
            )
            error.on_all_ranks = True
            raise error
        try:
            run.method.before_forward(step)
        except InputError as error:  # NaN has no rank among the weights of a group
            raise self._diverged(str(error)) from error
        objective = run.objective
        objective.hidden_weight = config.teacher.hidden_weight_at(step, run.total_steps)
        objective.train()
        if objective.teacher is not None:
            objective.teacher.eval()
        take = self._step_after_backward if self._in_backward is None else self._step_in_backward
        (total, ce, kl, hidden), grad_norm = take(micro_batches, num_tokens)

        values = {"loss": total, "ce": ce, "kl": kl, "lr": lr, "grad_norm": grad_norm}
        if config.teacher.hidden_weight:
            values["hidden"] = hidden
        if run.method.decays:
            values["alpha"] = config.method.alpha(step, run.total_steps)
        if run.text.is_masked:
            values["loss_tokens"] = int(num_tokens)
        seconds, progress = time.perf_counter() - started, run.progress
        progress.step += 1
        progress.tokens += int(read)
        progress.seconds += seconds
        return values | {"tokens": progress.tokens, "tokens_per_s": int(read) / seconds}

    def _step_after_backward(
        self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor
    ) -> tuple[list[float], float]:
        """Takes a step when all gradients are there; returns the loss with its parts, and the norm."""
        run, step, max_norm = self.run, self.run.progress.step, self.run.config.optimizer.max_grad_norm
        losses = self._accumulate(micro_batches, num_tokens)
        # The norm is taken of the gradients of the whole global batch, before the method changes them.
        norm = gradient_norm(run.names)
        if max_norm:
            clip_(run.names, max_norm, norm)
        grad_norm = self._finite(losses, norm)
        # After the clipping, so that SR-STE's decay is not clipped with the gradient of the loss.
        run.method.before_update(step, run.names)
        with self._self_check.around_step(step, run.method.mask_interval):  # AdamS refreshes its masks in `step`
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)  # frees the gradients, as large as the weights, before the evaluation
        return losses, grad_norm

    def _step_in_backward(
        self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor
    ) -> tuple[list[float], float]:
        """Takes a step in the backward pass, see `StepInBackward`; returns the loss with its parts, and the norm."""
        run, step, parts = self.run, self.run.progress.step, self._in_backward
        assert parts is not None
        norm = None
        if parts.clips:  # a pass of its own, whose gradients are only measured
            with parts.measuring():
                losses = self._accumulate(micro_batches, num_tokens)
            self._finite(losses, norm := parts.norm())
        with self._self_check.around_step(step, run.method.mask_interval):
            run.optimizer.begin_step()
            with parts.stepping(step, norm):
                losses = self._accumulate(micro_batches, num_tokens)
        return losses, self._finite(losses, parts.norm())

    def _finite(self, losses: Sequence[float], norm: Tensor) -> float:
        """The gradient norm as a number. Raises `DivergedError` unless it and the loss are finite."""
        grad_norm = float(norm)
        if not np.isfinite([losses[0], grad_norm]).all():
            raise self._diverged(f"the loss is {losses[0]} and the gradient norm {grad_norm}", on_all_ranks=True)
        return grad_norm

    def _accumulate(self, micro_batches: Sequence[dict[str, Tensor]], num_tokens: Tensor) -> list[float]:
        """Adds up the gradients of a step; returns the loss and its parts, summed over all ranks.

        Args:
            num_tokens: the number of tokens that count in the loss, over all micro-batches and ranks.
        """
        run, world = self.run, self.run.world
        objective, device, step = run.objective, world.device, run.progress.step
        seed = np.random.SeedSequence([run.config.data.seed, step, world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # a function of the step, so that checkpoints need no generator's state
        sums = torch.zeros(4, device=device)
        last = len(micro_batches) - 1
        for number, batch in enumerate(micro_batches):
            self._sums.before(number)
            # Replicas add their gradients once a step, in the backward pass of the last micro-batch, not in each.
            if world.num_replicas > 1 and number in (0, last):
                sum_over_replicas_(objective, now=number == last)
            with autocast(device, run.evaluator.precision):
                loss = objective(num_tokens=num_tokens, **objective.on_device(batch, device))
            # FSDP averages gradients over ranks. The loss is already divided by the tokens of all ranks, so only a sum
            # is wanted: multiplying by the number of ranks undoes the average.
            (loss.loss * world.size).backward()
            sums += torch.stack(loss).detach().float()  # (4,): loss, ce, kl, hidden; each already divided by num_tokens
        self._sums.finish()
        average_gradients_(objective, run.names, world)
        losses: list[float] = world.sum(sums).tolist()
        return losses

    def _diverged(self, what: str, on_all_ranks: bool = False) -> DivergedError:
        step = self.run.progress.step + 1
        error = DivergedError(f"step {step}: {what}; lower learning_rate or look at the data")
        error.on_all_ranks = on_all_ranks
        return error
