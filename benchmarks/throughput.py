"""Tokens per second of castlm's training step against a bare loop: same model, same teacher, same batches, fused AdamW.

    python -m benchmarks.throughput [--model demo] [--steps 5] [--peak] [--json OUT]

Both run in one process in turns, A B A B, so that other load on the machine affects both alike. The bare loop is what a
user would write: full logits, log_softmax KL + cross-entropy, backward, clip, fused AdamW. With `--peak` each is in a
process of its own instead, whose peak memory during the second step is compared.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.machine import machine, write_json
from benchmarks.texts import write_texts
from castlm.hardware import autocast, keep_freed_memory, peak_memory
from castlm.models.io import load_model
from castlm.training.config import TrainConfig
from castlm.training.options import TeacherOptions
from castlm.training.trainer import Trainer
from castlm.world import init_world


def bare_step(student, teacher, optimizer, batches, precision, eta):
    """One optimizer step over micro-batches of (input_ids, labels), labels shifted."""
    device = student.device
    num_tokens = sum(labels.numel() for _, labels in batches)
    for input_ids, labels in batches:
        with autocast(device, precision):
            logits = student(input_ids=input_ids, use_cache=False).logits
            with torch.no_grad():
                teacher_logits = teacher(input_ids=input_ids, use_cache=False).logits
        log_p = F.log_softmax(logits.float().flatten(0, 1), -1)
        log_q = F.log_softmax(teacher_logits.float().flatten(0, 1), -1)
        kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        ce = F.nll_loss(log_p, labels.flatten(), reduction="sum")
        ((eta * kl + (1 - eta) * ce) / num_tokens).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(run, *arguments):
    """Seconds of one call, the GPU's work included."""
    started = time.perf_counter()
    run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def castlm_side(args: argparse.Namespace, scratch: Path) -> Trainer:
    text, held_out = write_texts(scratch / "text")
    config = TrainConfig.of(
        model=args.model,
        dataset=str(text),
        eval_dataset=str(held_out),
        output_dir=str(scratch / "run"),
        init_from="magnitude",
        max_steps=args.steps + 1,
        learning_rate=3e-4,  # as in the bare loop
        seq_len=args.seq_len,
        per_device_train_batch_size=args.batch,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        cross_document_attention=True,  # as in the bare loop
        device=args.device,
        report_to=("none",),
    )
    return Trainer(config, init_world(args.device, "full"))


def bare_side(args: argparse.Namespace, teacher_dtype: torch.dtype) -> tuple[nn.Module, nn.Module, torch.optim.AdamW]:
    """Student, teacher and optimizer."""
    student = load_model(args.model).model.train().to(args.device)
    if args.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher = copy.deepcopy(student).to(teacher_dtype).eval().requires_grad_(False)
    return student, teacher, torch.optim.AdamW(student.parameters(), lr=3e-4, fused=True)


def compare_speed(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    keep_freed_memory()  # as castlm train does; it serves both sides
    run = castlm_side(args, scratch)
    bare = bare_side(args, next(run.objective.teacher.parameters()).dtype)
    seconds: dict[str, list[float]] = {"castlm": [], "bare": []}
    position = run.text.loader.state_dict()
    for step in range(args.steps + 1):
        seconds["castlm"].append(timed(run.train_step))
        run.text.loader.load_state_dict(position)  # the same batch for both
        batch = next(run.text.loader)
        position = run.text.loader.state_dict()
        batches = [(batch["input_ids"].to(args.device), batch["labels"].to(args.device))]
        seconds["bare"].append(timed(bare_step, *bare, batches, run.precision, run.config.teacher.eta))
        print(f"step {step}: castlm {seconds['castlm'][-1]:.2f} s, bare {seconds['bare'][-1]:.2f} s", flush=True)
    tokens = args.batch * args.seq_len
    rows = {name: tokens / statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = rows["castlm"] / rows["bare"]
    precision = run.precision
    print(f"\n{args.model}, {args.batch} x {args.seq_len} tokens, {precision}, optimizer {run.optimizer_text}")
    print(f"castlm {rows['castlm']:,.0f} tokens/s, bare loop {rows['bare']:,.0f} tokens/s: {ratio:.3f} of it")
    return {"tokens_per_s": rows, "ratio": ratio, "seconds": seconds, "precision": precision}


def compare_peak(args: argparse.Namespace) -> dict[str, Any]:
    castlm, precision, teacher_dtype = peak_in_child("castlm", args.precision, "float32")
    bare, *_ = peak_in_child("bare", precision, teacher_dtype)
    ratio = castlm / bare
    print(f"{args.model}, {args.batch} x {args.seq_len} tokens, {precision}, a teacher in {teacher_dtype}")
    print(f"castlm {castlm / 2**20:,.0f} MiB, bare loop {bare / 2**20:,.0f} MiB: {ratio:.3f} of it")
    return {"peak_bytes": {"castlm": castlm, "bare": bare}, "ratio": ratio, "chosen_precision": precision}


def peak_in_child(side: str, precision: str, teacher_dtype: str) -> tuple[int, str, str]:
    """The output of `show_peak` for one side, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:], "--side", side]
    command += ["--precision", precision, "--teacher-dtype", teacher_dtype]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak, precision, teacher_dtype = child.stdout.split()[-3:]
    return int(peak), precision, teacher_dtype


def show_peak(args: argparse.Namespace, scratch: Path) -> None:
    """Runs in the child process: prints the bytes that it held at most from the end of the first step to that of the
    second, its libraries included; the compute type; and the teacher's dtype. castlm keeps freed memory, as its
    commands do; the bare loop does not."""
    if args.side == "castlm":
        keep_freed_memory()
        run = castlm_side(args, scratch)
        precision, teacher_dtype = run.precision, next(run.objective.teacher.parameters()).dtype
        step = run.train_step
    else:
        precision, teacher_dtype = args.precision, getattr(torch, args.teacher_dtype)
        bare = bare_side(args, teacher_dtype)
        ids = torch.arange(args.batch * args.seq_len, device=args.device).view(args.batch, -1)
        ids %= bare[0].config.vocab_size
        step = functools.partial(bare_step, *bare, [(ids, ids)], precision, TeacherOptions.eta)
    step()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    print(peak_memory(args.device), precision, str(teacher_dtype).removeprefix("torch."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after one of warm-up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    parser.add_argument("--peak", action="store_true", help="compare peak memory instead of speed (Linux, or a GPU)")
    parser.add_argument("--side", choices=("castlm", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--teacher-dtype", help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        if args.side:
            return show_peak(args, Path(scratch))
        result = compare_peak(args) if args.peak else compare_speed(args, Path(scratch))
    write_json(args.json, {"machine": machine(), **result, **vars(args)})


if __name__ == "__main__":
    main()
