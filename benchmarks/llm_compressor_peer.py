"""Prunes a model by llm-compressor's one call, for `llm_compressor.py`: a process in an environment that has it.

    pip install llmcompressor                                   # in an environment of its own, whose Python runs this
    python -m benchmarks.llm_compressor_peer MODEL TOKENS METHOD PATTERN OUT

TOKENS is a JSON list of calibration sequences. It wants another transformers than castlm, so this file imports nothing
of castlm. The recipe is the one of its examples: every linear layer but the head, the defaults of the method. Weights
are fp32, as castlm's solvers have them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main(source: str, tokens: str, method: str, pattern: str, out: str) -> None:
    sequences = json.loads(Path(tokens).read_text())
    kept, of = map(int, pattern.split(":"))
    recipe = METHODS[method](
        sparsity=1 - kept / of, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    rows = {"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=len(sequences[0]),
        num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
        log_dir=None,
    )
    model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
