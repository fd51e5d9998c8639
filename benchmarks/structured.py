"""Cuts of channels and heads: the speed of the smaller models, and the scores of units.

    python -m benchmarks.structured --shape CONFIG [--units channels:0.5 ...]
    python -m benchmarks.structured --scores MODEL --calibration TEXT --text TEXT [--units channels:0.5 ...]

`--shape` measures speeds: of plain dense models of the sizes that are left, in turns with the dense one, by
transformers alone on this CPU: a prompt of 256 tokens in one pass, and greedy decoding of 32. Time does not depend on
the values of weights, so the model of that config.json is built with random ones.

`--scores` cuts by every score, with and without least squares on what remains.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.caches import cache_keyword, cache_of
from benchmarks.machine import machine, write_json
from benchmarks.rows import interleaved
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.models.io import load_model
from castlm.structured.cut import cut_units
from castlm.structured.scores import SCORES
from castlm.structured.units import Units, sizes_after, sizes_of

PROMPT, NEW_TOKENS = 256, 32
SEQUENCES = 128
"""Number of sequences of the calibration text."""


def shown(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def cut_config(config: PretrainedConfig, text: str) -> PretrainedConfig:
    """The config of a model after the cut."""
    made, units = copy.deepcopy(config), Units.parse(text)
    for name, value in sizes_after(units, sizes_of(units, config.to_dict())).items():
        setattr(made, name, value)
    return made


@torch.no_grad()
def speeds(config: PretrainedConfig, cuts: list[str], repeats: int = 7) -> dict[str, dict[str, float]]:
    """The speed-up over the dense model of each one, with random weights: median over the rounds."""
    models = {"dense": AutoModelForCausalLM.from_config(config).eval()}
    models |= {text: AutoModelForCausalLM.from_config(cut_config(config, text)).eval() for text in cuts}
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    passes = {name: lambda m=model: m(ids, use_cache=False) for name, model in models.items()}
    prefill = interleaved(passes, repeats, clock)
    decode = interleaved({name: lambda m=model: _decode(m, ids) for name, model in models.items()}, repeats, clock)
    found = {}
    for text in cuts:
        ratios = {}
        for part, times in (("prefill", prefill), ("decode", decode)):
            ratios[part] = statistics.median(a / b for a, b in zip(times["dense"], times[text]))
        sizes = [sum(p.numel() for p in models[name].parameters()) for name in (text, "dense")]
        found[text] = {**ratios, "parameters": sizes[0] / sizes[1]}
    return found


def score_rows(
    model: str, calibration: str, text: str, cuts: list[str], seeds: int, seq_len: int = 256
) -> dict[tuple[str, str], list[list[float]]]:
    """Perplexity after a cut by units and score: without least squares and with, for each seed."""
    loaded = load_model(model)
    documents = open_documents(calibration)
    encoder = Encoder(loaded.tokenizer, assistant_only=False)
    drawn = [calibration_sequences(documents, encoder, SEQUENCES, seq_len, seed)[0] for seed in range(seeds)]
    ids = token_ids(open_documents(text), loaded.tokenizer)
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for units, score, refits in itertools.product(cuts, SCORES, (False, True)):
        values = []
        for tokens in drawn:
            small, _, _ = cut_units(copy.deepcopy(loaded.model), units, score, calibration=tokens, refits=refits)
            values.append(perplexity(small, ids, seq_len=seq_len).perplexity)
        rows.setdefault((units, score), []).append(values)
    return rows


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> None:
    output = model(ids[:, :8], use_cache=True)
    for _ in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, use_cache=True, **{cache_keyword(model): cache_of(output)})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="config.json, or a folder with one, of the model whose speed is measured")
    parser.add_argument("--scores", metavar="MODEL", help="model that is cut by every score")
    parser.add_argument("--calibration", help="text of --scores")
    parser.add_argument("--text", help="held-out text of --scores")
    parser.add_argument("--seeds", type=int, default=2, help="of --scores")
    parser.add_argument("--units", nargs="+", default=["channels:0.5", "heads:0.5", "channels:0.75"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"machine": machine()}
    if options.shape:
        report["speed"] = speeds(AutoConfig.from_pretrained(options.shape), options.units, options.repeats)
        print("| units | parameters | prefill | decode |\n|---|---:|---:|---:|")
        for units, row in report["speed"].items():
            print(f"| {units} | {row['parameters']:.3f} | {row['prefill']:.2f} | {row['decode']:.2f} |")
    if options.scores:
        rows = score_rows(options.scores, options.calibration, options.text, options.units, options.seeds)
        print("| units | score | one-shot | with least squares |\n|---|---|---:|---:|")
        for (units, score), (plain, solved) in rows.items():
            print(f"| {units} | {score} | {shown(plain)} | {shown(solved)} |")
        report["scores"] = [{"units": u, "score": s, "perplexity": values} for (u, s), values in rows.items()]
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
