"""Trained rounding against rounding after training, of dense and n:m weights of few bits: a table.

    python -m benchmarks.bits --model stories260K --text TEXT --eval-text HELD_OUT [--json O]

Both ways are castlm's own commands, with the same steps, teacher and loss. They end in a packed folder, which `castlm
eval` measures:

- train, then round: `castlm train`, then `castlm quantize --packed`, by GPTQ and coordinate descent;
- trained rounding: `castlm train --weight-bits`, then `castlm pack`; of 3 bits alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.short_run import add_run_options
from castlm.cli.main import main as castlm
from castlm.facts import Facts
from castlm_runtime.packed import PackedSpec

CELLS = ("dense/4", "dense/3", "2:4/4", "3:4/4", "3:4/3", "2:4/3")
DENSE_RATE, RATE = 5e-4, 3e-3
"""Learning rates: of dense weights without rounding, which a higher rate makes worse, and of all others."""
WAYS = ("train, then round", "trained rounding")


def bits_per_weight(pattern: str, bits: int) -> float:
    """Values, mask and scales of a long row, as packed."""
    n, m = (0, 0) if pattern == "dense" else map(int, pattern.split(":"))
    return 8 * PackedSpec(1, 4096, n, m, f"int{bits}").num_bytes / 4096


def cell(args: argparse.Namespace, pattern: str, bits: int, seed: int, way: str) -> dict[str, Any]:
    """One run: its perplexity as trained, and that of its packed folder."""
    is_trained = way == WAYS[1]
    rate = DENSE_RATE if pattern == "dense" and not is_trained else RATE
    with tempfile.TemporaryDirectory() as folder:
        run, packed, figures = (str(Path(folder) / name) for name in ("run", "packed", "figures.json"))
        options = {
            **({"method": "dense"} if pattern == "dense" else {"pattern": pattern}),
            **({"weight-bits": bits} if is_trained else {}),
            **{"model": args.model, "dataset": args.text, "eval-dataset": args.eval_text, "output-dir": run},
            **{"seq-len": args.seq_len, "per-device-train-batch-size": args.batch, "max-steps": args.steps},
            **{"eval-tokens": 0, "eval-steps": 100_000, "save-steps": 0, "report-to": "none"},
            **{"learning-rate": rate, "hidden-weight": 15, "seed": seed},
        }
        _run("train", *itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items()))
        if is_trained:
            _run("pack", run, "--output-dir", packed)
        else:
            calibration = ["--calibration", args.text, "--num-sequences", 128, "--seq-len", args.seq_len]
            _run("quantize", run, "--output-dir", packed, "--packed", "--kind", f"int{bits}", *calibration)
        measured = ["--seq-len", args.seq_len, "--eval-tokens", 0, "--json", figures]
        _run("eval", packed, "--text", args.eval_text, *measured)
        as_trained = Facts.read(Path(run) / "model").perplexity.final
        found = json.loads(Path(figures).read_text())["perplexity"]
    row = {"pattern": pattern, "bits": bits, "seed": seed, "way": way, "learning_rate": rate}
    return {**row, "as_trained": as_trained, "perplexity": found}


def _run(*arguments: object) -> None:
    assert castlm(list(map(str, arguments))) == 0, arguments


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; perplexities of the seeds, and the gain of their means."""
    lines = ["| weights | bits a weight | unrounded | train, then round | trained rounding | gain |"]
    lines.append("|---|" + "---:|" * 5)
    for pattern, bits in dict.fromkeys((row["pattern"], row["bits"]) for row in rows):
        after, trained = (
            [r for r in rows if (r["pattern"], r["bits"], r["way"]) == (pattern, bits, way)] for way in WAYS
        )
        shown = [", ".join(f"{r['as_trained']:.2f}" for r in after)]
        shown += [", ".join(f"{r['perplexity']:.2f}" for r in found) for found in (after, trained)]
        means = [statistics.mean(r["perplexity"] for r in found) if found else None for found in (after, trained)]
        gain = f"{1 - means[1] / means[0]:.1%}" if means[0] and means[1] else ""
        lines.append(f"| {pattern} int{bits} | {bits_per_weight(pattern, bits):.2f} | {' | '.join(shown)} | {gain} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args(arguments)
    rows = []
    for seed, name, way in itertools.product(range(options.seeds), options.cells, options.ways):
        pattern, _, bits = name.rpartition("/")
        if bits != "3" and way == WAYS[1]:
            continue
        rows.append(cell(options, pattern, int(bits), seed, way))
        print(rows[-1], flush=True)
        write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
