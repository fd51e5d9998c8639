"""Measures the first steps of a run, for `castlm plan check` and `lam: auto`; the trained weights are thrown away.

The momentum gives `lam`; the masked weights give the distance that they must travel, by layer; the clock gives the
speed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from castlm.core.decay import DecayBudget, decay_budget
from castlm.core.shards import local
from castlm.core.sparsify import weight_parameter
from castlm.hardware import peak_memory
from castlm.methods.options import schedule
from castlm.training.recorder import Recorder
from castlm.training.run import Run
from castlm.training.stepper import Stepper

STEPS = 20
PLACEHOLDER_LAM = 4e-7  # for the measured steps, in which lam has hardly an effect: the ramp is near 0


@dataclass(frozen=True)
class LayerFigures:
    """One sparse layer: the rms of its bias-corrected momentum, and its own decay budget."""

    momentum_rms: float
    budget: DecayBudget

    @property
    def headroom(self) -> float:
        """The decay budget divided by the 99 % quantile of the masked weights; above 1, these reach zero."""
        return self.budget.travel / max(self.budget.quantiles[2], 1e-30)


@dataclass(frozen=True)
class FirstSteps:
    """The figures of the first steps. `lam` is the median momentum rms over the layers: "the order of the gradient"."""

    layers: dict[str, LayerFigures]
    lam: float
    tokens_per_s: float
    tokens_per_step: int
    peak_bytes: int
    steps: int
    start_seconds: float = 0.0
    """Time before step 0, for the start."""


def measure(run: Run, recorder: Recorder, steps: int) -> FirstSteps:
    """Takes the first `steps` steps of a run, and measures them."""
    options, method, world = run.config.method, run.method, run.world
    lrs, alphas = schedule(run.config.optimizer, options)
    masks, budgets = method.masks(), {}
    for name, layer in method.layers.items():
        weight = weight_parameter(layer)
        own_rows = [(local(weight.data), local(masks[weight]))]
        budgets[name] = decay_budget(own_rows, lrs, alphas, options.decay, world.sum)
    stepper, seconds, tokens = Stepper(run), [], 0
    for _ in range(min(steps, run.total_steps)):
        before, before_tokens = run.progress.seconds, run.progress.tokens
        recorder.log(stepper.step())
        seconds.append(run.progress.seconds - before)
        tokens = run.progress.tokens - before_tokens
    momenta = [run.optimizer.momentum(weight_parameter(layer)) for layer in method.layers.values()]
    # A rank holds some rows of each layer: squares and counts are added up, and the root is taken of the quotient.
    sums = [[float(momentum.square().sum()), momentum.numel()] for momentum in momenta]
    squares, counts = world.sum(torch.tensor(sums, dtype=torch.float64, device=world.device)).unbind(1)
    # mu_t / (1 - b1^t): Adam's moment starts at zero, and is too small in the first steps
    correction = 1 - run.config.optimizer.adam_betas[0] ** run.progress.step
    rms = dict(zip(method.layers, ((squares / counts).sqrt() / correction).tolist()))
    per_step = statistics.median(seconds[1:] or seconds)  # the first compiles
    return FirstSteps(
        {name: LayerFigures(rms[name], budgets[name]) for name in budgets},
        lam=statistics.median(rms.values()),
        tokens_per_s=tokens / per_step,
        tokens_per_step=tokens,
        peak_bytes=peak_memory(world.device.type),
        steps=len(seconds),
        start_seconds=run.start.seconds or 0.0,
    )
