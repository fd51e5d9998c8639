"""Compares `plan memory` with real runs: predicted over measured peak of a training step, on a CPU.

Run: `python -m benchmarks.memory [--case NAME ...] [--json OUT]` (Linux: the peak is read from /proc). Each case is a
process of its own that goes through castlm's loop. Its baseline is taken after a tiny run of the same kind, so that
libraries and their buffers do not count; malloc is told to hand every block above 64 KiB back at once, and to keep them
again when the peak is known and steps are timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MEDIUM = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
MEDIUM |= {"vocab_size": 16000, "max_position_embeddings": 1024}
LLAMA = {"family": "llama", "over": {**MEDIUM, "num_key_value_heads": 4, "head_dim": 64}}
DEFAULTS = {
    "seq_len": 512,
    "micro_batch": 2,
    "scale_groups": 2,
    "accumulation": 1,
    "gradient_checkpointing": False,
    "compute_dtype": "fp32",
    "teacher": True,
    "moments": "fp32",
    "world_size": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "llama-41M": LLAMA,
    "llama-41M, no scaling": {**LLAMA, "scale_groups": 0},
    "llama-41M, checkpointing": {**LLAMA, "gradient_checkpointing": True},
    "llama-41M, accumulation": {**LLAMA, "accumulation": 2},
    "llama-41M, no teacher": {**LLAMA, "teacher": False},
    "llama-41M, 8-bit moments": {**LLAMA, "moments": "8bit"},
    "llama-41M, bf16": {**LLAMA, "compute_dtype": "bf16"},
    "llama-41M, bf16, checkpointing": {**LLAMA, "compute_dtype": "bf16", "gradient_checkpointing": True},
    "llama-41M, 2 ranks": {**LLAMA, "world_size": 2},
    "llama-41M, 2 ranks, bf16": {**LLAMA, "world_size": 2, "compute_dtype": "bf16"},
    "gpt2-34M": {"family": "gpt2", "over": MEDIUM},
    "demo-135M": {"family": None, "seq_len": 256},
}
"""`demo-135M` needs the extra `demo` and 4 GB."""


def measure(case: dict[str, Any], folder: Path, world: Any) -> dict[str, float]:
    """Bytes over the baseline at the peak of the second training step and after it, and the median seconds of three
    more. Runs in the child process."""
    import statistics
    import time

    from benchmarks.machine import proc_status
    from castlm.hardware import keep_freed_memory
    from castlm.training.config import TrainConfig
    from castlm.training.trainer import Trainer

    def start(model: str, name: str) -> Any:
        config = TrainConfig.of(
            model=model,
            dataset=str(folder / "text.txt"),
            output_dir=str(folder / name),
            seq_len=case["seq_len"],
            per_device_train_batch_size=case["micro_batch"],
            gradient_accumulation_steps=case["accumulation"],
            scale_groups=case["scale_groups"],
            eta=0.5 if case["teacher"] else 0.0,
            precision=case["compute_dtype"],
            moments=case["moments"],
            gradient_checkpointing=case["gradient_checkpointing"],
            init_from="magnitude",
            learning_rate=3e-4,
            report_to=("none",),
            device="cpu",
        )
        return Trainer(config, world)

    start(str(folder / "tiny"), "warm").train_step()
    gc.collect()
    baseline = proc_status("RssAnon")
    trainer = start(str(folder / "model") if case["family"] else "demo", "run")
    trainer.train_step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    trainer.train_step()
    # Pages of mapped files (libraries, safetensors) can be dropped by the kernel: they are no need of the run.
    peak, after = proc_status("VmHWM") - proc_status("RssFile") - baseline, proc_status("RssAnon") - baseline
    keep_freed_memory()  # from here on, as castlm's commands do
    trainer.train_step()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        trainer.train_step()
        seconds.append(time.perf_counter() - started)
    return {"peak": peak, "after": after, "seconds": statistics.median(seconds)}


def measure_in_child(cases: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The results of `measure` for each case, one after the other in a process of their own, or in as many as the first
    case has ranks: of the first rank. Exits where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            prepare(case, Path(folder, str(number)))
        ranks = str(cases[0]["world_size"])
        launcher = ["torch.distributed.run", "--nproc-per-node", ranks, "-m"] if ranks != "1" else []
        command = [sys.executable, "-m", *launcher, "benchmarks.memory", "--child", json.dumps(cases), folder]
        child = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    if child.returncode:
        sys.exit(f"{cases}: {child.stderr}")
    measured: list[dict[str, float]] = json.loads(child.stdout.splitlines()[-1])
    return measured


def measure_here(cases: Sequence[dict[str, Any]], folder: str) -> None:
    """Measures in the child process and prints the result as JSON."""
    import torch

    from castlm.world import init_world

    torch.set_num_threads(1)
    world = init_world("cpu", "full")
    measured = [measure(case, Path(folder, str(number)), world) for number, case in enumerate(cases)]
    if world.is_main:
        print(json.dumps(measured))


def prepare(case: dict[str, Any], folder: Path) -> None:
    """The text, the tiny model of the same family and the model itself, for the child."""
    from tests.tiny import save_tiny

    folder.mkdir()
    (folder / "text.txt").write_text("\n\n".join("words of a text " * 400 for _ in range(100)), encoding="utf-8")
    save_tiny(folder / "tiny", case["family"] or "llama", max_position_embeddings=1024)
    if case["family"]:
        save_tiny(folder / "model", case["family"], **case["over"])


def predict(case: dict[str, Any]) -> Any:
    from tests.tiny import tiny_model

    from castlm.dtypes import FLOATS
    from castlm.lab.planning.memory import PlannedRun, plan_memory
    from castlm.models.io import load_model

    model = tiny_model(case["family"], **case["over"]) if case["family"] else load_model("demo").model
    dtype = FLOATS[case["compute_dtype"]]
    run = PlannedRun(
        seq_len=case["seq_len"],
        micro_batch=case["micro_batch"],
        scale_groups=case["scale_groups"],
        accumulates=case["accumulation"] > 1,
        checkpointing=case["gradient_checkpointing"],
        compute=dtype,
        teacher=dtype if case["teacher"] else None,
        moments=case["moments"],
        chunk_tokens=256,
    )
    return plan_memory(model.config, run, world_size=case["world_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure_here(json.loads(args.child[0]), args.child[1])
    rows = []
    print(f"{'case':<34}{'predicted':>12}{'measured':>12}{'ratio':>8}  phase of the peak")
    for name in args.case:
        case = {**DEFAULTS, **CASES[name]}
        (measured,) = measure_in_child([case])
        plan = predict(case)
        ratio = plan.peak / measured["peak"]
        phase = max(plan.phases, key=lambda key: plan.phases[key])
        print(
            f"{name:<34}{plan.peak / MIB:>8.0f} MiB{measured['peak'] / MIB:>8.0f} MiB{ratio:>8.3f}  {phase}", flush=True
        )
        rows.append({"case": name, "predicted": plan.peak, **measured, "ratio": ratio, "phases": plan.phases})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
