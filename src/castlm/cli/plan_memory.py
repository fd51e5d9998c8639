"""`castlm plan memory`: the memory of a run on each rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castlm.cli.train import parse_train
from castlm.core.errors import InputError
from castlm.fields import essential
from castlm.oneshot.options import BasisOptions, Refinements, part_of

MOST_SEQUENCES = 128
"""Calibration sequences of a start that names no number; it reads at most as many."""


@dataclass
class MemoryOptions:
    """Predict the memory of each rank of a run, from the model's config alone, without weights. The options are those
    of `castlm train`, so that a run's config.yaml fits; precision auto is planned as bf16. With --prune, predict
    `castlm prune`; its --method is --init-from here.
    """

    world_size: int = essential(1, at_least=1)
    """Ranks that shard the run."""

    gpu: str | None = essential(None)
    """GPU that the run should fit on: h100, a100, ..., or a number of GiB."""

    prune: bool = essential(False)
    """Predict `castlm prune` on a CPU instead of a training run."""

    memory: Literal["model", "block"] = essential("block")
    """With --prune: keep the whole model in memory, or one transformer block. Structured patterns need the whole model.
    """


def main(arguments: list[str]) -> int:
    config, more = parse_train(arguments, "plan memory", MemoryOptions, {"dataset": "none", "output_dir": "none"})
    options = MemoryOptions(**more)
    from castlm.dtypes import FLOATS
    from castlm.planning.memory import Settings, plan_memory
    from castlm.planning.prune_memory import plan_prune_memory

    model, pattern, start, teacher = config.model.model, config.model.pattern, config.start, config.teacher
    if start.name not in pattern.solvers and not Path(start.name).expanduser().is_dir():
        known = ", ".join(pattern.solvers)
        raise InputError(f"init_from {start.name} is neither {known} nor the folder of a model of {pattern}")
    num_sequences, seq_len = start.calibration_sequences or MOST_SEQUENCES, config.data.seq_len
    if options.prune:
        plan_of_prune = plan_prune_memory(
            model,
            memory=options.memory if pattern.cut_out is None else "model",
            method=start.name,
            pattern=pattern,
            num_sequences=num_sequences,
            seq_len=seq_len,
            basis=part_of(start, BasisOptions),
            refinements=part_of(start, Refinements).for_solver(start.name, pattern, start.start_effort),
        )
        print(plan_of_prune.table())
        return 0
    dtype = FLOATS["fp32" if config.runtime.precision == "fp32" else "bf16"]
    reads_text = start.name in pattern.calibrated
    run = Settings(
        seq_len=seq_len,
        micro_batch=config.optimizer.per_device_train_batch_size,
        pattern=pattern,
        scale_groups=config.method.scale_groups,
        accumulates=config.optimizer.gradient_accumulation_steps > 1,
        checkpointing=config.runtime.gradient_checkpointing,
        compute=dtype,
        teacher=dtype if teacher.eta > 0 else None,
        hidden_states=bool(teacher.hidden_weight),
        moments=config.optimizer.moments,
        calibration_tokens=num_sequences * seq_len if reads_text else 0,
    )
    gib = None if options.gpu is None else _gib(options.gpu)
    plan = plan_memory(model, run, teacher=teacher.teacher, world_size=options.world_size, gpu_gib=gib)
    print(plan.table())
    return 0 if plan.fits in (True, None) else 1


def _gib(card: str) -> float:
    """The memory of a card, by its name or as a number of GiB."""
    from castlm.inference.devices import DEVICES

    known = {name: device.memory_gib for name, device in DEVICES.items() if device.memory_gib is not None}
    try:
        gib = known[card] if card in known else float(card)
    except ValueError:
        gib = math.nan
    if not 0 < gib < math.inf:
        raise InputError(f"there is no card {card!r}: use one of {', '.join(known)}, or a number of GiB")
    return gib
