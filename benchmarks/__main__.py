"""Prints the cost of each part of castlm relative to the code that a user would run instead.

    python -m benchmarks [--quick] [--only NAME ...] [--threads N] [--clock wall|cpu] [--json OUT]

Every part takes turns with its rival in one process, A B A B; the ratio is the median of the rounds, with the smallest
and the largest. `--quick` uses small shapes and says whether everything runs; its ratios are no figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.tiny import save_tiny

from benchmarks import adams, inference, masks, scaling, startup
from benchmarks.machine import machine, write_json
from benchmarks.rows import CLOCKS, Row
from castlm.hardware import keep_freed_memory

TINY_STEP = ["--batch", "4", "--seq-len", "128", "--precision", "fp32"]


def distillation_rows(quick: bool) -> list[Row]:
    """In a process of its own: its peak memory is read from the operating system."""
    rows = []
    for found in run_module("benchmarks.distillation", ["--quick"] if quick else [])["rows"]:
        part = f"distillation loss, {found['tokens']} tokens x {found['vocab']}"
        low, high = found["time_vs_naive_range"]
        bound = f"{found['time_vs_matmuls']:.2f}x of its four matmuls"
        against = "log_softmax KL + CE"
        rows.append(Row(f"{part}, time", against, found["time_vs_naive"], low, high, "<= 1.0", bound))
        memory = found["memory_vs_naive"]
        if memory is not None:
            rows.append(Row(f"{part}, peak memory", against, memory, memory, memory, "<= 0.25"))
    return rows


def throughput_rows(quick: bool) -> list[Row]:
    """Tokens per second of `castlm train` in units of a bare loop's; then bf16 autocast against fp32."""
    if quick:
        return [throughput_row(run_on_tiny_model("benchmarks.throughput", ["--steps", "3", *TINY_STEP]))]
    fp32, bf16 = (run_module("benchmarks.throughput", ["--precision", p]) for p in ("fp32", "bf16"))
    steps = {
        name: statistics.median(found["seconds"]["castlm"][1:]) for name, found in (("fp32", fp32), ("bf16", bf16))
    }
    ratio = steps["bf16"] / steps["fp32"]
    chosen = Row("castlm step, bf16 autocast", "fp32, in a process of its own", ratio, ratio, ratio, detail=steps)
    return [throughput_row(fp32), throughput_row(bf16), chosen]


def inference_rows(quick: bool, clock: str) -> list[Row]:
    """Packed weights on a CPU, and a model of them."""
    if not quick:
        return inference.rows(quick, "demo", clock)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder, "llama", hidden_size=128, intermediate_size=256, head_dim=32)
        return inference.rows(quick, folder, clock)


def peak_rows(quick: bool) -> list[Row]:
    """Peak memory of `castlm train` in units of a bare loop's."""
    if quick:
        found = run_on_tiny_model("benchmarks.throughput", ["--peak", *TINY_STEP])
    else:
        found = run_module("benchmarks.throughput", ["--peak", "--batch", "8", "--seq-len", "512"])
    part = f"peak memory, {found['batch']} x {found['seq_len']} tokens, {found['chosen_precision']}"
    against, ratio = "bare loop, same teacher, fused AdamW", found["ratio"]
    return [Row(part, against, ratio, ratio, ratio, "<= 1.0", detail=found["peak_bytes"])]


def throughput_row(found: dict[str, Any]) -> Row:
    seconds = found["seconds"]
    ratios = [bare / mine for mine, bare in zip(seconds["castlm"][1:], seconds["bare"][1:])]
    part = f"tokens/s of a whole step, {found['batch']} x {found['seq_len']} tokens, {found['precision']}"
    against = "bare loop, same teacher, fused AdamW"
    return Row(
        part, against, statistics.median(ratios), min(ratios), max(ratios), ">= 0.97", detail=found["tokens_per_s"]
    )


def oneshot_rows(quick: bool) -> list[Row]:
    """Wanda and SparseGPT as published, and castlm's."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            save_tiny(folder, "llama")
            sizes = ["--calibration-sequences", "8", "--seq-len", "64", "--repeats", "1", "--held-out-tokens", "2048"]
            found = run_module("benchmarks.oneshot", ["--model", folder, *sizes])
    else:
        found = run_module("benchmarks.oneshot", ["--calibration-sequences", "16", "--seq-len", "512"])
    return [
        Row(
            f"one-shot {row['method']}", "the published loop", row["speedup"], *row["speedup_range"], ">= 1", detail=row
        )
        for row in found["rows"]
        if "speedup" in row
    ]


def run_on_tiny_model(module: str, arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(folder, "llama", hidden_size=128, intermediate_size=256, head_dim=32)
        return run_module(module, ["--model", folder, *arguments])


def run_module(module: str, arguments: list[str]) -> dict[str, Any]:
    """Runs a benchmark that is a command of its own and returns its JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        subprocess.run(
            [sys.executable, "-m", module, *arguments, "--json", str(out)], check=True, stdout=subprocess.DEVNULL
        )
        return json.loads(out.read_text())


PARTS = {
    "state": lambda quick, clock: adams.state_only_rows(),
    "adams": lambda quick, clock: adams.step_rows(quick, clock=clock),
    "moments": lambda quick, clock: adams.moments_rows(quick, clock=clock),
    "masks": lambda quick, clock: masks.refresh_rows(quick, clock=clock) + masks.one_weight_rows(clock=clock),
    "scaling": lambda quick, clock: scaling.rows(quick, clock=clock),
    "distillation": lambda quick, clock: distillation_rows(quick),
    "throughput": lambda quick, clock: throughput_rows(quick),
    "peak": lambda quick, clock: peak_rows(quick),
    "oneshot": lambda quick, clock: oneshot_rows(quick),
    "inference": lambda quick, clock: inference_rows(quick, clock),
    "startup": lambda quick, clock: startup.rows(),
}


def show(rows: Sequence[Row], header: bool = True) -> None:
    if header:
        print(f"{'part':60} {'against':38} {'ratio':>8} {'spread':>18}  {'goal':9} met  bound")
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.met]
        spread = f"{row.low:.3f} .. {row.high:.3f}"
        print(f"{row.part:60} {row.against:38} {row.value:8.3f} {spread:>18}  {row.goal:9} {met:4} {row.bound}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of adams, masks and scaling, one thread")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.clock == "cpu" else options.threads)
    keep_freed_memory()  # as castlm's commands do; it serves both sides
    facts = machine()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, {options.clock} time")
    rows: list[Row] = []
    for name in options.only:
        found = PARTS[name](options.quick, options.clock)
        if options.quick:  # small shapes have no goals
            found = [dataclasses.replace(row, goal="") for row in found]
        show(found, header=not rows)
        rows += found
        table = [dataclasses.asdict(row) | {"met": row.met} for row in rows]  # a run that is stopped keeps what it has
        write_json(options.json, {"machine": facts, "quick": options.quick, "clock": options.clock, "rows": table})


if __name__ == "__main__":
    main()
