"""Measures the first steps of a run, for `castlm plan check` and `lam: auto`; the trained weights are thrown away.

The momentum gives `lam`; the masked weights give the distance that they must travel, by layer; the clock gives the
speed.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from castlm.core.decay import DecayBudget, decay_budget
from castlm.core.shards import local
from castlm.core.sparsify import weight_parameter
from castlm.hardware import collect_garbage, peak_memory
from castlm.training.config import TrainConfig
from castlm.training.trainer import Trainer
from castlm.world import World

STEPS = 20
PLACEHOLDER_LAM = 4e-7  # for the measured steps, in which lam has hardly an effect: the ramp is near 0


@dataclass(frozen=True)
class FirstSteps:
    """The figures of the first steps. `lam` is the median momentum rms over the layers: "the order of the gradient"."""

    momentum_rms: dict[str, float]
    """The rms of the bias-corrected momentum of each sparse layer."""
    budgets: dict[str, DecayBudget]
    """The decay budget of each sparse layer."""
    lam: float
    tokens_per_s: float
    tokens_per_step: int
    peak_bytes: int
    steps: int
    start_seconds: float = 0.0
    """Time before step 0, for the start."""


def measure_first_steps(config: TrainConfig, world: World, steps: int = STEPS) -> FirstSteps:
    """Takes the first `steps` steps of `config` in a temporary folder, and measures them.

    What remains are the sequences that it adds to the `teacher_cache` of `config`, and the finished blocks of a start
    beside its output folder, from which the run itself takes its start.
    """
    with tempfile.TemporaryDirectory(prefix="castlm-first-steps-") as scratch:
        scratch_config = config.changed(
            output_dir=Path(scratch) / "run",
            lam=PLACEHOLDER_LAM if config.method.lam == "auto" else config.method.lam,
            ignore_decay_budget=True,
            report_to=("none",),
            push_to_hub=False,
            resume=False,
            overwrite=False,
        )
        trainer = Trainer(scratch_config, world, start_beside=config.checkpoint)
        with trainer.recording(announce=False):
            figures = _measure(trainer, steps)
        del trainer
        collect_garbage(world.device.type)
    return figures


def _measure(trainer: Trainer, steps: int) -> FirstSteps:
    options, method, world = trainer.config.method, trainer.method, trainer.world
    lrs, alphas = trainer.config.schedule()
    masks, budgets = method.masks(), {}
    for name, layer in method.layers.items():
        weight = weight_parameter(layer)
        own_rows = [(local(weight.data), local(masks[weight]))]
        budgets[name] = decay_budget(own_rows, lrs, alphas, options.decay, world.sum)
    seconds, tokens = [], 0
    for _ in range(min(steps, trainer.total_steps)):
        seconds_before, tokens_before = trainer.seconds, trainer.tokens
        trainer.log(trainer.train_step())
        seconds.append(trainer.seconds - seconds_before)
        tokens = trainer.tokens - tokens_before
    momenta = [trainer.optimizer.momentum(weight_parameter(layer)) for layer in method.layers.values()]
    # A rank holds some rows of each layer: squares and counts are added up, and the root is taken of the quotient.
    sums = [[float(momentum.square().sum()), momentum.numel()] for momentum in momenta]
    squares, counts = world.sum(torch.tensor(sums, dtype=torch.float64, device=world.device)).unbind(1)
    # mu_t / (1 - b1^t): Adam's moment starts at zero, and is too small in the first steps
    correction = 1 - trainer.config.optimizer.adam_betas[0] ** trainer.step
    rms = dict(zip(method.layers, ((squares / counts).sqrt() / correction).tolist()))
    per_step = statistics.median(seconds[1:] or seconds)  # the first compiles
    return FirstSteps(
        rms,
        budgets,
        lam=statistics.median(rms.values()),
        tokens_per_s=tokens / per_step,
        tokens_per_step=tokens,
        peak_bytes=peak_memory(world.device.type),
        steps=len(seconds),
        start_seconds=trainer.start.seconds or 0.0,
    )
