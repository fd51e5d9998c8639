"""Speeds where people work: thousands of tokens in the context, one thread and all cores, batches of sequences.

    python -m benchmarks.speeds FOLDER ... [--gguf FILE ...] [--openvino PYTHON --dense FOLDER]
                                [--ik-llama PYTHON --gguf-source FILE] [--threads 1 2] [--contexts 32 2048 7900]
                                [--batches 8 32] [--batch-context 512] [--prompts 512 2048 7900] [--json OUT]

FOLDER is a model that castlm-runtime runs, as `castlm quantize --packed` writes it. Peers run the dense model, each at
its best: a GGUF file in llama.cpp and in ik_llama.cpp (see `ik_llama_peer.py`) with flash attention, once with a cache
of f16 and once of q8_0, and a model folder in OpenVINO (see `openvino_peer.py`) with its cache of u8. Every row is a
speed in tokens per second by the clock, the median of rounds in turns, A B A B; "batch of 8" is one token of each of 8
sequences with `--batch-context` tokens each. The tokens are random, and the same for all: speeds do not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from benchmarks.machine import machine, write_json
from benchmarks.peer_process import MissingPeerError, PeerProcess, has_packages
from castlm_runtime.machine import physical_cores
from castlm_runtime.model import BLOCK, CACHE_KINDS, Cache, Model, Part

STEPS = 24  # that are timed together
PAUSE = 0.2  # seconds in which the threads of the rival before stop to spin
TOKEN = 100  # of each step
ROOM = 512  # tokens of a sequence that steps may take after its prompt
PROMPT_PART = 512  # tokens that castlm and llama.cpp read at a time


class Contestant(Protocol):
    """A model in a program: it reads prompts, then takes one token of each sequence at a time."""

    def read(self, ids: np.ndarray) -> float:
        """Forgets all, and reads prompts (sequences, tokens); the seconds."""

    def steps(self, count: int) -> float:
        """Takes `count` tokens of each sequence after the prompts; the seconds of one step."""


class Castlm:
    """A folder in castlm-runtime."""

    def __init__(self, model: Model, kind: str, num_tokens: int):
        self.model = model
        self.cache = Cache(model, kind, -(-num_tokens // BLOCK) + 1)

    def read(self, ids: np.ndarray) -> float:
        count, length = ids.shape
        blocks = -(-(length + ROOM) // BLOCK)  # of a sequence
        self.tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
        self.logits, self.length = np.empty((count, self.model.vocabulary), np.float32), 0
        began = time.perf_counter()
        for row in range(count):
            for start in range(0, length, PROMPT_PART):
                self._pass([row], ids[row : row + 1, start : start + PROMPT_PART], start, start + PROMPT_PART >= length)
        self.length = length
        return time.perf_counter() - began

    def _pass(self, rows: Sequence[int], ids: np.ndarray, position: int, wants_logits: bool) -> None:
        used = -(-(position + ids.shape[1]) // BLOCK)
        self.model.forward(
            self.cache,
            [
                Part(part, position, self.tables[row][:used], self.logits[row] if wants_logits else None)
                for row, part in zip(rows, ids)
            ],
        )

    def steps(self, count: int) -> float:
        rows = range(len(self.tables))
        began = time.perf_counter()
        for _ in range(count):
            self._pass(rows, np.full((len(rows), 1), TOKEN), self.length, True)
            self.length += 1
        return (time.perf_counter() - began) / count


_THREAD_OF_LLAMA_CPP = ThreadPoolExecutor(1)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def on_thread_of_llama_cpp(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Runs all calls of llama.cpp on one thread: it sets the shapes of AMX tiles once, and castlm sets its own."""

    @functools.wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        return _THREAD_OF_LLAMA_CPP.submit(function, *arguments, **options).result()

    return run


class LlamaCpp:
    """A GGUF file in llama.cpp with flash attention, whose sequences have caches of their own."""

    @on_thread_of_llama_cpp
    def __init__(self, file: str, cache: str, threads: int):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_log_set(_silent(llama_cpp), None)
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        self.params = params = llama_cpp.llama_context_default_params()
        params.n_batch = params.n_ubatch = PROMPT_PART
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.kv_unified, params.no_perf = 1, False, True
        params.type_k = params.type_v = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
        self.batch = llama_cpp.llama_batch_init(PROMPT_PART, 0, 1)
        self.context, self.count, self.length = None, 0, 0

    def _reset(self, count: int, length: int) -> None:
        """A context of the size that prompts need, which llama.cpp divides among its sequences."""
        if self.context:
            self.api.llama_free(self.context)
        self.params.n_ctx, self.params.n_seq_max = num_tokens(count, length), count
        self.context = self.api.llama_init_from_model(self.model, self.params)
        if not self.context:
            raise MissingPeerError(f"llama.cpp made no context of {num_tokens(count, length):,} tokens")
        self.count, self.length = count, length

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Runs (token, position, sequence, whether its logits are wanted)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wants_logits) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wants_logits
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        code = self.api.llama_decode(self.context, self.batch)
        assert not code, code
        self.api.llama_synchronize(self.context)

    @on_thread_of_llama_cpp
    def read(self, ids: np.ndarray) -> float:
        self._reset(*ids.shape)
        began = time.perf_counter()
        for row in range(self.count):
            for start in range(0, self.length, PROMPT_PART):
                part = range(start, min(start + PROMPT_PART, self.length))
                self._decode([(int(ids[row, at]), at, row, at + 1 == self.length) for at in part])
        return time.perf_counter() - began

    @on_thread_of_llama_cpp
    def steps(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            self._decode([(TOKEN, self.length, row, True) for row in range(self.count)])
            self.length += 1
        return (time.perf_counter() - began) / count


def _silent(llama_cpp: Any) -> Any:
    @llama_cpp.llama_log_callback
    def ignore(level: int, text: bytes, data: object) -> None:
        pass

    _KEPT.append(ignore)
    return ignore


_KEPT: list[object] = []
"""Callbacks that a library holds."""


class Peer:
    """A format of a peer in a process of its own."""

    def __init__(self, process: PeerProcess, form: str):
        self.process, self.form = process, form

    def read(self, ids: np.ndarray) -> float:
        self.count = len(ids)
        return float(self.process.ask(self.form, "read", ids)["seconds"])

    def steps(self, count: int) -> float:
        tokens = np.full((self.count, 1), TOKEN)
        return float(self.process.ask(self.form, "steps", tokens, new_tokens=count)["seconds"]) / count


def num_tokens(count: int, length: int) -> int:
    """Places that `count` sequences take in a cache, in whole blocks, with the steps that follow `length` tokens."""
    return count * -(-(length + ROOM) // BLOCK) * BLOCK


def contestants(options: argparse.Namespace, threads: int, room: int) -> dict[str, Contestant]:
    """Castlm's folders and the peers by name, with room for so many tokens in all sequences together."""
    found: dict[str, Contestant] = {}
    for folder in options.folders:
        model = Model.open(folder, threads)
        for kind in options.caches:
            found[f"{Path(folder).name}, castlm, {kind} cache"] = Castlm(model, kind, room)
    for file in options.gguf:
        for cache in ("f16", "q8_0"):
            found[f"{Path(file).stem}, llama.cpp, {cache} cache"] = LlamaCpp(file, cache, threads)
    if options.openvino:
        process = PeerProcess(
            "openvino_peer", options.openvino, threads, Path(options.dense), Path(options.scratch) / "openvino"
        )
        for form in options.openvino_formats:
            found[f"dense {form}, OpenVINO"] = Peer(process, form)
    if options.ik_llama:
        process = PeerProcess(
            "ik_llama_peer", options.ik_llama, threads, Path(options.gguf_source), Path(options.scratch) / "ik_llama"
        )
        for cache in ("f16", "q8_0"):
            found[f"Q4_0, ik_llama.cpp, {cache} cache"] = Peer(process, f"Q4_0 {cache}")
    return found


def in_turns(rivals: Mapping[str, Contestant], ids: np.ndarray, is_prompt: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in every round, A B A B after a warm-up round; before each a pause and a step.

    Args:
        ids: prompts (sequences, tokens).
        is_prompt: whether reading them is timed, or one token of each sequence after them.
    """
    seconds: dict[str, list[float]] = {rival: [] for rival in rivals}
    for round_number in range(rounds + 1):
        for rival, runner in rivals.items():
            time.sleep(PAUSE)
            spent = runner.read(ids) if is_prompt or round_number == 0 else 0.0
            if not is_prompt:
                runner.steps(1)
                spent = runner.steps(STEPS)
            if round_number:
                seconds[rival].append(spent)
    return seconds


def measure(options: argparse.Namespace, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Rows of {work, contestant, threads, per_second, low, high}."""
    rows: list[dict[str, Any]] = []
    random, longest = np.random.default_rng(0), max([0, *options.contexts, *options.prompts])
    ids = random.integers(100, 40_000, (max(options.batches, default=1), max(longest, options.batch_context)))
    work = [(f"prompt of {length:,}", 1, length, True) for length in options.prompts]
    work += [(f"decoding at {length:,}", 1, length, False) for length in options.contexts]
    length = options.batch_context
    work += [(f"batch of {count} at {length}", count, length, False) for count in options.batches]
    room = max(num_tokens(count, length) for _, count, length, _ in work)
    for threads in options.threads:
        rivals = contestants(options, threads, room)
        for name, count, length, is_prompt in work:
            tokens = length if is_prompt else count
            for rival, times in in_turns(rivals, ids[:count, :length], is_prompt, options.rounds).items():
                low, *_, high = speeds = sorted(tokens / spent for spent in times)
                row = {"work": name, "name": rival, "threads": threads, "per_second": statistics.median(speeds)}
                rows.append(row | {"low": low, "high": high})
                say(f"{threads} threads, {name}: {rival} {row['per_second']:,.1f} ({low:,.1f} to {high:,.1f})")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--caches", nargs="+", choices=CACHE_KINDS, default=["bf16"], help="of castlm")
    parser.add_argument("--gguf", nargs="+", default=[], help="dense files for llama.cpp (needs llama-cpp-python)")
    parser.add_argument("--openvino", metavar="PYTHON", help="of an environment with openvino, nncf, optimum-intel")
    parser.add_argument("--openvino-formats", nargs="+", default=["int4"])
    parser.add_argument("--dense", metavar="FOLDER", help="the dense model that OpenVINO converts")
    parser.add_argument("--ik-llama", metavar="PYTHON", help="of an environment with ik-llama-cpp-python")
    parser.add_argument("--gguf-source", metavar="FILE", help="bf16 GGUF file that ik_llama.cpp rounds to Q4_0")
    parser.add_argument("--scratch", metavar="FOLDER", help="keeps the converted model for another run")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, physical_cores()}))
    parser.add_argument("--contexts", nargs="*", type=int, default=[32, 2048, 7900])
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048, 7900])
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32])
    parser.add_argument("--batch-context", type=int, default=512, help="tokens of each sequence of a batch")
    parser.add_argument("--rounds", type=int, choices=range(2, ROOM // (STEPS + 1)), default=5, metavar="ROUNDS")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    if not (options.contexts or options.prompts or options.batches):
        parser.error("nothing to measure: name lengths by --contexts, --prompts or --batches")
    if options.openvino and not (options.dense and has_packages(options.openvino, "openvino, nncf, optimum.intel")):
        sys.exit("--openvino needs --dense, and an environment with openvino, nncf and optimum-intel")
    if options.ik_llama and not (options.gguf_source and has_packages(options.ik_llama, "ik_llama_cpp, gguf, numpy")):
        sys.exit("--ik-llama needs --gguf-source, and an environment with ik-llama-cpp-python, gguf and numpy")
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = options.scratch or scratch
        rows = measure(options, lambda line: print(line, flush=True))
    write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
