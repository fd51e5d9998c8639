"""2:4 masks against the usual ways to make them: topk + scatter, apex's pattern product, torch's pruning sparsifier."""

from __future__ import annotations

import statistics
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier

from benchmarks.rows import Row, interleaved, llama_parameters, ratio_row
from castlm.core.adams import AdamS
from castlm.core.nm import nm_mask, rank_mask

PATTERNS = torch.tensor([[float(j in kept) for j in range(4)] for kept in combinations(range(4), 2)])  # (6, 4)


def topk_mask(weight: Tensor) -> Tensor:
    groups = weight.abs().view(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(2, dim=1).indices, True).view(weight.shape)


def apex_mask(weight: Tensor) -> Tensor:
    """apex.contrib.sparsity `m4n2_1d`: the best of the six patterns by their product with the magnitudes."""
    patterns = PATTERNS.to(weight.device)
    best = torch.argmax(weight.abs().view(-1, 4) @ patterns.t(), dim=1)
    return patterns[best].view(weight.shape)


def sparsifier(weight: Tensor) -> WeightNormSparsifier:
    """torch.ao's sparsifier: `step()` computes the mask of one layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    made = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    made.prepare(nn.Sequential(layer), [{"tensor_fqn": "0.weight"}])
    return made


@torch.no_grad()
def one_weight_rows(repeats: int = 15, clock: str = "wall", shape: tuple[int, int] = (1536, 576)) -> list[Row]:
    """`nm_mask` with its NaN check, by its kernel and by its fallback in torch."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nm_mask(weight), topk_mask(weight))
    torch_ao = sparsifier(weight)
    contestants = {
        "kernel": lambda: nm_mask(weight),
        "torch": lambda: rank_mask(weight.abs(), 2, 4),
        "topk": lambda: topk_mask(weight),
        "apex": lambda: apex_mask(weight),
        "torch.ao": torch_ao.step,
    }
    times = interleaved(contestants, repeats, clock)
    against = {"topk": "topk + scatter", "apex": "apex's m4n2_1d", "torch.ao": "torch.ao WeightNormSparsifier"}
    rows = []
    for mine, part in (("kernel", "nm_mask"), ("torch", "its uncompiled form in torch")):
        for name, text in against.items():
            goal = ">= 8" if (mine, name) == ("kernel", "topk") else ">= 1"
            rows.append(ratio_row(f"{part}, {shape[0]} x {shape[1]}", text, times[mine], times[name], goal))
    return rows


@torch.no_grad()
def refresh_rows(quick: bool, repeats: int = 7, device: str = "cpu", clock: str = "wall") -> list[Row]:
    """A refresh of all masks of AdamS, with counted flips and a check for NaN, against computing bool masks alone."""
    sparse, _ = llama_parameters(2 if quick else 30, 8, device)
    adams = AdamS([{"params": sparse, "sparse": True}], total_steps=1, fused=True)
    times = interleaved(
        {
            "castlm": lambda: adams.refresh_masks(adams.param_groups[0]),
            "topk": lambda: [topk_mask(p) for p in sparse],
            "pass": lambda: [p.abs().sum() for p in sparse],
            "read": lambda: [p.sum() for p in sparse],
        },
        repeats,
        clock,
    )
    assert all(torch.equal(adams.mask(p), topk_mask(p)) for p in sparse[:7])
    part = f"mask refresh, {sum(p.numel() for p in sparse) / 1e6:.0f}M weights"
    read = statistics.median(times["read"])
    bound = f"one read of W, as fast as W.sum(): {statistics.median(times['castlm']) / read:.2f}x of it"
    return [
        ratio_row(part, "topk + scatter", times["castlm"], times["topk"], ">= 40", bound=bound),
        ratio_row(part, "abs().sum() of the same", times["castlm"], times["pass"], "<= 3"),
    ]
