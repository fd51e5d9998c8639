"""One-shot pruning in castlm and by llm-compressor's one call: perplexity and processor time.

    python -m benchmarks.llm_compressor --text TEXT --calibration TEXT --llm-compressor PYTHON [--model demo]
                                        [--pattern 2:4 32:64] [--calibration-sequences 64] [--seq-len 512] [--json O]

Every contestant is a process of its own, one after the other, from the same folder, with the same calibration tokens
(checked by their hash), on the threads that OMP_NUM_THREADS gives. Time is of the whole process, with loading and
saving. `castlm verify` then counts every result, and `castlm.evaluate` measures it on TEXT. PYTHON is of
an environment with llm-compressor; see `llm_compressor_peer.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import castlm
from benchmarks.machine import machine, write_json
from benchmarks.peer_process import has_packages
from castlm.cli.command_line import command_line
from castlm.cli.prune import PruneCommand
from castlm.data.calibration import CalibrationText, calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder
from castlm.export.folder import read_facts
from castlm.lab.compare.presets import SPARSEGPT
from castlm.models.io import load_model, save_model

_ROOT = Path(__file__).parents[1]
CASTLM: dict[str, dict[str, Any]] = {
    "castlm, SparseGPT as published": {name: value for name, value in SPARSEGPT.items() if name != "init_from"},
    "castlm, quick": {"start_effort": "quick"},
    "castlm": {},
}
"""Options of `castlm prune` by name of the contestant."""
PEER = {"llm-compressor, SparseGPT": "sparsegpt", "llm-compressor, Wanda": "wanda"}


@dataclass
class Result:
    name: str
    pattern: str
    perplexity: float
    holds: bool
    """Whether every group of every pruned layer is of the pattern, counted by `castlm verify`."""
    seconds: float
    """Of processor time."""


def run(command: Sequence[str]) -> float:
    """The seconds of processor time of a process.

    Raises:
        SystemExit: it failed; with the last line that it wrote.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=_ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: {output.read().strip().splitlines()[-1]}")
    return usage.ru_utime + usage.ru_stime


def measure(options: argparse.Namespace, folder: Path) -> list[Result]:
    loaded = load_model(options.model)
    dense = folder / "dense"
    save_model(loaded.model, loaded.tokenizer, dense)
    encoder = Encoder(loaded.tokenizer, assistant_only=False)
    text = open_documents(options.calibration)
    sequences, _ = calibration_sequences(text, encoder, options.calibration_sequences, options.seq_len)
    (folder / "tokens.json").write_text(json.dumps(sequences.tolist()))
    results = []
    for pattern in options.pattern:
        for name in (*PEER, *CASTLM):
            out = folder / f"{len(results)}"
            if name in PEER:
                command = [options.llm_compressor, "-m", "benchmarks.llm_compressor_peer"]
                command += [str(dense), str(folder / "tokens.json"), PEER[name], pattern, str(out)]
            else:
                inputs = {"model": str(dense), "calibration": options.calibration, "pattern": pattern}
                sizes = {
                    "calibration_sequences": options.calibration_sequences,
                    "seq_len": options.seq_len,
                    "precision": "fp32",
                }
                prune = PruneCommand(**inputs, **sizes, **CASTLM[name], output_dir=str(out))
                command = [sys.executable, "-m", *shlex.split(command_line("prune", prune))]
            seconds = run(command)
            if name in CASTLM:
                used = read_facts(out).calibration
                tokens = CalibrationText(sequences).record()["tokens_sha256"]
                if used is None or used.tokens_sha256 != tokens:
                    raise SystemExit(f"{name} has drawn other calibration tokens")
            found = castlm.evaluate(
                str(out), options.text, eval_tokens=options.eval_tokens, seq_len=options.seq_len, precision="fp32"
            )
            holds = castlm.verify(str(out), pattern=pattern).ok
            results.append(Result(name, pattern, found.perplexity, holds, seconds))
            print(results[-1], flush=True)
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each contestant and pattern."""
    lines = ["| | pattern | perplexity | seconds | every group holds |", "|---|---|---:|---:|---|"]
    for r in results:
        holds = "yes" if r.holds else "no"
        lines.append(f"| {r.name} | {r.pattern} | {r.perplexity:.2f} | {r.seconds:,.0f} | {holds} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--llm-compressor", required=True, metavar="PYTHON")
    parser.add_argument("--pattern", nargs="+", default=["2:4"])
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    if not has_packages(options.llm_compressor, "llmcompressor"):
        parser.error(f"{options.llm_compressor} has no llm-compressor: pip install llmcompressor there")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    print(table(results))
    write_json(options.json, {"machine": machine(), "options": vars(options), "results": [asdict(r) for r in results]})


if __name__ == "__main__":
    main()
