"""CAST under transformers.Trainer.

python examples/trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
torchrun --nproc-per-node 2 examples/trainer.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import castlm


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
    trainer = castlm.CastTrainer(
        model, args, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    )
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(output_folder)
        print(castlm.verify(output_folder).summary())


if __name__ == "__main__":
    main(*sys.argv[1:4])
