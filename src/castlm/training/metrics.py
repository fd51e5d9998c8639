"""The figures of an evaluation during a run: perplexity of the held-out tokens, and the state of the masks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castlm.core.blocks import is_tower
from castlm.core.nm import NM, Pattern, unpack_mask
from castlm.core.rounding import rounded_layers
from castlm.core.sparsify import num_weights
from castlm.data.scored import ScoredText
from castlm.devices import device_of
from castlm.distributed.sharding import reshard_
from castlm.facts import Histogram, TrainedRounding
from castlm.hardware import autocast
from castlm.training.objective import Objective
from castlm.world import World
from castlm_runtime.packed import PackedSpec

HISTOGRAM_EDGES = tuple(10 ** (quarter / 4) for quarter in range(-48, 5))
"""Edges of the bins of a `masked_histogram`: 1e-12 to 10, four bins to a decade."""


@torch.no_grad()
def held_out_loss(
    objective: Objective,
    text: ScoredText,
    seq_len: int,
    batch: int,
    precision: str,
    world: World,
    part: Literal["ce", "kl"] = "ce",
) -> Tensor:
    """The mean loss of a token that counts, in nats, () float64: `exp` of the cross-entropy is the perplexity.

    All ranks share the sequences of `seq_len`, which are those of `castlm.evaluation.perplexity.perplexity` with its
    default stride. The result is inf or NaN if the model diverged.

    Args:
        batch: sequences per rank and forward pass.
        part: the cross-entropy, or the KL divergence from the teacher to the student.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    objective.eval()
    with autocast(world.device, precision):
        for tensors in sequences(text, seq_len, batch, world):
            on_device = {name: tensor.to(world.device) for name, tensor in tensors.items()}
            loss: Tensor = getattr(objective(num_tokens=1, ce_only=part == "ce", **on_device), part)
            sums += torch.stack([loss.double(), (on_device["labels"] != -100).sum().double()])
    reshard_(objective)  # FSDP leaves the parameters of the root whole after a forward pass
    total, count = world.sum(sums)
    mean: Tensor = total / count
    return mean


def sequences(text: ScoredText, seq_len: int, batch: int, world: World) -> Iterator[dict[str, Tensor]]:
    """This rank's sequences of `text` as batches of `batch` rows; see `ScoredText.batch`.

    Every rank gets the same number of batches; the last ones are filled up with rows that score nothing. Documents
    scored one by one are sorted by length, and a batch is as long as its longest document.
    """
    all_sequences = text.sequences(seq_len, seq_len)
    if text.by_document:
        # the longest first: a batch wastes little on filler
        all_sequences.sort(key=lambda sequence: sequence.begin - sequence.end)
    per_step = batch * world.size
    for step in range(0, len(all_sequences), per_step):
        width = all_sequences[step].end - all_sequences[step].begin if text.by_document else seq_len
        start = step + world.rank * batch  # 2 ranks with batches of 8: rank 1 takes 8 to 15 of 16
        yield text.batch(all_sequences[start : start + batch], width, rows=batch)


@torch.no_grad()
def mask_figures(
    masks: Mapping[Tensor, Tensor], initial_masks: Sequence[Tensor], flips: int, world: World
) -> dict[str, float]:
    """Sparse-weight ratio, flip rates and the largest masked weight over all ranks (CAST, arXiv 2509.25996, App. C).

    Args:
        masks: this rank's part of each sparse weight with its mask, True = kept.
        initial_masks: the masks of step 0 as bits, packed by `pack_mask`, in the same order.
        flips: number of mask entries of this rank that the last refresh changed.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    largest = torch.zeros((), device=world.device)
    for (weight, mask), packed in zip(masks.items(), initial_masks):
        magnitude = weight.abs()
        kept, total = (magnitude * mask).sum(dtype=torch.float64), magnitude.sum(dtype=torch.float64)
        flipped = (mask != unpack_mask(packed, mask.shape[-1])).sum().double()
        entries = torch.tensor(float(mask.numel()), device=mask.device)
        sums[:4] += torch.stack([kept, total, flipped, entries.double()])  # |W * M|_1, |W|_1, |M xor M_0|, |M|
        if magnitude.numel():
            largest = torch.maximum(largest, (magnitude * ~mask).amax())
    sums[4] = flips  # counted by the refresh itself, on this rank
    kept_sum, total_sum, flipped_sum, entries_sum, flips_sum = world.sum(sums).tolist()
    if world.mesh is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return {
        "sparse_weight_ratio": kept_sum / total_sum,  # S_t = |W * M|_1 / |W|_1, which goes to 1
        "initial_flip_rate": flipped_sum / entries_sum,
        "flip_rate": flips_sum / entries_sum,
        "largest_masked": float(largest),
    }


@torch.no_grad()
def masked_histogram(masks: Mapping[Tensor, Tensor], world: World) -> Histogram | None:
    """Counts of masked weights by magnitude over all ranks, each weight once, in bins of a quarter of a decade.

    None without `masks`.
    """
    if not masks:
        return None
    num_bins = len(HISTOGRAM_EDGES) - 1
    counts = torch.zeros(num_bins + 1, dtype=torch.float64, device=world.device)
    lowest = round(4 * math.log10(HISTOGRAM_EDGES[0]))
    for weight, mask in masks.items():
        masked = weight[~mask].abs().float()
        # four bins to a decade: bin = floor(4 log10 |w|), counted from the lowest edge
        bins = ((masked[masked > 0].log10() * 4).floor() - lowest).clamp(0, num_bins - 1)
        counts[1:] += torch.bincount(bins.long(), minlength=num_bins)
        counts[0] += (masked == 0).sum()
    zeros, *rest = (world.sum(counts).long() // world.num_replicas).tolist()  # fp64 counts exactly to 2^53
    return Histogram(edges=list(HISTOGRAM_EDGES), zeros=zeros, counts=rest)


@torch.no_grad()
def masked_shares(masks: Mapping[Tensor, Tensor], world: World) -> list[float]:
    """The share of each layer's squared weights that its mask removes, `|W * ~mask|^2 / |W|^2`, over all ranks."""
    if not masks:
        return []
    sums = [torch.stack([(w * ~mask).square().sum(), w.square().sum()]).double() for w, mask in masks.items()]
    shares: list[list[float]] = world.sum(torch.stack(sums)).tolist()
    return [masked / whole if whole else 0.0 for masked, whole in shares]


def trained_rounding(model: nn.Module, sparse: Collection[str], pattern: Pattern) -> TrainedRounding | None:
    """The format of the layers with trained rounding, their number, and the bits of a weight with mask and scales.

    None without such layers.

    Args:
        sparse: the names of the n:m layers.
    """
    layers = list(rounded_layers(model))
    if not layers:
        return None
    kind, total, stored = f"int{layers[0][2].bits}", 0, 0
    for name, layer, _ in layers:
        n, m = (pattern.n, pattern.m) if name in sparse and isinstance(pattern, NM) else (0, 0)
        size = num_weights(layer)
        total += size
        stored += 8 * PackedSpec(size // layer.in_features, layer.in_features, n, m, kind).num_bytes
    return TrainedRounding(kind=kind, layers=len(layers), bits_per_weight=stored / total)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak of a device in FLOP/s; None if it is not known, as for CPUs and fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    record = device_of(torch.cuda.get_device_name(device))
    return None if record is None else record.bf16_flops


def forward_flops(parameters: Iterable[tuple[Tensor, str]], model_config: Any, seq_len: int) -> float:
    """FLOPs of one token in a forward pass: `2 N + 4 L H T`; a training step takes three times as many.

    Model FLOP/s utilization (MFU, arXiv 2204.02311) is their number per second divided by the peak of the device.

    N is the number of weights in matrices (only the experts that a token uses, no vision tower, the input embedding
    only if it is also the head), L the number of transformer blocks, H the hidden size and T the sequence length.
    Recomputed activations do not count.

    Args:
        parameters: all parameters with their names. Sharded ones count in full.
    """
    config = model_config.get_text_config()
    embedding: int = 0 if model_config.tie_word_embeddings else config.vocab_size * config.hidden_size
    active = getattr(config, "num_experts_per_tok", 1)
    matrices: float = sum(
        # (64, 2816, 2048) with 8 active experts counts an eighth.
        p.numel() * (min(1.0, active / len(p)) if p.dim() == 3 else 1)
        for p, name in parameters
        if p.dim() > 1 and name.endswith(("weight", "weight.original")) and not is_tower(name)
    )
    attention: int = 4 * config.num_hidden_layers * config.hidden_size * seq_len
    return 2 * (matrices - embedding) + attention
