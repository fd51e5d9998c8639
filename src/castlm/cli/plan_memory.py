"""`castlm plan memory`: the memory of a run on each rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from castlm.cli.options import refuse_given
from castlm.core.errors import InputError
from castlm.core.nm import Pattern
from castlm.fields import essential, like
from castlm.methods.options import MethodOptions, OptimizerOptions
from castlm.oneshot.options import BasisOptions, Refinements, part_of
from castlm.training.options import DataOptions, ModelOptions, RuntimeOptions, TeacherOptions

_OF_TRAINING = ("gpu", "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "scale_groups")
_OF_TRAINING += ("gradient_checkpointing", "precision", "moments", "eta", "teacher", "hidden_weight")
"""Options without effect on `castlm prune`."""
_OF_PRUNE = ("memory", *(option.name for section in (BasisOptions, Refinements) for option in fields(section)))
"""Options without effect on the memory of a training run, whose start holds the whole model."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Options of the planned run."""

    model: str = essential()
    """Hugging Face folder, or a config .json such as configs/models/*.json."""

    world_size: int = essential(1, at_least=1)
    """Ranks that shard the run."""

    seq_len: int = like(DataOptions, "seq_len", at_least=1)
    per_device_train_batch_size: int = like(OptimizerOptions, "per_device_train_batch_size", at_least=1, essential=True)
    gradient_accumulation_steps: int = like(OptimizerOptions, "gradient_accumulation_steps", at_least=1)
    pattern: Pattern = like(ModelOptions, "pattern", essential=True)
    scale_groups: int = like(MethodOptions, "scale_groups", at_least=0)
    gradient_checkpointing: bool = like(RuntimeOptions, "gradient_checkpointing", essential=True)
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type of the forward and backward pass."""

    moments: Literal["fp32", "8bit"] = like(OptimizerOptions, "moments")

    init_from: str | None = None
    """Start of the run, as in `castlm train`. Unless it is magnitude or a model, the first rank holds the whole model
    before step 0."""

    calibration_sequences: int = field(default=128, metadata={"at_least": 1})
    """Calibration sequences of the start; magnitude reads none."""

    eta: float = field(default=TeacherOptions.eta, metadata={"at_least": 0})
    """Weight of the KL divergence to the teacher. 0 trains without a teacher."""

    teacher: str | None = None
    """Model to distill from, or its config .json. The default is the model itself."""

    hidden_weight: float | None = field(default=None, metadata={"at_least": 0})
    """Weight of the distance to the teacher's hidden states. The default is 15, and 0 with another teacher. 0 turns it
    off, and so does eta 0."""

    prune: bool = essential(False)
    """Predict `castlm prune` on a CPU instead of a training run."""

    memory: Literal["model", "block"] = essential("block")
    """With --prune: keep the whole model in memory, or one transformer block. Structured patterns need the whole model.
    """

    gpu: str | None = essential(None)
    """GPU that the run should fit on: h100, a100, ..., or a number of GiB."""


@dataclass(frozen=True, kw_only=True)
class MemoryCommand(Refinements, BasisOptions, MemoryOptions):  # the fields of the last base come first
    """Predict the memory of each rank of a run, from the model's config alone, without weights. Options mean the same
    as in `castlm train`. With --prune, predict `castlm prune`; its --method is --init-from here.
    """

    def run(self) -> int:
        if self.prune:
            return self._run_prune()
        from castlm.dtypes import FLOATS
        from castlm.planning.activations import Settings
        from castlm.planning.memory import plan_memory

        refuse_given(self, _OF_PRUNE, "is for --prune: give that too, or leave it out")
        gib = None if self.gpu is None else _gib(self.gpu)
        dtype = FLOATS[self.precision]
        run = Settings(
            seq_len=self.seq_len,
            micro_batch=self.per_device_train_batch_size,
            pattern=self.pattern,
            scale_groups=self.scale_groups,
            accumulates=self.gradient_accumulation_steps > 1,
            checkpointing=self.gradient_checkpointing,
            compute=dtype,
            teacher=dtype if self.eta > 0 else None,
            hidden_states=self.teacher is None if self.hidden_weight is None else self.hidden_weight > 0,
            moments=self.moments,
            calibration_tokens=self.calibration_sequences * self.seq_len if self._prunes() else 0,
        )
        plan = plan_memory(self.model, run, teacher=self.teacher, world_size=self.world_size, gpu_gib=gib)
        print(plan.table())
        return 0 if plan.fits in (True, None) else 1

    def _run_prune(self) -> int:
        from castlm.planning.prune_memory import plan_prune_memory

        refuse_given(self, _OF_TRAINING, "is for a training run: leave it out with --prune")
        method = self.init_from or self.pattern.default_solver
        plan = plan_prune_memory(
            self.model,
            memory=self.memory if self.pattern.cut_out is None else "model",
            method=method,
            pattern=self.pattern,
            num_sequences=self.calibration_sequences,
            seq_len=self.seq_len,
            basis=part_of(self, BasisOptions),
            refinements=part_of(self, Refinements),
        )
        print(plan.table())
        return 0

    def _prunes(self) -> bool:
        """Whether the first rank prunes the whole model before step 0."""
        known = self.pattern.solvers
        if self.init_from is None or self.init_from in known:
            return self.init_from != "magnitude"
        if not Path(self.init_from).expanduser().is_dir():
            raise InputError(
                f"init_from {self.init_from} is neither {', '.join(known)} nor the folder of a model of {self.pattern}"
            )
        return False


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
