"""CAST in a plain torch loop. castlm adds six lines to it, each marked with an arrow.

python examples/torch_loop.py MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import castlm


def main(model_folder: str, text_file: str, output_folder: str, steps: int = 50, seq_len: int = 128) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(Path(text_file).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    sequences = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)

    castlm.prune_oneshot_(model, "sparsegpt", calibration=sequences[:64])  # <- the start: without it, magnitude masks
    castlm.add_weight_scaling(model)  # <-
    optimizer = castlm.AdamS(castlm.sparse_param_groups(model), lr=1e-3, total_steps=steps, decay_end=0.3)  # <-
    for step in range(steps):
        batch = sequences[torch.arange(step * 8, step * 8 + 8) % len(sequences)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    castlm.prune_(model, masks=optimizer.masks())  # <-
    castlm.fold_weight_scaling(model)  # <-

    model.save_pretrained(output_folder)
    tokenizer.save_pretrained(output_folder)
    print(castlm.verify(output_folder).summary())  # <-


if __name__ == "__main__":
    main(*sys.argv[1:4])
