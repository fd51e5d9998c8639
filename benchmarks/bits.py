"""Trained rounding against rounding after training, of dense and n:m weights of few bits: a table.

    python -m benchmarks.bits --model stories260K --text TEXT --eval-text HELD_OUT --output-dir DIR
    python -m benchmarks.bits --model demo --text TEXT --eval-text HELD_OUT --output-dir DIR --seeds 1 --first-seed 1 \\
      --steps 100 --seq-len 512 --batch 1 --eval-tokens 8192 --rate 3e-4 --dense-rate 1e-4 --cells dense/4 32:64/4

All ways are castlm's own commands, with the same steps, teacher and loss. They end in a packed folder for each head,
which `castlm eval` measures:

- train, then round: `castlm train`, then `castlm quantize --packed`, by GPTQ and coordinate descent;
- trained rounding: `castlm train --weight-bits`, then `castlm pack`;
- train, round, train scales: `castlm train`, then `castlm quantize --train-steps` then `castlm pack`.

`--steps 0` trains no weights: the first way is then the start or the dense model, rounded. `--second-text TEXT` adds
the perplexity on a text of another kind, `--tasks-from FOLDER` the tasks whose files the folder has.

DIR keeps the start of each pattern, every run, and the rows in rows.json, each at once. The same command goes on where
it was stopped: a finished part is not made again, and a run resumes bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.short_run import add_run_options
from castlm.api.pack import HEAD_CHOICES
from castlm.cli.main import main as castlm
from castlm.facts import Facts
from castlm_runtime.formats import FORMATS
from castlm_runtime.packed import PackedSpec

CELLS = ("dense/4", "dense/3", "2:4/4", "3:4/4", "3:4/3", "2:4/3")
WAYS = ("train, then round", "trained rounding", "train, round, train scales")
TASKS = "arc_easy,hellaswag"
SAVES = 4
"""Checkpoints of a run, from which it resumes."""

Row = dict[str, Any]


def bits_per_weight(pattern: str, bits: int) -> float:
    """Values, mask and scales of a long row, as packed."""
    n, m = (0, 0) if pattern == "dense" else map(int, pattern.split(":"))
    return 8 * PackedSpec(1, 4096, n, m, f"int{bits}").num_bytes / 4096


def start_of(args: argparse.Namespace, pattern: str, seed: int) -> Path:
    """The pruned model from which all runs of a pattern begin."""
    folder = args.output_dir / f"start-{_name(pattern)}-seed{seed}"
    if not folder.exists():
        text = {"calibration": args.text, "seq-len": args.seq_len, "seed": seed}
        # 64 does not divide the width of down_proj in stories260K, which stays dense
        _run("prune", model=args.model, output_dir=folder, pattern=pattern, allow_dense=0.25, **text)
    return folder


def run_of(args: argparse.Namespace, pattern: str, bits: int | None, seed: int) -> Path:
    """The run with trained rounding to `bits`, or without rounding; without steps, its start."""
    if not args.steps:
        return Path(args.model) if pattern == "dense" else start_of(args, pattern, seed)
    folder = args.output_dir / f"{_name(pattern)}-{f'int{bits}' if bits else 'unrounded'}-seed{seed}"
    if pattern == "dense":
        method = {"method": "dense", "learning-rate": args.rate if bits else args.dense_rate}
    else:
        start = start_of(args, pattern, seed)
        method = {"pattern": pattern, "init-from": start, "learning-rate": args.rate}
    _run(
        "train",
        *(["--resume"] if folder.exists() else []),
        **method,
        **({"weight-bits": bits} if bits else {}),
        **{"model": args.model, "dataset": args.text, "eval-dataset": args.eval_text, "output-dir": folder},
        **{"seq-len": args.seq_len, "per-device-train-batch-size": args.batch, "max-steps": args.steps},
        **{"eval-tokens": args.eval_tokens, "eval-steps": 100_000, "save-steps": -(-args.steps // SAVES)},
        **{"hidden-weight": 15, "report-to": "none", "seed": seed},
    )
    return folder


def scaled(args: argparse.Namespace, run: Path, pattern: str, bits: int, seed: int) -> Path:
    """The model of a run, rounded to `bits` and with trained scales."""
    folder = args.output_dir / f"{_name(pattern)}-int{bits}-scales-seed{seed}"
    if not folder.exists():
        text = {"calibration": args.text, "calibration-sequences": args.calibration, "seq-len": args.seq_len}
        _run("quantize", run, output_dir=folder, kind=f"int{bits}", train_steps=args.scale_steps, **text)
    return folder


def cell(args: argparse.Namespace, pattern: str, bits: int, seed: int, way: str, head: str) -> Row:
    """One row: the perplexity of a run as trained, and that of its packed folder, with its bytes."""
    run = run_of(args, pattern, bits if way == WAYS[1] else None, seed)
    text = {"calibration": args.text, "calibration-sequences": args.calibration, "seq-len": args.seq_len}
    with tempfile.TemporaryDirectory() as folder:
        packed, figures = Path(folder) / "packed", Path(folder) / "figures.json"
        if way != WAYS[0]:
            source = run if way == WAYS[1] else scaled(args, run, pattern, bits, seed)
            reads = head != "source" and FORMATS[head].reads_text
            _run("pack", source, output_dir=packed, head=head, **(text if reads else {}))
        else:
            _run("quantize", run, "--packed", output_dir=packed, kind=f"int{bits}", head=head, **text)
        measured = {"seq-len": args.seq_len, "eval-tokens": args.eval_tokens, "json": figures}
        tasks = {"tasks": TASKS, "tasks-from": args.tasks_from, "limit": 400} if args.tasks_from else {}
        _run("eval", packed, text=args.eval_text, **measured, **tasks)
        found = json.loads(figures.read_text())
        row = {"perplexity": found["perplexity"]}
        for figure in found.get("zero_shot", {}).get("results", []):
            row[f"{figure['task']} {figure['metric']}"] = figure["value"]
        if args.second_text:
            _run("eval", packed, text=args.second_text, **measured)
            row["second perplexity"] = json.loads(figures.read_text())["perplexity"]
        num_bytes = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    as_trained = Facts.read(run / "model").perplexity.final if args.steps else None
    key = {"pattern": pattern, "bits": bits, "seed": seed, "way": way, "head": head}
    return {**key, "as_trained": as_trained, **row, "mb": num_bytes / 1e6}


def _name(pattern: str) -> str:
    return pattern.replace(":", "of")


def _run(command: str, *arguments: object, **options: object) -> None:
    named = ([f"--{name.replace('_', '-')}", value] for name, value in options.items())
    words = [command, *arguments, *itertools.chain.from_iterable(named)]
    assert castlm(list(map(str, words))) == 0, words


def table(rows: list[Row]) -> str:
    """Markdown; perplexities of the seeds."""
    lines = [f"| weights | bits a weight | MB | unrounded | {' | '.join(WAYS)} |", "|---|" + "---:|" * 6]
    for pattern, bits, head in dict.fromkeys((row["pattern"], row["bits"], row["head"]) for row in rows):
        of_weights = [r for r in rows if (r["pattern"], r["bits"], r["head"]) == (pattern, bits, head)]
        name = f"{pattern} int{bits}, {head} head"
        shown = [name, f"{bits_per_weight(pattern, bits):.2f}", f"{of_weights[0]['mb']:.1f}"]
        before = [r["as_trained"] for r in of_weights if r["way"] == WAYS[0] and r["as_trained"] is not None]
        by_way = [[r["perplexity"] for r in of_weights if r["way"] == way] for way in WAYS]
        shown += [", ".join(f"{perplexity:.2f}" for perplexity in found) for found in (before, *by_way)]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scale-steps", type=int, default=100, help="of the scales alone")
    parser.add_argument("--eval-tokens", type=int, default=0)
    parser.add_argument("--second-text", help="another text whose perplexity is measured, as WikiText-2")
    parser.add_argument("--tasks-from", help=f"folder with the files of {TASKS}: 400 questions of each are asked")
    parser.add_argument("--calibration", type=int, default=128, help="sequences, for rounding and heads")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of n:m and of rounded weights")
    parser.add_argument("--dense-rate", type=float, default=5e-4, help="of dense weights that are not rounded")
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--heads", nargs="+", default=["source"], choices=HEAD_CHOICES, help="of head and embedding")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "rows.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    keys = ("pattern", "bits", "seed", "way", "head")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, name, way, head in itertools.product(seeds, options.cells, options.ways, options.heads):
        pattern, _, bits = name.rpartition("/")
        if (pattern, int(bits), seed, way, head) in [tuple(row[key] for key in keys) for row in rows]:
            continue
        rows.append(cell(options, pattern, int(bits), seed, way, head))
        print(rows[-1], flush=True)
        write_json(str(file), {"machine": machine(), "options": {**vars(options), "output_dir": ""}, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
