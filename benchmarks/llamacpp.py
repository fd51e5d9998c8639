"""Runs a model in llama.cpp: rounds a GGUF file by its quantizer, runs it by llama-cpp-python.

The frontier's rows of llama.cpp come from here. `pip install llama-cpp-python` compiles llama.cpp for the processor at
hand.
"""

from __future__ import annotations

import atexit
import math
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FORMATS = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
"""Name of the format, and of llama_cpp's constant of it."""
MIN_CONTEXT = 512
"""Tokens that a runner takes at least, whatever its `seq_len`."""


def quantize(source: Path, form: str, file: Path) -> Path:
    """Rounds a GGUF file to `form`, as llama.cpp's `llama-quantize` does without options."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, FORMATS[form])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {form}")
    return file


@dataclass
class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread or more."""

    file: Path
    seq_len: int
    threads: int
    sequences: int = 1
    """The most that `batch` takes."""

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), max(self.seq_len, MIN_CONTEXT))
        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        self._scoring = llama_cpp.Llama(str(self.file), logits_all=True, verbose=False, **sizes, **threads)
        self._decoding = llama_cpp.Llama(str(self.file), verbose=False, **sizes, **threads)
        for model in (self._scoring, self._decoding):
            atexit.register(model.close)  # Python's own clean-up comes too late for it

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = MIN_CONTEXT
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = self.threads
        self._together = llama_cpp.llama_init_from_model(self._decoding.model, params)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of one sequence, (num_tokens,) at most `seq_len`: fp32, (num_tokens, vocabulary)."""
        self._scoring.reset()
        self._scoring.eval(ids.tolist())
        return torch.from_numpy(self._scoring.scores[: len(ids)].copy())

    def perplexity(self, ids: Tensor) -> float:
        """As `castlm.perplexity` without a stride: sequences side by side, all tokens but the first of each scored."""
        total, count = 0.0, 0
        for sequence in ids.split(self.seq_len):
            if len(sequence) > 1:
                total += float(F.cross_entropy(self.logits(sequence)[:-1], sequence[1:], reduction="sum"))
                count += len(sequence) - 1
        return math.exp(total / count)

    def greedy(self, ids: Tensor, num_tokens: int) -> list[int]:
        """The next tokens after a prompt, (num_tokens,), each the most probable one."""
        self._decoding.reset()
        tokens, made = ids.tolist(), []
        for _ in range(num_tokens):
            self._decoding.eval(tokens)
            last = llama_cpp.llama_get_logits_ith(self._decoding.ctx, -1)
            tokens = [int(np.ctypeslib.as_array(last, (self._decoding.n_vocab(),)).argmax())]
            made += tokens
        return made

    def batch(self, ids: Tensor) -> Tensor:
        """The logits of the first token of each of some sequences, computed together: (sequences, vocabulary)."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._together), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for row, token in enumerate(ids.tolist()):
            batch.token[row], batch.pos[row], batch.logits[row] = token, 0, True
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
        code = llama_cpp.llama_decode(self._together, batch)
        llama_cpp.llama_batch_free(batch)
        assert not code, code
        found = [llama_cpp.llama_get_logits_ith(self._together, row) for row in range(len(ids))]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(x, (self._decoding.n_vocab(),)) for x in found]))
