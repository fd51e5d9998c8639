"""One-shot pruning against the procedure as published: seconds for the whole model, and perplexity of what comes out.

    python -m benchmarks.oneshot [--model demo] [--text FILE --held-out FILE] [--calibration-sequences 128] [--json OUT]

The published side is written after the papers and follows the published code in what it costs: one sequence a pass, a
Hessian and its inverse for each layer, columns one by one in Python, every block run twice. Same model, same sequences;
both take turns, A B A B, and what they prune is compared weight for weight.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.machine import machine, write_json
from castlm.core.nm import NM
from castlm.core.sparsify import sparse_linears
from castlm.data.calibration import draw_calibration
from castlm.data.tokens import token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.hardware import keep_freed_memory
from castlm.models.io import load_model
from castlm.oneshot.draw import calibration_length
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.source import block_stack
from castlm.oneshot.walk import BlockCall


class _FirstBlock(Exception):  # noqa: N818
    pass


class WandaLayer:
    """Sun et al. 2023: column norms as a running mean over sequences, groups of m columns one by one."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.seen, self.norms = layer, 0, torch.zeros(layer.in_features)

    def take_in(self, x: Tensor) -> None:
        self.norms *= self.seen / (self.seen + 1)
        self.seen += 1
        self.norms += x.flatten(0, -2).t().float().norm(p=2, dim=1) ** 2 / self.seen

    def prune(self, n: int, m: int) -> None:
        weight = self.layer.weight
        score = weight.abs() * self.norms.sqrt()
        mask = torch.zeros_like(score, dtype=torch.bool)
        for j in range(0, score.shape[1], m):
            mask.scatter_(1, j + score[:, j : j + m].topk(m - n, dim=1, largest=False).indices, True)
        weight[mask] = 0


class SparseGPTLayer:
    """Frantar & Alistarh 2023, Alg. 1: a Hessian as a running mean over sequences, columns one by one."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.seen = layer, 0
        self.hessian = torch.zeros(layer.in_features, layer.in_features)

    def take_in(self, x: Tensor) -> None:
        self.hessian *= self.seen / (self.seen + 1)
        self.seen += 1
        x = x.flatten(0, -2).t().float() * (2 / self.seen) ** 0.5
        self.hessian += x @ x.t()

    def prune(self, n: int, m: int, block: int = 128) -> None:
        w = self.layer.weight.clone().float()
        inverse = self.inverse_factor(w)
        for start in range(0, w.shape[1], block):
            stop = min(start + block, w.shape[1])
            here, part, errors = inverse[start:stop, start:stop], w[:, start:stop].clone(), w[:, start:stop] * 0
            mask = torch.zeros_like(part, dtype=torch.bool)
            for j in range(stop - start):
                if j % m == 0:
                    score = part[:, j : j + m] ** 2 / here.diagonal()[j : j + m] ** 2
                    mask.scatter_(1, j + score.topk(m - n, dim=1, largest=False).indices, True)
                column = part[:, j].clone()
                kept = column.masked_fill(mask[:, j], 0)
                errors[:, j] = (column - kept) / here[j, j]
                part[:, j:] -= errors[:, j : j + 1] @ here[j : j + 1, j:]
                w[:, start + j] = kept
            w[:, stop:] -= errors @ inverse[start:stop, stop:]
        self.layer.weight.copy_(w)

    def inverse_factor(self, w: Tensor, damping: float = 0.01) -> Tensor:
        """The upper Cholesky factor of the inverse of the damped Hessian; zeroes the dead columns of `w`."""
        hessian = self.hessian
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        w[:, dead] = 0
        hessian.diagonal().add_(damping * hessian.diagonal().mean())
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


PUBLISHED = {"wanda": WandaLayer, "sparsegpt": SparseGPTLayer}


@torch.no_grad()
def published_(model: PreTrainedModel, method: str, calibration: Tensor, pattern: NM) -> None:
    """Prunes `model` in place the published way. Models whose blocks are all called alike, as LLaMA's."""
    layers, _ = sparse_linears(model, pattern)
    stack, blocks = block_stack(model, layers)
    entering, call = enter_first_block(model, blocks[0], calibration)
    leaving = torch.zeros_like(entering)
    for index, block in enumerate(blocks):
        states = {k: PUBLISHED[method](v) for k, v in layers.items() if k.startswith(f"{stack}.{index}.")}
        hooks = [
            state.layer.register_forward_hook(lambda _, args, __, state=state: state.take_in(args[0]))
            for state in states.values()
        ]
        for i in range(len(entering)):
            leaving[i] = call.run(block, entering[i : i + 1])[0]
        for hook in hooks:
            hook.remove()
        for state in states.values():
            state.prune(pattern.n, pattern.m)
        for i in range(len(entering)):
            leaving[i] = call.run(block, entering[i : i + 1])[0]
        entering, leaving = leaving, entering


def enter_first_block(model: PreTrainedModel, block: nn.Module, calibration: Tensor) -> tuple[Tensor, BlockCall]:
    """(num_sequences, seq_len, hidden), and the further arguments of the block."""
    states: list[Tensor] = []
    calls: list[BlockCall] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        calls.append(BlockCall(args[1:], kwargs))
        raise _FirstBlock

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    for row in calibration:
        try:
            model(input_ids=row[None], use_cache=False)
        except _FirstBlock:
            continue
    hook.remove()
    return torch.cat(states), calls[0]


def timed(prune: Callable[[], object]) -> float:
    started = time.perf_counter()
    prune()
    return time.perf_counter() - started


def differing_share(a: nn.Module, b: nn.Module, pattern: NM) -> float:
    """Share of the mask entries of the pruned layers in which two models differ."""
    pairs = list(zip(sparse_linears(a, pattern)[0].values(), sparse_linears(b, pattern)[0].values()))
    different = sum(int(((x.weight == 0) != (y.weight == 0)).sum()) for x, y in pairs)
    return different / sum(x.weight.numel() for x, _ in pairs)


def compare(dense: PreTrainedModel, method: str, calibration: Tensor, held_out: Tensor, args: Any) -> dict[str, Any]:
    """One row: seconds of both, medians over interleaved rounds, and the perplexities."""
    pattern, seq_len = NM.parse(args.pattern), calibration.shape[1]
    times: dict[str, list[float]] = {"castlm": [], "published": []}
    for _ in range(args.repeats):
        ours, theirs = copy.deepcopy(dense), copy.deepcopy(dense)
        times["castlm"].append(
            timed(lambda model=ours: prune_oneshot_(model, method, pattern=pattern, calibration=calibration))
        )
        if method in PUBLISHED:
            times["published"].append(timed(lambda model=theirs: published_(model, method, calibration, pattern)))
    row: dict[str, Any] = {"method": method, "castlm_seconds": statistics.median(times["castlm"])}
    row["castlm_perplexity"] = perplexity(ours, held_out, seq_len=seq_len).perplexity
    if times["published"]:
        ratios = [b / a for a, b in zip(times["castlm"], times["published"])]
        row["published_seconds"] = statistics.median(times["published"])
        row["speedup"], row["speedup_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
        row["published_perplexity"] = perplexity(theirs, held_out, seq_len=seq_len).perplexity
        row["mask_difference"] = differing_share(ours, theirs, pattern)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("published", "castlm", "speedup", "perplexity", "published", "masks")
    print(f"{'method':10} {heads[0]:>10} {heads[1]:>9} {heads[2]:>21} {heads[3]:>11} {heads[4]:>10} {heads[5]:>8}")
    for row in rows:
        mine = f"{row['castlm_seconds']:8.2f}s"
        if "speedup" not in row:
            print(f"{row['method']:10} {'':10} {mine} {'':21} {row['castlm_perplexity']:11.4f}")
            continue
        speedup = f"{row['speedup']:6.2f}x ({row['speedup_range'][0]:4.2f} .. {row['speedup_range'][1]:4.2f})"
        print(f"{row['method']:10} {row['published_seconds']:9.2f}s {mine} {speedup}", end=" ")
        print(f"{row['castlm_perplexity']:11.4f} {row['published_perplexity']:10.4f} {row['mask_difference']:8.1e}")
    print("masks: share of the mask entries in which the two differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", help="calibration text; the Python language reference when not given")
    parser.add_argument("--held-out", help="text for the perplexity")
    parser.add_argument("--held-out-tokens", type=int, default=16_384)
    parser.add_argument("--methods", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--calibration-sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, help="tokens a sequence; the model's context, at most 2,048")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if bool(args.text) != bool(args.held_out):
        parser.error("pass --text and --held-out, or neither")

    keep_freed_memory()  # as castlm prune does; it serves both sides
    loaded = load_model(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        text, held_out = args.text, args.held_out
        if text is None:
            from benchmarks.texts import write_texts

            text, held_out = map(str, write_texts(Path(scratch)))
        seq_len = args.seq_len or calibration_length(loaded.model)
        calibration = draw_calibration(token_ids(text, loaded.tokenizer), args.calibration_sequences, seq_len, seed=0)
        held_out_ids = token_ids(held_out, loaded.tokenizer, limit=args.held_out_tokens)
    dense = perplexity(loaded.model, held_out_ids, seq_len=seq_len).perplexity
    print(
        f"{loaded.source}, {args.pattern}, {args.calibration_sequences} x {seq_len} tokens, "
        f"{torch.get_num_threads()} threads, median of {args.repeats}; dense perplexity {dense:.4f} over "
        f"{len(held_out_ids):,} tokens, context {seq_len}"
    )
    rows = [compare(loaded.model, method, calibration, held_out_ids, args) for method in args.methods]
    show(rows)
    settings = {"pattern": args.pattern, "num_sequences": args.calibration_sequences, "seq_len": seq_len, "seed": 0}
    content = {"model": loaded.source, **settings, "dense_perplexity": dense, "rows": rows, "machine": machine()}
    write_json(args.json, content)


if __name__ == "__main__":
    main()
