"""`PatternCallback`: `keep_pattern_` for `transformers.Trainer`, and for the trainers of TRL, its subclasses."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from castlm.core.errors import InputError
from castlm.core.keep import KeptPattern
from castlm.core.nm import Pattern
from castlm.core.sparsify import FilterFn
from castlm.methods.adapters import check_adapters, keep_pattern_


class PatternCallback(TrainerCallback):
    """Keeps an n:m sparse model n:m sparse in a `transformers.Trainer`, with any of its optimizers.

    During `train()`, `castlm.keep_pattern_` guards the model: masked weights stay exactly zero, and a step that breaks
    the pattern raises. A PEFT adapter whose merge would fill the zeros raises before the first step.

    Args:
        pattern: as for `castlm.keep_pattern_`.
        filter_fn: as for `castlm.keep_pattern_`.

    Raises:
        InputError: at the start of `train()`: as `keep_pattern_`, and for DeepSpeed, FSDP1, and plain LoRA on a sparse
            layer; during training: a step that breaks the pattern.

    Examples::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[castlm.PatternCallback()])
        trainer.train()
    """

    def __init__(self, pattern: Pattern | str = "2:4", filter_fn: FilterFn | None = None) -> None:
        self.pattern, self.filter_fn = pattern, filter_fn
        self.kept: KeptPattern | None = None
        """The guard of the run in progress, or of the last one."""
        self._checks_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        _refuse_flattening(args)
        if self.kept is not None:  # an earlier run failed before `on_train_end`
            self.kept.remove()
        self.kept = keep_pattern_(parts["model"], self.pattern, self.filter_fn)
        check_adapters(parts["model"], self.kept)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        assert self.kept is not None
        self._checks_before = self.kept.num_checks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        assert self.kept is not None
        if self.kept.num_checks == self._checks_before:  # the optimizer is not torch's, or holds only adapters
            self.kept.check(f"step {state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Checks once more, because `load_best_model_at_end` loads other weights, and ends the guard."""
        assert self.kept is not None
        self.kept.check("training")
        self.kept.remove()


def _refuse_flattening(args: TrainingArguments) -> None:
    """Raises `InputError` for the engines that hand the optimizer flat slices of several weights."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise InputError(
            "DeepSpeed gives the optimizer flat slices of the weights, which have no pattern: use DDP or FSDP2"
        )
    version = (args.fsdp_config or {}).get("version", 2) if args.fsdp else 2
    if int(version) == 1:  # if `accelerate launch` chose FSDP1, `KeptPattern` finds the flat weights
        raise InputError("FSDP1 flattens the weights, which have no pattern then: set fsdp_config to {'version': 2}")
