"""A few real steps of a run, thrown away: how large the momentum is, hence `lam`; how far each layer's weights have to
travel; how fast the machine is. What `castlm plan check` reports and what `lam: auto` uses.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from castlm.core.budget import DecayBudget, decay_budget
from castlm.core.decay import DECAYS
from castlm.core.shards import local
from castlm.core.sparsify import weight_parameter
from castlm.distributed.mask_check import masked_samples
from castlm.distributed.world import World
from castlm.hardware import collect_garbage, peak_memory
from castlm.training.checkpoint import checkpoint_steps, read_manifest
from castlm.training.config import TrainConfig
from castlm.training.run import Run
from castlm.training.run_folder import RunFolder
from castlm.training.schedule import schedule
from castlm.training.start import start_seconds

STEPS = 20
PLACEHOLDER_LAM = 4e-7  # of the calibration steps themselves, in which the ramp has hardly begun


@dataclass(frozen=True)
class LayerCalibration:
    """One sparse layer: the rms of its bias-corrected momentum, and its own decay budget."""

    momentum_rms: float
    budget: DecayBudget

    @property
    def headroom(self) -> float:
        """Decay budget over the distance that 99 % of the masked weights have to go; above 1 they arrive."""
        return self.budget.travel / max(self.budget.quantiles[2], 1e-30)


@dataclass(frozen=True)
class Calibration:
    """What `steps` steps showed. `lam` is the median momentum rms over the layers: "the order of the gradient"."""

    layers: dict[str, LayerCalibration]
    lam: float
    tokens_per_s: float
    tokens_per_step: int
    peak_bytes: int
    steps: int
    start_seconds: float = 0.0
    """Before step 0, to make the start."""


def calibrate(config: TrainConfig, world: World, steps: int = STEPS) -> Calibration:
    """Runs the first `steps` steps of `config` in a scratch folder and measures them.

    Nothing of it is kept, but for what it adds to the `teacher_cache` of `config`, which the run reads.

    Raises:
        InputError: whatever the run itself would raise, and a method or decay that has no masked weights to judge.
    """
    with tempfile.TemporaryDirectory(prefix="castlm-calibrate-") as scratch:
        scratch_config = dataclasses.replace(
            config,
            output_dir=str(Path(scratch) / "run"),
            lam=PLACEHOLDER_LAM if config.lam == "auto" else config.lam,
            ignore_decay_budget=True,
            report_to=("none",),
            push_to_hub=False,
            resume=False,
            overwrite=False,
        )
        run = Run(scratch_config, world, announce=False)
        budgets = _budgets(run)
        seconds, tokens = [], 0
        with run.telemetry:
            for _ in range(min(steps, config.max_steps)):
                before, before_tokens = run.progress.seconds, run.progress.tokens
                run.train_step()
                seconds.append(run.progress.seconds - before)
                tokens = run.progress.tokens - before_tokens
        rms = _momentum_rms(run)
        before = start_seconds(run.parts.start)
    peak = peak_memory(world.device.type)
    del run
    collect_garbage(world.device.type)
    layers = {name: LayerCalibration(rms[name], budgets[name]) for name in budgets}
    per_step = statistics.median(seconds[1:] or seconds)  # the first compiles
    lam = statistics.median(rms.values())
    return Calibration(layers, lam, tokens / per_step, tokens, peak, len(seconds), before)


def resolve_lam(config: TrainConfig, world: World) -> TrainConfig:
    """`config`, whose `lam` is "auto", with a number for it: the checkpoint's it resumes from, else calibrated."""

    def saved() -> float | None:
        whole = checkpoint_steps(RunFolder(config.output_dir).checkpoints) if config.resume else {}
        if not whole:
            return None
        lam = read_manifest(whole[max(whole)])["config"].get("lam")
        return float(lam) if isinstance(lam, (int, float)) else 0.0

    if (lam := world.on_main(saved)) is not None:
        return dataclasses.replace(config, lam=lam)
    if config.method != "cast" or not DECAYS[config.decay].needs_lam:
        return dataclasses.replace(config, lam=0.0)  # nothing there reads it
    return dataclasses.replace(config, lam=calibrate(config, world).lam)


def _budgets(run: Run) -> dict[str, DecayBudget]:
    config = run.config
    lrs, alphas = schedule(config)
    masks = run.method.masks()
    weights = {name: weight_parameter(layer) for name, layer in run.method.layers.items()}
    samples = {
        name: masked_samples({local(weight.data): local(masks[weight])}, run.world) for name, weight in weights.items()
    }
    return {name: decay_budget(sample, lrs, alphas, config.decay) for name, sample in samples.items()}


def _momentum_rms(run: Run) -> dict[str, float]:
    """Of each layer over the rows of all ranks."""
    correction = 1 - run.config.adam_betas[0] ** run.progress.step
    momenta = [run.optimizer.momentum(weight_parameter(layer)) for layer in run.method.layers.values()]
    sums = [[float(momentum.square().sum()), momentum.numel()] for momentum in momenta]
    squares, counts = run.world.sum(torch.tensor(sums, dtype=torch.float64, device=run.world.device)).unbind(1)
    return dict(zip(run.method.layers, ((squares / counts).sqrt() / correction).tolist()))
