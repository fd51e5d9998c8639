"""CAST under transformers.Trainer: weight scaling before training, AdamS as the optimizer, prune and fold at the end.

    python examples/trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
    torchrun --nproc-per-node 2 examples/trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER

For one process and for DDP. `castlm train` adds distillation, sharding, exact resume and verification.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

import castlm
from castlm.core.errors import InputError


def refuse_what_breaks_the_masks(args: TrainingArguments) -> None:
    """Raises InputError where Trainer would silently train something other than CAST."""
    launched = {name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}
    if args.deepspeed or "DEEPSPEED" in launched:
        raise InputError("DeepSpeed hands the optimizer flat slices of the weights, which cuts groups apart: use DDP")
    if args.fsdp or "FSDP" in launched:
        raise InputError(
            "FSDP1 flattens the weights, which cuts groups apart, and on a CPU Trainer silently replaces FSDP by DDP: "
            "use DDP, or torchrun -m castlm train, which shards rows"
        )
    if args.load_best_model_at_end:
        raise InputError("load_best_model_at_end would prune it with the masks of the last step: turn it off")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("Trainer would train a separate model in each process: on a CPU, torchrun needs use_cpu=True")
    if args.max_steps < 1:
        raise InputError("set max_steps: the number of steps is part of the method")


class FinishCast(TrainerCallback):
    """Prunes with the last masks and folds the weight scaling when training ends, before anything is saved."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        castlm.prune_(model, self.pattern, masks=optimizer.masks())
        castlm.fold_weight_scaling(model)


class CastTrainer(Trainer):
    """A Trainer that makes its model n:m sparse, with the learning rate and Adam's settings of `args`.

    Raises:
        InputError: DeepSpeed, FSDP, load_best_model_at_end, or no max_steps.
    """

    def __init__(self, model: Any, args: TrainingArguments, *, pattern: str = "2:4", **kwargs: Any) -> None:
        refuse_what_breaks_the_masks(args)
        self.pattern = pattern
        castlm.add_weight_scaling(model, pattern=pattern)
        super().__init__(model, args, **kwargs)
        self.add_callback(FinishCast(pattern))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = castlm.AdamS(
                castlm.sparse_param_groups(self.model, self.pattern),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                total_steps=self.args.max_steps,
            )
        return self.optimizer


def main(
    model_folder: str, text_file: str, output_folder: str, steps: int = 50, seq_len: int = 128, batch_size: int = 4
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(Path(text_file).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    sequences = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    args = TrainingArguments(
        output_folder,
        max_steps=steps,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=batch_size,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
    )
    trainer = CastTrainer(
        model, args, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(output_folder)
        print(castlm.verify(output_folder).summary())


if __name__ == "__main__":
    main(*sys.argv[1:4])
