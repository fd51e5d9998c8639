"""Trained rounding against rounding after training, of dense and n:m weights of few bits: a table.

    python -m benchmarks.bits --model stories260K --text TEXT --eval-text HELD_OUT --starts FOLDER [--json O]

Weights of few bits have a scale for each row and 64 columns, as castlm's int4. Both ways train with the teacher, masks
fixed, from castlm's start (dense: from the model itself):

- train, then round: the weights are trained as they are, then rounded as `castlm quantize` does, by GPTQ and
  coordinate descent;
- trained rounding: the start is rounded in that way, and every forward pass uses rounded weights. Gradients pass
  straight through the rounding, and the scales are trained as well (learned step size quantization, arXiv
  1902.08153).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.machine import machine, write_json
from benchmarks.short_run import add_run_options, short_run
from castlm.cli.prune import main as prune
from castlm.data.calibration import calibration_sequences
from castlm.distributed.world import init_world
from castlm.inference import rounding
from castlm.inference.quantize import QuantizeReport, quantize_
from castlm.inference.rounding import INT4_GROUP
from castlm.training.run import Run
from castlm.training.train import set_up

CELLS = (("dense", 4), ("dense", 3), ("2:4", 4), ("3:4", 4), ("3:4", 3), ("5:8", 3), ("6:8", 3))
DENSE_RATE, RATE = 5e-4, 3e-3
"""Learning rates: of dense weights without rounding, which a higher rate makes worse, and of all others."""
MASK_BITS = {"dense": 0.0, "2:4": 0.75, "3:4": 0.5, "5:8": 0.75, "6:8": 0.625}
"""Bits a weight of the mask, as stored by castlm: 3 for a group of 2:4, 2 of 3:4, 6 of 5:8 and 5 of 6:8."""


def bits_per_weight(pattern: str, bits: int) -> float:
    """Values, mask and scales in bf16 of a long row."""
    n, m = (1, 1) if pattern == "dense" else map(int, pattern.split(":"))
    return bits * n / m + MASK_BITS[pattern] + 16 / INT4_GROUP


class _Round(torch.autograd.Function):
    """`clamp(round(w / s)) s` for groups of 64 columns, with the gradients of learned step size quantization."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, sign: Tensor, bounds: tuple[int, int]) -> Tensor:
        rows, columns = weight.shape
        padded = F.pad(weight, (0, log_scale.shape[1] * INT4_GROUP - columns)).view(rows, -1, INT4_GROUP)
        scale = (log_scale.exp() * sign)[..., None]
        steps = padded / scale
        codes = steps.round().clamp_(*bounds)
        ctx.save_for_backward(steps, codes, scale)
        ctx.bounds = bounds
        return (codes * scale).view(rows, -1)[:, :columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        steps, codes, scale = ctx.saved_tensors
        rows, columns = grad.shape
        grad = F.pad(grad, (0, steps[0].numel() - columns)).view_as(steps)
        low, high = ctx.bounds
        inside = (steps >= low - 0.5) & (steps <= high + 0.5)
        of_scale = (grad * torch.where(inside, codes - steps, codes) * scale).sum(-1)  # d / d log |s|
        return (grad * inside).view(rows, -1)[:, :columns], of_scale, None, None


class TrainedRounding(nn.Module):
    """A parametrization that rounds a weight (rows, columns), with trained scales (rows, ceil(columns / 64))."""

    def __init__(self, scales: Tensor, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.log_scale, self.bounds = nn.Parameter(scales.abs().log()), bounds
        self.register_buffer("sign", scales.sign())

    def forward(self, weight: Tensor) -> Tensor:
        return _Round.apply(weight, self.log_scale, self.sign, self.bounds)


def rounded(run: Run, bits: int) -> tuple[nn.Module, QuantizeReport]:
    """A copy of the run's model, rounded by GPTQ and coordinate descent, with its codes and scales."""
    options, text = run.config, run.text
    calibration, _ = calibration_sequences(text.documents, text.encoder, 128, options.data.seq_len, options.data.seed)
    model = copy.deepcopy(run.model)
    with mock.patch.object(rounding, "INT4_RANGE", bounds_of(bits)):
        return model, quantize_(model, "int4", calibration=calibration)


def bounds_of(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@torch.no_grad()
def train_rounding_(run: Run, bits: int) -> None:
    """Rounds the start, and makes every forward pass round; a weight begins where it is in the cell of its code."""
    _, report = rounded(run, bits)
    scales = []
    for name, found in report.layers.items():
        layer = run.model.get_submodule(name)
        of_column = found.scales.repeat_interleave(INT4_GROUP, 1)[:, : found.codes.shape[1]]
        codes = found.codes.float()
        layer.weight.copy_((layer.weight / of_column).clamp(codes - 0.49, codes + 0.49) * of_column)
        made = TrainedRounding(found.scales, bounds_of(bits))
        parametrize.register_parametrization(layer, "weight", made, unsafe=True)
        scales.append(made.log_scale)
    names = [f"{name}.log_scale" for name in report.layers]
    run.optimizer.add_param_group({"params": scales, "param_names": names, "sparse": False})


def start_of(args: argparse.Namespace, pattern: str) -> str:
    """The folder of the model pruned by `castlm prune`, which the seeds share."""
    folder = Path(args.starts) / pattern.replace(":", "of")
    if not folder.exists():
        options = ["--pattern", pattern, "--calibration", args.text, "--seq-len", str(args.seq_len)]
        prune(["--model", args.model, *options, "--output-dir", str(folder)])
    return str(folder)


def cell(args: argparse.Namespace, pattern: str, bits: int, seed: int, trains_rounding: bool) -> dict[str, Any]:
    """One run: its perplexity before rounding (that of the weights in fp32) and after."""
    rate = DENSE_RATE if pattern == "dense" and not trains_rounding else RATE
    with tempfile.TemporaryDirectory() as folder:
        config = short_run(
            args,
            Path(folder) / "run",
            method="dense" if pattern == "dense" else "finetune",
            **({} if pattern == "dense" else {"pattern": pattern, "init_from": start_of(args, pattern)}),
            seed=seed,
            max_steps=args.steps,
            learning_rate=rate,
            hidden_weight=15.0,
        )
        run = set_up(config, init_world("cpu", "full")).begin(announce=False)
        if trains_rounding:
            train_rounding_(run, bits)
        start = run.evaluator.perplexity()
        with run.telemetry, run.saver:
            for _ in range(args.steps):
                run.train_step()
        found = run.evaluator.perplexity()
        trained = None
        if not trains_rounding:
            trained, (model, _) = found, rounded(run, bits)
            run.objective.student = model
            found = run.evaluator.perplexity()
    row = {"pattern": pattern, "bits": bits, "seed": seed, "trained_rounding": trains_rounding, "learning_rate": rate}
    return {**row, "start": start, "unrounded": trained, "perplexity": found}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; perplexities of the seeds, and the gain of their means."""
    lines = [
        "| weights | bits a weight | unrounded | train, then round | trained rounding | gain |",
        "|---|" + "---:|" * 5,
    ]
    for pattern, bits in dict.fromkeys((row["pattern"], row["bits"]) for row in rows):
        after, trained = (
            [r for r in rows if (r["pattern"], r["bits"], r["trained_rounding"]) == (pattern, bits, way)]
            for way in (False, True)
        )
        shown = [", ".join(f"{r['unrounded']:.2f}" for r in after)]
        shown += [", ".join(f"{r['perplexity']:.2f}" for r in found) for found in (after, trained)]
        means = [statistics.mean(r["perplexity"] for r in found) if found else math.nan for found in (after, trained)]
        size = f"{bits_per_weight(pattern, bits):.2f}"
        lines.append(f"| {pattern} int{bits} | {size} | {' | '.join(shown)} | {1 - means[1] / means[0]:.1%} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--starts", required=True, help="folder for the pruned models")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cells", nargs="+", default=[f"{pattern}/{bits}" for pattern, bits in CELLS])
    options = parser.parse_args(arguments)
    rows = []
    for seed, name, way in itertools.product(range(options.seeds), options.cells, (False, True)):
        pattern, _, bits = name.rpartition("/")
        rows.append(cell(options, pattern, int(bits), seed, way))
        print(rows[-1], flush=True)
        write_json(options.json, {"machine": machine(), "options": vars(options), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
