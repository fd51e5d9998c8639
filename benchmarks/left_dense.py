"""Whether it pays to leave sensitive layers dense, or at a milder pattern, at equal bytes and products: a table.

    python -m benchmarks.left_dense --model stories260K --text TEXT --eval-text HELD_OUT [--steps 100 400] [--json O]

Layers are chosen by the error of their output at 2:4, relative to the output, for each of their weights. Either up to
5 % of all weights are left dense, or up to 10 % are 3:4, with the same products and nearly the same bytes. Then all
three models are fine-tuned with fixed masks, as castlm train --method finetune does.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.machine import machine, write_json
from benchmarks.short_run import add_run_options, short_run
from castlm.core.nm import NM
from castlm.core.sparsify import is_sparse_linear
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder
from castlm.models.io import load_model, save_model
from castlm.oneshot.methods import change_basis_, prune_oneshot_
from castlm.oneshot.options import BasisOptions, Refinements
from castlm.training.train import train

SHARES = {"2:4": 0.0, "the chosen dense": 0.05, "the chosen 3:4": 0.10}
"""By model, the largest share of weights that is chosen."""
BITS = {"2:4": 8.75, "the chosen dense": 16.0, "the chosen 3:4": 12.5}
"""Bits of a chosen weight in bf16 with its mask."""
PRODUCTS = {"2:4": 0.5, "the chosen dense": 1.0, "the chosen 3:4": 0.75}


def chosen(errors: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """Layers by falling error for each weight, as many as fit into `share` of all weights."""
    left, found = share * sum(sizes.values()), []
    for name in sorted(errors, key=lambda name: errors[name] / sizes[name], reverse=True):
        if sizes[name] <= left:
            found.append(name)
            left -= sizes[name]
    return found


def starts(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Prunes the three models into `folder`; returns their chosen layers, bits and products a weight."""
    loaded = load_model(args.model)
    documents = open_documents(args.text)
    encoder = Encoder(loaded.tokenizer, assistant_only=False)
    calibration, _ = calibration_sequences(documents, encoder, args.sequences, args.seq_len)
    change_basis_(loaded.model, calibration, BasisOptions(rotate="off"))
    sizes = {n: m.weight.numel() for n, m in loaded.model.named_modules() if is_sparse_linear(m, n)}

    def prune(model: Any, pattern: str, layers: list[str]) -> dict[str, float]:
        def is_one(module: nn.Module, name: str) -> bool:
            return name in layers

        report = prune_oneshot_(
            model,
            "sparsegpt",
            pattern=NM.parse(pattern),
            calibration=calibration,
            refinements=Refinements(),
            effort="best",
            filter_fn=is_one,
        )
        return {layer.name: layer.error for layer in report.layers}

    errors = prune(copy.deepcopy(loaded.model), "2:4", list(sizes))
    found = {}
    for name, share in SHARES.items():
        model, picked = copy.deepcopy(loaded.model), chosen(errors, sizes, share)
        prune(model, "2:4", [layer for layer in sizes if layer not in picked])
        if name == "the chosen 3:4":
            prune(model, "3:4", picked)
        save_model(model, loaded.tokenizer, folder / name)
        part = sum(sizes[layer] for layer in picked) / sum(sizes.values())
        mean = {k: v["2:4"] + part * (v[name] - v["2:4"]) for k, v in (("bits", BITS), ("products", PRODUCTS))}
        found[name] = {"layers": picked, **mean}
    return found


def trained(
    args: argparse.Namespace, start: Path, name: str, layers: list[str], steps: int, seed: int
) -> dict[str, float]:
    """The perplexities of the start and of the result."""
    left_dense = {"left_dense": tuple(layers)} if name == "the chosen dense" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = short_run(
            args,
            Path(folder) / "run",
            method="finetune",
            pattern="3:4" if name == "the chosen 3:4" else "2:4",  # a mask keeps every zero of the start
            init_from=str(start),
            seed=seed,
            max_steps=steps,
            learning_rate=args.rate,
            **left_dense,
        )
        found = train(config).perplexity
    return {"one_shot": found.one_shot, "perplexity": found.pruned}


def table(models: Mapping[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Markdown; perplexities of the seeds."""
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    lines = [f"| layers | bits | products | one-shot | {' | '.join(f'{number} steps' for number in steps)} |"]
    lines.append("|---|" + "---:|" * (3 + len(steps)))
    for name, of in models.items():
        mine = [row for row in rows if row["model"] == name]
        cells = [", ".join(f"{r['perplexity']:.3f}" for r in mine if r["steps"] == number) for number in steps]
        one_shot = statistics.mean(row["one_shot"] for row in mine)
        lines.append(f"| {name} | {of['bits']:.2f} | {of['products']:.3f} | {one_shot:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--sequences", type=int, default=128, help="of calibration text")
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        models, rows = starts(options, Path(folder)), []
        print(models, flush=True)
        for steps, seed, name in itertools.product(options.steps, range(options.seeds), models):
            found = trained(options, Path(folder) / name, name, models[name]["layers"], steps, seed)
            rows.append({"model": name, "steps": steps, "seed": seed, **found})
            print(rows[-1], flush=True)
            write_json(options.json, {"machine": machine(), "options": vars(options), "models": models, "rows": rows})
        print(table(models, rows))


if __name__ == "__main__":
    main()
