"""The gains of structured patterns: perplexity against parameters, bytes and CPU speed; decay against cut.

    python -m benchmarks.structured --runs FOLDER [FOLDER ...] [--plot O] [--json O]
    python -m benchmarks.structured --shape CONFIG [--patterns channels:0.5 ...]
    python -m benchmarks.structured --scores MODEL --calibration TEXT --text TEXT [--patterns channels:0.5 ...]

`--runs` are folders of `castlm compare`; a row of the table is a pattern, score, way to train and number of steps.

`--shape` measures speeds: of plain dense models of the sizes that are left, in turns with the dense one, by
transformers alone on this CPU: a prompt of 256 tokens in one pass, and greedy decoding of 32. Time does not depend on
the values of weights, so the model of that config.json is built with random ones.

`--scores` prunes one-shot by every score, with and without least squares on what remains.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.machine import machine, write_json
from benchmarks.rows import interleaved
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.facts import Facts
from castlm.models.io import load_model
from castlm.oneshot.options import Refinements
from castlm.patterns import parse_pattern
from castlm.runtime.decode import cache_keyword, cache_of
from castlm.starts import prune_oneshot_
from castlm.structured.pattern import sizes_after, sizes_of
from castlm.structured.scores import SCORES

PROMPT, NEW_TOKENS = 256, 32
SEQUENCES = 128
"""Number of sequences of the calibration text."""


class Key(NamedTuple):
    """Settings that the runs of a row share."""

    pattern: str
    start: str
    method: str
    decay_end: float
    """Share of the run in which masked weights decay; 0 of other methods."""
    steps: int

    @property
    def way(self) -> str:
        """The training in words."""
        names = {"cast": f"decay over {self.decay_end:.0%}", "finetune": "cut", "dense": "dense control"}
        return names.get(self.method, self.method)


class Finished(NamedTuple):
    """A finished run, and the size of its model."""

    facts: Facts
    bytes: int
    stored: int
    """Weights in the files."""
    nonzero: int

    @property
    def config(self) -> dict[str, Any]:
        """The options of the run."""
        return self.facts.config or {}


def read_runs(folders: list[str]) -> dict[Key, list[Finished]]:
    """All finished runs by row."""
    found: dict[Key, list[Finished]] = {}
    for file in sorted(file for folder in folders for file in Path(folder).glob("runs/*/model/castlm.json")):
        facts, files = Facts.read(file.parent), list(file.parent.glob("*.safetensors"))
        tensors = [tensor for weights in files for tensor in load_file(weights).values()]
        run = Finished(
            facts,
            bytes=sum(weights.stat().st_size for weights in files),
            stored=sum(tensor.numel() for tensor in tensors),
            nonzero=sum(int(tensor.count_nonzero()) for tensor in tensors),
        )
        method = run.config["method"]
        start = "" if method == "dense" else run.config["init_from"]
        share = run.config["decay_end"] if method == "cast" else 0.0
        found.setdefault(Key(facts.pattern or "dense", start, method, share, run.config["max_steps"]), []).append(run)
    return found


def trained(runs: list[Finished]) -> list[float]:
    """The last perplexity of each run that has one."""
    return [ppl for run in runs if (ppl := run.facts.perplexity.final) is not None]


def one_shot(runs: list[Finished]) -> list[float]:
    """The perplexity of the start of each run that has one."""
    return [ppl for run in runs if (ppl := run.facts.perplexity.one_shot) is not None]


def shown(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def table(runs: dict[Key, list[Finished]]) -> str:
    """The runs as a Markdown table: mean and standard deviation over seeds, and the ratio decay / cut seed by seed."""
    lines = [
        "| pattern | score | training | steps | seeds | one-shot | trained | ln(decay / cut) | weights | non-zero "
        "| bytes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in sorted(runs, key=lambda key: (key.steps, key.pattern, key.start, key.method)):
        finished = runs[key]
        ratio = (
            _log_ratios(finished, runs.get(key._replace(method="finetune", decay_end=0.0), []))
            if key.method == "cast"
            else []
        )
        gap = f"{statistics.fmean(ratio):+.4f} ({', '.join(f'{r:+.4f}' for r in ratio)})" if ratio else ""
        cells = [key.pattern, key.start, key.way, f"{key.steps:,}", str(len(finished))]
        cells += [shown(one_shot(finished)), shown(trained(finished)), gap]
        cells += [f"{size:,}" for size in (finished[0].stored, finished[0].nonzero, finished[0].bytes)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _log_ratios(decayed: list[Finished], cut: list[Finished]) -> list[float]:
    """ln of the perplexity after decay over that after the cut, of the seeds that both have."""
    other = {run.config["seed"]: run for run in cut}
    in_order = sorted(decayed, key=lambda run: run.config["seed"])
    pairs = [(run, other[run.config["seed"]]) for run in in_order if run.config["seed"] in other]
    return [math.log(trained([a])[0] / trained([b])[0]) for a, b in pairs]


def plot(runs: dict[Key, list[Finished]], file: str) -> None:
    """Perplexity over weights that are not zero: a colour for each pattern, a mark for each way to train."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {pattern: f"C{i}" for i, pattern in enumerate(sorted({key.pattern for key in runs}))}
    marks = {"cast": "o", "finetune": "x", "dense": "s"}
    seen: set[str] = set()
    for key, finished in sorted(runs.items()):
        label = f"{key.pattern}, {key.way.split()[0]}"
        x, y = finished[0].nonzero / 1e3, statistics.fmean(trained(finished))
        shown_label = None if label in seen else label
        axes.plot(x, y, marks.get(key.method, "d"), color=colours[key.pattern], label=shown_label)
        seen.add(label)
    axes.set(xlabel="thousand weights that are not zero", ylabel="perplexity", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(file)


def cut_config(config: PretrainedConfig, pattern: str) -> PretrainedConfig:
    """The config of a model after the cut; unchanged for patterns that cut nothing out."""
    made, parsed = copy.deepcopy(config), parse_pattern(pattern)
    if parsed.cuts:
        for name, value in sizes_after(parsed, sizes_of(parsed, config.to_dict())).items():
            setattr(made, name, value)
    return made


@torch.no_grad()
def speeds(config: PretrainedConfig, patterns: list[str], repeats: int = 7) -> dict[str, dict[str, float]]:
    """The speed-up over the dense model of each one, with random weights: median over the rounds."""
    models = {"dense": AutoModelForCausalLM.from_config(config).eval()}
    models |= {pattern: AutoModelForCausalLM.from_config(cut_config(config, pattern)).eval() for pattern in patterns}
    ids = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    passes = {name: lambda m=model: m(ids, use_cache=False) for name, model in models.items()}
    prefill = interleaved(passes, repeats, clock)
    decode = interleaved({name: lambda m=model: _decode(m, ids) for name, model in models.items()}, repeats, clock)
    found = {}
    for pattern in patterns:
        ratios = {}
        for part, times in (("prefill", prefill), ("decode", decode)):
            ratios[part] = statistics.median(a / b for a, b in zip(times["dense"], times[pattern]))
        sizes = [sum(p.numel() for p in models[name].parameters()) for name in (pattern, "dense")]
        found[pattern] = {**ratios, "parameters": sizes[0] / sizes[1]}
    return found


def score_rows(
    model: str, calibration: str, text: str, patterns: list[str], seeds: int, seq_len: int = 256
) -> dict[tuple[str, str], list[list[float]]]:
    """Perplexity after one-shot pruning by pattern and score: without least squares and with, for each seed."""
    loaded = load_model(model)
    documents = open_documents(calibration)
    encoder = Encoder(loaded.tokenizer, assistant_only=False)
    drawn = [calibration_sequences(documents, encoder, SEQUENCES, seq_len, seed)[0] for seed in range(seeds)]
    ids = token_ids(open_documents(text), loaded.tokenizer)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for pattern, score in itertools.product(patterns, SCORES):
        for iterations in (0, None):  # without, and the default
            values = []
            for seed in range(seeds):
                pruned = copy.deepcopy(loaded.model)
                refinements = Refinements(refit_iterations=iterations)
                prune_oneshot_(
                    pruned,
                    score,
                    pattern=parse_pattern(pattern),
                    calibration=drawn[seed],
                    refinements=refinements,
                    seed=seed,
                )
                values.append(perplexity(pruned, ids, seq_len=seq_len).perplexity)
            found.setdefault((pattern, score), []).append(values)
    return found


def _decode(model: PreTrainedModel, ids: torch.Tensor) -> None:
    output = model(ids[:, :8], use_cache=True)
    for _ in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, use_cache=True, **{cache_keyword(model): cache_of(output)})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[], help="folders of castlm compare")
    parser.add_argument("--shape", help="config.json, or a folder with one, of the model whose speed is measured")
    parser.add_argument("--scores", metavar="MODEL", help="model that is pruned by every score")
    parser.add_argument("--calibration", help="text of --scores")
    parser.add_argument("--text", help="held-out text of --scores")
    parser.add_argument("--seeds", type=int, default=2, help="of --scores")
    parser.add_argument("--patterns", nargs="+", default=["channels:0.5", "heads:0.5", "channels:0.75"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--plot", help="file for a plot of the runs (needs matplotlib)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = read_runs(options.runs)
    report: dict[str, Any] = {"machine": machine()}
    if runs:
        print(table(runs))
        if options.plot:
            plot(runs, options.plot)
        report["runs"] = [{**key._asdict(), "perplexity": trained(found)} for key, found in runs.items()]
    if options.shape:
        report["speed"] = speeds(AutoConfig.from_pretrained(options.shape), options.patterns, options.repeats)
        print("| pattern | parameters | prefill | decode |\n|---|---:|---:|---:|")
        for pattern, row in report["speed"].items():
            print(f"| {pattern} | {row['parameters']:.3f} | {row['prefill']:.2f} | {row['decode']:.2f} |")
    if options.scores:
        rows = score_rows(options.scores, options.calibration, options.text, options.patterns, options.seeds)
        print("| pattern | score | one-shot | with least squares |\n|---|---|---:|---:|")
        for (pattern, score), (plain, solved) in rows.items():
            print(f"| {pattern} | {score} | {shown(plain)} | {shown(solved)} |")
        report["scores"] = [{"pattern": p, "score": s, "perplexity": values} for (p, s), values in rows.items()]
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
