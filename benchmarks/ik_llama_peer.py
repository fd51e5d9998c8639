"""ik_llama.cpp, the fork of llama.cpp with the fastest kernels for CPUs, for the frontier's rows of it: see `peer.py`.

    pip install ./ik-llama-cpp-python gguf                      # a checkout with submodules; its Python runs this

The wheel of the package index is not compiled for this processor, and its source archive lacks a file. Compiled so,
`LD_LIBRARY_PATH` names the folder `ik_llama_cpp/lib` of the environment. A process of its own, since its libraries have
the names of llama.cpp's. The source of `make` is a GGUF file. Weights are repacked into interleaved rows while they
are loaded (its option -rtr). Attention is its flash attention, as by default. A request may name the cache after the
format, as "Q4_0 q8_0"; otherwise it is f16.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import ik_llama_cpp
import numpy as np
from gguf import GGUFReader
from ik_llama_cpp import _ctypes_api as ik

from benchmarks.peer import main

FORMATS = ("Q8_0", "Q4_0")
"""Formats with groups of 256 weights do not divide the rows of SmolLM2-135M; IQ4_NL has NaN on an AMD EPYC (Zen 4)."""
CONTEXT, SEQUENCES = 32 * 1024, 32
"""Tokens that a runner takes, in all sequences together, and the most sequences."""
CACHES = {"f16": 1, "q8_0": 8}
"""Types of ggml.h by name, which the binding lacks."""
PART = 2048
"""Tokens that it takes in one step."""


def make(source: str, folder: str) -> None:
    """Rounds a GGUF file to every format, and writes the bytes: of the files, less what `source` has beside tensors."""
    out, sizes = Path(folder), {}
    out.mkdir(parents=True, exist_ok=True)
    beside = Path(source).stat().st_size - sum(int(tensor.n_bytes) for tensor in GGUFReader(source).tensors)
    for form in FORMATS:
        file = out / f"{form}.gguf"
        command = [Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize", source, file, form]
        subprocess.run(command, check=True, capture_output=True)
        sizes[form] = file.stat().st_size - beside  # gguf does not read the fork's own types
    (out / "sizes.json").write_text(json.dumps(sizes))


class Runner:
    """One format of the model, ready to run."""

    def __init__(self, folder: str, name: str, threads: int, all_logits: bool):
        form, _, cache = name.partition(" ")
        params = ik.llama_model_default_params()
        params.use_mmap, params.repack_tensors = False, True
        self.model = ik.llama_model_load_from_file(f"{folder}/{form}.gguf".encode(), params)
        self.vocabulary = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self.model))
        self.all_logits, self.length = all_logits, 0
        options = ik.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, PART, PART
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = CACHES[cache or "f16"]
        options.logits_all, options.n_seq_max = all_logits, SEQUENCES
        self.context = ik.llama_init_from_model(self.model, options)

    def reset(self) -> None:
        ik.llama_kv_cache_clear(self.context)
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        parts = [self._part(ids[:, start : start + PART]) for start in range(0, ids.shape[1], PART)]
        return np.concatenate(parts, axis=1) if self.all_logits else parts[-1]

    def _part(self, ids: np.ndarray) -> np.ndarray:
        """The logits of at most PART new tokens of each sequence."""
        rows, tokens = ids.shape
        at_once = max(1, PART // tokens)  # sequences
        found = [self._step(ids[row : row + at_once], row) for row in range(0, rows, at_once)]
        self.length += tokens
        return np.concatenate(found)

    def _step(self, ids: np.ndarray, first: int) -> np.ndarray:
        """The logits of new tokens of the sequences from number `first` on."""
        rows, tokens = ids.shape
        shown = range(tokens) if self.all_logits else (tokens - 1,)
        batch = ik.llama_batch_init(ids.size, 0, 1)
        batch.n_tokens = ids.size
        for at, (row, column) in enumerate(np.ndindex(rows, tokens)):
            batch.token[at], batch.pos[at] = int(ids[row, column]), self.length + column
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, first + row
            batch.logits[at] = column in shown
        code = ik.llama_decode(self.context, batch)
        ik.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"ik_llama.cpp took no batch of {ids.shape}: code {code}")
        found = [
            ik.llama_get_logits_ith(self.context, row * tokens + column) for row in range(rows) for column in shown
        ]
        logits = np.stack([np.ctypeslib.as_array(pointer, (self.vocabulary,)) for pointer in found])
        return logits.reshape(rows, len(shown), self.vocabulary)


if __name__ == "__main__":
    main(make, Runner)
