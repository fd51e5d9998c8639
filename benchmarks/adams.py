"""AdamS against torch's fused AdamW: time of a step and bytes of state, on the parameters of SmolLM2-135M."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.rows import Row, interleaved, llama_parameters, ratio_row
from castlm.core.adams import AdamS

INTERVAL = 10


def step_rows(quick: bool, repeats: int = 7, device: str = "cpu", clock: str = "wall") -> list[Row]:
    """Both optimizers step the same parameters in turn; the refresh of the masks is told apart and counted to a tenth
    in the second row."""
    layers, vocab = (4, 8192) if quick else (30, 49_152)
    sparse, dense = llama_parameters(layers, vocab, device)
    num_params = sum(p.numel() for p in (*sparse, *dense))
    adamw = torch.optim.AdamW([*sparse, *dense], lr=1e-5, fused=True)
    groups = [{"params": sparse, "sparse": True}, {"params": dense}]
    adams = AdamS(groups, lr=1e-5, total_steps=10**6, mask_interval=10**6, fused=True)
    started = time.perf_counter()
    adams.step()
    compile_seconds = time.perf_counter() - started

    gradients, weights = [p.grad for p in dense + sparse], [p.detach() for p in dense + sparse]
    times = interleaved(
        {
            "castlm": adams.step,
            "fused AdamW": adamw.step,
            "refresh": lambda: adams.refresh_masks(adams.param_groups[0]),
            "add": lambda: torch._foreach_add_(gradients, weights, alpha=1e-9),
        },
        repeats,
        clock,
    )
    amortised = [step + refresh / INTERVAL for step, refresh in zip(times["castlm"], times["refresh"])]
    moved = 28 + sum(p.numel() for p in sparse) / num_params / 8
    step, bound = statistics.median(times["castlm"]), statistics.median(times["add"]) * moved / 12
    part, against = f"AdamS step, {num_params / 1e6:.0f}M parameters", "torch.optim.AdamW(fused=True)"
    goal = "<= 1.25" if device == "cpu" else "<= 1.10"
    bound_text = f"{moved:.2f} B/param at the rate of x += y: {step / bound:.2f}x of it"
    detail = {"bound_seconds": bound, "first_step_with_compilation_seconds": compile_seconds}
    return [
        ratio_row(part, against, times["castlm"], times["fused AdamW"], goal, bound=bound_text, detail=detail),
        ratio_row(f"{part}, with 1/{INTERVAL} of a refresh", against, amortised, times["fused AdamW"], ""),
        state_row(adams, adamw),
    ]


def moments_rows(quick: bool, repeats: int = 5, clock: str = "wall") -> list[Row]:
    """AdamS with 8-bit moments against AdamS with fp32 ones: time of a step, and bytes of state."""
    optimizers = {}
    for moments in ("fp32", "8bit"):
        sparse, dense = llama_parameters(1 if quick else 4, 2048 if quick else 8192)
        groups = [{"params": sparse, "sparse": True}, {"params": dense}]
        optimizers[moments] = AdamS(groups, total_steps=10**6, mask_interval=0, moments=moments, fused=True)
    times = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, repeats, clock)
    held = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    ratio = held["8bit"] / held["fp32"]
    return [
        ratio_row("AdamS step, 8-bit moments", "fp32 moments", times["8bit"], times["fp32"], ""),
        Row("AdamS state, 8-bit moments", "fp32 moments", ratio, ratio, ratio, detail={"bytes": held}),
    ]


def state_row(adams: AdamS, adamw: torch.optim.Optimizer) -> Row:
    """Bytes of state, of what has been stepped."""
    mine, theirs = state_bytes(adams), state_bytes(adamw)
    sparse = sum(p.numel() for p in adams.sparse_params())
    bound = 1 + sparse / 8 / theirs
    detail = {"bytes": {"castlm": mine, "other": theirs}}
    bound_text = f"one bit a sparse weight: {bound:.4f}"
    return Row("AdamS state", "AdamW's", mine / theirs, mine / theirs, mine / theirs, "<= 1.03125", bound_text, detail)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def state_only_rows() -> list[Row]:
    """The second row alone, on one layer: no compilation, no time."""
    sparse, dense = llama_parameters(1, 512)
    adams = AdamS([{"params": sparse, "sparse": True}, {"params": dense}], total_steps=1)
    adamw = torch.optim.AdamW([*sparse, *dense], fused=True)
    adamw.step()
    return [state_row(adams, adamw)]
