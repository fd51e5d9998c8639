"""Scores a text in llama.cpp: rounds a GGUF file by its quantizer, runs it by llama-cpp-python.

The perplexities of the frontier's rows of llama.cpp come from here. `pip install llama-cpp-python` compiles llama.cpp
for the processor at hand.
"""

from __future__ import annotations

import atexit
import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speeds import on_thread_of_llama_cpp

FORMATS = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
"""Name of the format, and of llama_cpp's constant of it."""
MIN_CONTEXT = 512
"""Tokens that a model takes at least, whatever its `seq_len`."""


def quantize(source: Path, form: str, file: Path, importance: Mapping[str, Tensor] | None = None, **more: Any) -> Path:
    """Rounds a GGUF file to `form`, as llama.cpp's `llama-quantize` does.

    Args:
        importance: for each tensor the mean square of its inputs, fp32 (columns,), as `llama-imatrix` computes it.
        more: fields of `llama_model_quantize_params`.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    for name, value in {"ftype": getattr(llama_cpp, FORMATS[form]), **more}.items():
        setattr(params, name, value)
    if importance is not None:
        entry = llama_cpp.llama_model_imatrix_data
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [
            entry(name.encode(), ctypes.cast(values.data_ptr(), pointer), len(values))
            for name, values in importance.items()
        ]
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # the last one has no name
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {form}")
    return file


@dataclass
class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread or more."""

    file: Path
    seq_len: int
    threads: int

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), max(self.seq_len, MIN_CONTEXT))
        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        self._scoring = llama_cpp.Llama(str(self.file), logits_all=True, verbose=False, **sizes, **threads)
        atexit.register(self._scoring.close)  # Python's own clean-up comes too late for it

    @on_thread_of_llama_cpp
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
