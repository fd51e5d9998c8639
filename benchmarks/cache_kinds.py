"""What the kinds of the engine's cache cost: perplexity, greedy tokens and bytes of bf16, int8 and fp32.

    python -m benchmarks.cache_kinds FOLDER --text TEXT [--tokens 8192] [--seq-len 2048] [--json OUT]

FOLDER is a model that castlm-runtime runs. The text is cut into sequences side by side, and all tokens but the first of
each are scored, twice: read as prompts, and token by token, since these have kernels of their own. Greedy tokens follow
14 prompts of 128 tokens from the text; they count as equal up to the first one that differs from those of fp32.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.machine import machine, write_json
from castlm.data.tokens import token_ids
from castlm_runtime.model import BLOCK, CACHE_KINDS, Cache, Model, Part, block_bytes, blocks_for

PROMPTS, PROMPT, NEW_TOKENS = 14, 128, 64


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The negative log probability of each target (count,) by its row of logits (count, vocabulary)."""
    largest = logits.max(-1, keepdims=True)
    log_of_sum = np.log(np.exp(logits - largest, dtype=np.float32).sum(-1, dtype=np.float64)) + largest[:, 0]
    return log_of_sum - logits[np.arange(len(targets)), targets]


class Sequences:
    """Sequences (count, length) in a cache of one kind, with room for `more` tokens each."""

    def __init__(self, model: Model, kind: str, ids: np.ndarray, more: int = 0):
        self.model, self.ids = model, ids
        blocks = blocks_for(ids.shape[1] + more)
        self.cache = Cache(model, kind, len(ids) * blocks)
        self.tables = np.arange(len(ids) * blocks).reshape(len(ids), blocks)

    def read(self, row: int, tokens: np.ndarray, position: int, logits: np.ndarray | None) -> Part:
        """New tokens of a sequence, for `forward`."""
        return Part(tokens, position, self.tables[row][: blocks_for(position + len(tokens))], logits)

    def perplexity_of_prompts(self) -> float:
        found = []
        for row, ids in enumerate(self.ids):
            for start in range(0, len(ids) - 1, 256):
                part = ids[start : start + 256]
                logits = np.empty((len(part), self.model.vocabulary), np.float32)
                self.model.forward(self.cache, [self.read(row, part, start, logits)])
                targets = ids[start + 1 : start + 257]
                found.append(losses(logits[: len(targets)], targets))
        return math.exp(np.concatenate(found).mean())

    def perplexity_of_tokens(self) -> float:
        found, logits = [], np.empty((len(self.ids), self.model.vocabulary), np.float32)
        for at in range(self.ids.shape[1] - 1):
            self.step(self.ids[:, at], at, logits)
            found.append(losses(logits, self.ids[:, at + 1]))
        return math.exp(np.concatenate(found).mean())

    def step(self, tokens: np.ndarray, position: int, logits: np.ndarray) -> None:
        """One token of each sequence."""
        rows = range(len(self.ids))
        self.model.forward(self.cache, [self.read(row, tokens[row : row + 1], position, logits[row]) for row in rows])

    def greedy(self, num_tokens: int) -> np.ndarray:
        """The next tokens (count, num_tokens) after the sequences."""
        count, length = self.ids.shape
        logits, found = np.empty((count, self.model.vocabulary), np.float32), []
        for row in range(count):
            self.model.forward(self.cache, [self.read(row, self.ids[row], 0, logits[row])])
        for position in range(length, length + num_tokens):
            found.append(logits.argmax(-1))
            self.step(found[-1], position, logits)
        return np.stack(found, 1)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each kind."""
    model = Model.open(options.folder, options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = token_ids(options.text, tokenizer, limit=options.tokens).numpy()
    sequences = ids[: len(ids) // options.seq_len * options.seq_len].reshape(-1, options.seq_len)
    starts = np.linspace(0, len(ids) - PROMPT, PROMPTS).astype(int)
    prompts = np.stack([ids[start : start + PROMPT] for start in starts])
    expected = Sequences(model, "fp32", prompts, NEW_TOKENS).greedy(NEW_TOKENS)
    rows = []
    for kind in CACHE_KINDS:
        found = Sequences(model, kind, prompts, NEW_TOKENS).greedy(NEW_TOKENS)
        rows.append(
            {
                "cache": kind,
                "bytes_per_token": block_bytes(model, kind) / BLOCK,
                "perplexity_of_prompts": Sequences(model, kind, sequences).perplexity_of_prompts(),
                "perplexity_of_tokens": Sequences(model, kind, sequences).perplexity_of_tokens(),
                "equal_prompts": int((found == expected).all(1).sum()),
                "equal_tokens": int((found == expected).cumprod(1).sum()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    rows = measure(options)
    write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
