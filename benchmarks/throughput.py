"""Tokens per second of castlm's training step against a bare loop: same model, same teacher, same batches, fused AdamW.

    python -m benchmarks.throughput [--model demo] [--steps 5] [--json OUT]

Both live in one process and take turns, A B A B, so that what else the machine does hits both alike. The bare loop is
what a user would write: full logits, log_softmax KL + cross-entropy, backward, clip, fused AdamW.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import machine, write_json
from castlm.demo import write_texts
from castlm.models import load_model
from castlm.training.config import TrainConfig
from castlm.training.distributed import init_world
from castlm.training.hardware import autocast, keep_freed_memory
from castlm.training.loop import Run


def bare_step(student, teacher, optimizer, batches, precision, eta):
    """One optimizer step over micro-batches of (input_ids, labels), labels shifted."""
    device = student.device
    num_tokens = sum(labels.numel() for _, labels in batches)
    for input_ids, labels in batches:
        with autocast(device, precision):
            logits = student(input_ids=input_ids, use_cache=False).logits
            with torch.no_grad():
                taught = teacher(input_ids=input_ids, use_cache=False).logits
        log_p = F.log_softmax(logits.float().flatten(0, 1), -1)
        log_q = F.log_softmax(taught.float().flatten(0, 1), -1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after one of warm-up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    parser.add_argument("--json")
    args = parser.parse_args()

    keep_freed_memory()  # as castlm train does; it serves both sides
    with tempfile.TemporaryDirectory() as scratch:
        text, held_out = write_texts(Path(scratch) / "text")
        config = TrainConfig(
            model=args.model,
            dataset=str(text),
            eval_dataset=str(held_out),
            output_dir=str(Path(scratch) / "run"),
            initial_mask="magnitude",
            max_steps=args.steps + 1,
            seq_len=args.seq_len,
            per_device_train_batch_size=args.batch,
            precision=args.precision,
            gradient_checkpointing=args.gradient_checkpointing,
            device=args.device,
            tensorboard=False,
        )
        run = Run(config, init_world(args.device, "full"))
        student = load_model(args.model).model.train().to(args.device)
        if args.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        teacher = copy.deepcopy(student).to(next(run.objective.teacher.parameters()).dtype).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, fused=True)
        seconds: dict[str, list[float]] = {"castlm": [], "bare": []}
        position = run.loader.state_dict()
        for step in range(args.steps + 1):
            seconds["castlm"].append(timed(run.train_step))
            run.loader.load_state_dict(position)  # the same batch for both
            batch = next(run.loader)
            position = run.loader.state_dict()
            batches = [(batch["input_ids"].to(args.device), batch["labels"].to(args.device))]
            arguments = (student, teacher, optimizer, batches, run.precision, config.eta)
            seconds["bare"].append(timed(bare_step, *arguments))
            print(f"step {step}: castlm {seconds['castlm'][-1]:.2f} s, bare {seconds['bare'][-1]:.2f} s", flush=True)

    tokens = args.batch * args.seq_len
    rows = {name: tokens / statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = rows["castlm"] / rows["bare"]
    print(f"\n{args.model}, {args.batch} x {args.seq_len} tokens, {run.precision}, optimizer {run.optimizer_text}")
    print(f"castlm {rows['castlm']:,.0f} tokens/s, bare loop {rows['bare']:,.0f} tokens/s: {ratio:.3f} of it")
    result = {"tokens_per_s": rows, "ratio": ratio, "seconds": seconds, "precision": run.precision, **vars(args)}
    write_json(args.json, {"machine": machine(), **result})


if __name__ == "__main__":
    main()
