"""The distillation loss, forward and backward, against log_softmax, kl_div and nll_loss on full logits.

Run: `python -m benchmarks.distillation [--quick] [--json OUT]`. Time and peak memory, interleaved A B C A B C in one
process, medians and spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import machine, proc_status, write_json
from castlm.core.distill import OutputHead, distillation_loss

ETA = 1 / 3


class Case:
    """Student and teacher hidden states (tokens, hidden), heads (vocab, hidden), fp32: the same for all contestants."""

    def __init__(self, tokens: int, hidden: int, vocab: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(device)

        self.hidden, self.weight = (
            normal(tokens, hidden).requires_grad_(),
            normal(vocab, hidden, std=0.05).requires_grad_(),
        )
        self.teacher_hidden = self.hidden.detach() + normal(tokens, hidden, std=0.1)
        self.teacher_weight = self.weight.detach().clone()
        self.labels = torch.randint(vocab, (tokens,), generator=generator).to(device)

    def naive(self) -> Tensor:
        log_probs = F.log_softmax(F.linear(self.hidden, self.weight), -1)
        with torch.no_grad():
            teacher_log_probs = F.log_softmax(F.linear(self.teacher_hidden, self.teacher_weight), -1)
        kl = F.kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
        loss = ETA * kl + (1 - ETA) * F.nll_loss(log_probs, self.labels)
        loss.backward()
        return loss.detach()

    def castlm(self) -> Tensor:
        student, teacher = OutputHead(self.weight), OutputHead(self.teacher_weight)
        loss = distillation_loss(self.hidden, student, self.labels, self.teacher_hidden, teacher, eta=ETA).loss
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def matmuls(self) -> None:
        """Only the four matmuls that every exact method needs."""
        logits = torch.mm(self.hidden, self.weight.t())
        torch.mm(self.teacher_hidden, self.teacher_weight.t(), out=logits)
        torch.mm(logits, self.weight)
        torch.mm(logits.t(), self.hidden)

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None


def measure(run: Callable[[], object], device: str) -> tuple[float, float | None]:
    """(seconds, peak bytes above the earlier allocation); the peak is None if the platform does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak_rss()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if device == "cuda":
        return seconds, torch.cuda.max_memory_allocated() - before
    return seconds, None if before is None else proc_status("VmHWM") - before


def _reset_peak_rss() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None  # not Linux, or not allowed
    return proc_status("VmRSS")


def compare(tokens: int, hidden: int, vocab: int, repeats: int, device: str) -> dict[str, Any]:
    """One row: medians over `repeats` interleaved rounds, after a warm-up round."""
    case = Case(tokens, hidden, vocab, device)
    case.reset()
    expected = case.naive()
    expected_grads = case.hidden.grad, case.weight.grad
    case.reset()
    torch.testing.assert_close(case.castlm(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip((case.hidden.grad, case.weight.grad), expected_grads):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    del expected_grads, got, want

    contestants = {"naive": case.naive, "castlm": case.castlm, "matmuls": case.matmuls}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, list[float | None]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            case.reset()
            seconds, peak = measure(run, device)
            times[name].append(seconds)
            peaks[name].append(peak)
    row: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "vocab": vocab}
    for name in contestants:
        known = [peak for peak in peaks[name] if peak is not None]
        row[name] = {
            "seconds": statistics.median(times[name]),
            "seconds_range": [min(times[name]), max(times[name])],
            "peak_bytes": statistics.median(known) if known else None,
        }
    for other in ("naive", "matmuls"):
        row[f"time_vs_{other}"] = row["castlm"]["seconds"] / row[other]["seconds"]
    ratios = [mine / theirs for mine, theirs in zip(times["castlm"], times["naive"])]
    row["time_vs_naive_range"] = [min(ratios), max(ratios)]
    measured = row["naive"]["peak_bytes"] is not None
    row["memory_vs_naive"] = row["castlm"]["peak_bytes"] / row["naive"]["peak_bytes"] if measured else None
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'vocab':>8} {'naive':>9} {'castlm':>9} {'matmuls':>9} {'time':>7} {'range':>13} {'memory':>8}  peak, MB")
    for row in rows:
        seconds = " ".join(f"{row[name]['seconds']:8.3f}s" for name in ("naive", "castlm", "matmuls"))
        low, high = row["time_vs_naive_range"]
        memory = "unknown" if row["memory_vs_naive"] is None else f"{row['memory_vs_naive']:.3f}x"
        peaks = [row[name]["peak_bytes"] for name in ("castlm", "naive")]
        megabytes = " of ".join("?" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks)
        print(f"{row['vocab']:8d} {seconds} {row['time_vs_naive']:6.3f}x", end=" ")
        print(f"{low:5.2f} .. {high:4.2f} {memory:>8}  {megabytes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256 tokens and 2 rounds: a smoke test, not a figure")
    parser.add_argument("--json", metavar="OUT", help="write the figures, with machine, versions and threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    tokens, repeats = (256, 2) if options.quick else (1024, options.repeats)

    print(
        f"{tokens} tokens, hidden 576, fp32, {options.device}, {torch.get_num_threads()} threads, median of {repeats}"
    )
    rows = [compare(tokens, 576, vocab, repeats, options.device) for vocab in (49_152, 128_256)]
    show(rows)
    figures = {"rows": rows, "device": options.device, "repeats": repeats}
    write_json(options.json, {"benchmark": "distillation", "machine": machine(), **figures})


if __name__ == "__main__":
    main()
