"""The answers of a peer that runs in another environment: `benchmarks.frontier` asks, by `peer_process.py`.

    python -m benchmarks.PEER make SOURCE FOLDER         # writes FOLDER/sizes.json, bytes of the weights by format
    python -m benchmarks.PEER answer FOLDER THREADS      # reads requests, prints answers, both JSON, one a line

Peers want other packages than castlm, or other versions, so a module of a peer imports nothing of castlm. A request is
{"format": a name in sizes.json, "what": "read", "steps" or "perplexity", "ids": lists of tokens} and for some
"new_tokens" or "seq_len". The answer has the seconds by the clock, or the perplexity. "steps" takes one token of each
of the sequences that "read" has read before.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Runner(Protocol):
    """One format of the model, ready to run."""

    def reset(self) -> None:
        """Forgets all tokens."""

    def step(self, ids: np.ndarray) -> np.ndarray:
        """The logits of new tokens (sequences, tokens), after those since `reset`: (sequences, tokens, vocabulary).

        Only the last token of each sequence has some, unless the runner was made with all logits.
        """


RunnerOf = Callable[[str, str, int, bool], Runner]
"""Makes a runner of a folder, a format, a number of threads, and whether all tokens have logits."""


def perplexity(runner: Runner, ids: np.ndarray, seq_len: int) -> float:
    """As `LlamaCpp.perplexity`: sequences side by side, all tokens but the first of each scored."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, seq_len):
        sequence = ids[start : start + seq_len]
        runner.reset()
        logits = runner.step(sequence[None])[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        scores = logits[np.arange(len(logits)), sequence[1:]] - np.log(np.exp(logits).sum(-1))
        total, count = total - scores.sum(), count + len(scores)
    return math.exp(total / count)


def answer(folder: str, threads: int, runner_of: RunnerOf) -> None:
    runners: dict[str, Runner] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, what, ids = request["format"], request["what"], np.array(request["ids"], np.int64)
        if what == "perplexity":
            runner = runner_of(folder, name, threads, True)
            found = {"perplexity": perplexity(runner, ids, request["seq_len"])}
        else:
            if name not in runners:
                runners[name] = runner_of(folder, name, threads, False)
            runner = runners[name]
            began = time.perf_counter()
            if what == "read":
                runner.reset()
                runner.step(ids)
            for _ in range(request.get("new_tokens", 0)):
                runner.step(ids)
            found = {"seconds": time.perf_counter() - began}
        print(json.dumps(found), flush=True)


def main(make: Callable[[str, str], None], runner_of: RunnerOf) -> None:
    if sys.argv[1] == "make":
        make(*sys.argv[2:4])
    else:
        answer(sys.argv[2], int(sys.argv[3]), runner_of)
