"""Quality, bytes and speed of one model in every format, dense and 2:4: a table and a plot.

    python -m benchmarks.frontier --text TEXT --calibration TEXT [--model demo] [--sparse FOLDER] [--json O] [--plot O]
                                  [--tasks-from FOLDER [--tasks arc_easy] [--limit 200]] [--llama-cpp SOURCES]
    python -m benchmarks.frontier --text TEXT --speeds-only [--llama-cpp SOURCES] ...

Without `--sparse` the 2:4 model is the dense one pruned by SparseGPT, without training; with it, a folder or a run of
castlm train. Weights are rounded as `castlm quantize` rounds them; perplexity and zero-shot accuracy are of the rounded
weights in fp32. Bytes count the tensors in a file: packed layers, embedding and head in bf16 (fp32 for fp32),
norms. Speeds are measured in turns, A B A B, by castlm's kernels, fp32 by transformers alone: greedy decoding of one
sequence, a prompt of 512 tokens with the logits of the last one, and one token of each of 8 sequences, as `castlm
generate` and `castlm serve` compute them. They depend on the formats alone: `--speeds-only` prunes by magnitude, rounds
to the nearest, and leaves quality out.

`--llama-cpp` adds the dense model as llama.cpp's Q8_0 and Q4_0; `benchmarks/llamacpp.py` says what it needs. Their
perplexity and speed are measured in llama.cpp, their zero-shot accuracy with the same rounded weights in fp32.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.machine import machine, write_json
from benchmarks.rows import CLOCKS, interleaved
from castlm.cli.options import result_folder
from castlm.core.sparsify import is_sparse_linear, prune_
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.evaluation.zero_shot import zero_shot
from castlm.formats.packed_file import PackedSpec
from castlm.formats.rounding import Rounded, round_in_groups, round_rows
from castlm.formats.table import FORMATS as VALUES
from castlm.models.io import Loaded, load_model, parameters_in, save_model
from castlm.oneshot.steps.round import quantize_
from castlm.runtime.decode import DecoderState, decoding_method, greedy, prompt_rows, step_together
from castlm.runtime.layers import PackedLinear, onto_kernels_, pack_model_
from castlm.runtime.packed import kept_mask, pack_integers
from castlm.starts import prune_oneshot_


class Format(NamedTuple):
    """A way to store weights."""

    values: str
    """Format of the layers: fp32, bf16, int8, int4 or int3."""
    head: str | None = None
    """int8: of the head, with the embedding tied to it, as in llama.cpp's formats. None: fp32 with fp32, else bf16."""

    def __str__(self) -> str:
        return f"{self.values}, {self.head} head" if self.head else self.values


FORMATS = tuple(map(Format, ("fp32", "bf16", "int8", "int4", "int3")))
WITH_HEADS = tuple(form._replace(head="int8") for form in FORMATS[2:])
PROMPT, NEW_TOKENS = 32, 48
LONG_PROMPT, BATCH = 512, 8

Codes = dict[str, Rounded]
"""The codes of the layers with integers, by name."""


@dataclass
class Point:
    """One row of the table."""

    name: str
    perplexity: float
    num_bytes: int
    tokens_per_second: float = 0.0
    """Decoding one sequence."""
    prompt_per_second: float = 0.0
    """Tokens of a long prompt."""
    batch_per_second: float | None = None
    """Tokens of a batch; None in llama.cpp."""
    zero_shot: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `castlm.evaluation.zero_shot`, of `acc` alone."""

    def __str__(self) -> str:
        return f"{self.name:22} perplexity {self.perplexity:.3f}  {self.num_bytes / 1e6:.1f} MB"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_sparse_linear(m, n)}


def stored_bytes(model: nn.Module, form: Format, sparse: bool) -> int:
    """Bytes of all tensors in a file: layers in the format, the rest in bf16, or in fp32."""
    layers = linears(model)
    inside = {id(layer.weight) for layer in layers.values()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside) * (4 if form.values == "fp32" else 2)
    if form.head:
        table = model.get_output_embeddings().weight
        rest -= table.numel() - 4 * len(table)
    pattern = (2, 4) if sparse else (0, 0)
    return rest + sum(PackedSpec(*layer.weight.shape, *pattern, form.values).num_bytes for layer in layers.values())


def rounded(model: PreTrainedModel, values: str, calibration: Tensor | None) -> tuple[PreTrainedModel, Codes | None]:
    """A copy with layers of `values` and a head of bf16 (fp32 with fp32), in fp32, and the codes of integers.

    Without a calibration text, weights are rounded to the nearest.
    """
    made, codes = copy.deepcopy(model), None
    if values not in ("fp32", "bf16"):
        if calibration is None:
            to_nearest = round_in_groups if VALUES[values].reads_text else round_rows
            codes = {name: to_nearest(layer.weight.detach(), kind=values) for name, layer in linears(made).items()}
        else:
            text = calibration if VALUES[values].reads_text else None
            codes = quantize_(made, values, calibration=text).layers
        for name, layer in linears(made).items():  # embedding, head and norms are bf16; the codes are exact
            layer.weight.data = codes[name].dequantized()
    if values != "fp32":
        exact = {name: layer.weight.detach().clone() for name, layer in linears(made).items()}
        with parameters_in(made, torch.bfloat16):
            pass
        if codes is not None:
            for name, layer in linears(made).items():
                layer.weight.data = exact[name]
    return made, codes


def round_head_(model: PreTrainedModel) -> None:
    """Rounds the head, and the embedding tied to it, to int8, in fp32."""
    table = model.get_output_embeddings().weight
    table.data = round_rows(table.data, "int8").dequantized()


def onto_kernels(model: PreTrainedModel, form: Format, sparse: bool, codes: Codes | None) -> None:
    """The rounded model on castlm's kernels, in place; fp32 stays with transformers."""
    n, m = (2, 4) if sparse else (0, 0)
    if form.values == "bf16":
        pack_model_(model, n, m)
    if codes is None:
        return
    for name, layer in linears(model).items():
        found = codes[name]
        mask = kept_mask(found.dequantized(), n, m) if sparse else None
        packed = pack_integers(found.codes, found.scales, form.values, n, m, mask)
        model.set_submodule(name, PackedLinear(packed.spec, layer.bias).hold_(packed))
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.to(torch.bfloat16), requires_grad=False)
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = table.weight
    onto_kernels_(model, torch.float32, form.head)


class Runner(NamedTuple):
    """A model in one format, ready to be timed. Each function takes token ids (sequences, tokens)."""

    decode: Callable[[Tensor], object]
    """Greedy decoding of `NEW_TOKENS` after a prompt."""
    read: Callable[[Tensor], object]
    """The logits of the last token of one prompt."""
    batch: Callable[[Tensor], object] | None
    """The logits of one token of each sequence; None in llama.cpp."""


Runners = dict[str, Runner]
"""By name of the point."""


def runner_of(model: PreTrainedModel) -> Runner:
    def forward(ids: Tensor) -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    if decoding_method(model) is None:
        return Runner(lambda ids: greedy(model, ids, NEW_TOKENS), forward, forward)

    def read(ids: Tensor) -> object:
        return DecoderState(model, None, ids.shape[1]).read(ids)

    states = [DecoderState(model, None, 1) for _ in range(BATCH)]  # as a server keeps them from token to token

    def batch(ids: Tensor) -> object:
        for state in states:
            state.length = 0
        return step_together(states, ids[:, 0])

    return Runner(lambda ids: greedy(model, ids, NEW_TOKENS), read if prompt_rows(model) else forward, batch)


@torch.no_grad()
def castlm_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    """Dense and 2:4 in every format of castlm, printed as they come."""
    calibration = None
    if not options.speeds_only:
        documents, length = open_documents(options.calibration), options.calibration_len
        calibration, _ = calibration_sequences(
            documents, Encoder(loaded.tokenizer, assistant_only=False), options.sequences, length
        )
    if options.sparse:
        sparse = load_model(result_folder(options.sparse)).model
    else:
        sparse = copy.deepcopy(loaded.model)
        if calibration is None:
            prune_(sparse)
        else:
            prune_oneshot_(sparse, "sparsegpt", calibration=calibration)
    points, runners = [], {}
    for label, model in (("dense", loaded.model), ("2:4", sparse)):
        is_sparse = label == "2:4"
        of_codes: dict[str, tuple[PreTrainedModel, Codes | None]] = {}
        for form in (*(FORMATS[1:] if is_sparse else FORMATS), *WITH_HEADS):
            if form.head:
                made, codes = of_codes.pop(form.values)
                round_head_(made)
            else:
                made, codes = rounded(model, form.values, calibration)
                if codes is not None:  # of integers: the format with an int8 head has the same codes
                    of_codes[form.values] = (copy.deepcopy(made), codes)
            point = Point(f"{label} {form}", math.nan, stored_bytes(made, form, is_sparse))
            if not options.speeds_only:
                point.perplexity = perplexity(made, text, seq_len=options.seq_len).perplexity
            point.zero_shot = accuracy(options, made, loaded)
            print(point, flush=True)
            onto_kernels(made.eval(), form, is_sparse, codes)
            points.append(point)
            runners[point.name] = runner_of(made)
    return points, runners


def llama_cpp_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    """The dense model in llama.cpp, printed as they come."""
    from benchmarks import llamacpp

    points, runners = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(loaded.model, loaded.tokenizer, Path(folder) / "model")
        source = llamacpp.convert(Path(folder) / "model", options.llama_cpp, Path(folder) / "bf16.gguf")
        for form in llamacpp.FORMATS:
            file = llamacpp.quantize(source, form, Path(folder) / f"{form}.gguf")
            runner = llamacpp.LlamaCpp(file, options.seq_len, torch.get_num_threads())
            point = Point(f"dense {form}, llama.cpp", math.nan, llamacpp.tensor_bytes(file))
            if not options.speeds_only:
                point.perplexity = runner.perplexity(text)
            if options.tasks_from:
                point.zero_shot = accuracy(options, load_model(file).model, loaded)
            print(point, flush=True)
            points.append(point)
            runners[point.name] = Runner(
                lambda ids, runner=runner: runner.greedy(ids[0], NEW_TOKENS),
                lambda ids, runner=runner: runner.greedy(ids[0], 1),
                None,
            )
    return points, runners


def accuracy(options: argparse.Namespace, model: PreTrainedModel, loaded: Loaded) -> list[dict[str, Any]]:
    """The `acc` rows of the zero-shot tasks; empty without `--tasks-from`."""
    if not options.tasks_from:
        return []
    shown = zero_shot(model, loaded.tokenizer, options.tasks, folder=options.tasks_from, limit=options.limit)
    return [row for row in shown["results"] if row["metric"] == "acc"]


@torch.inference_mode()
def frontier(options: argparse.Namespace) -> list[Point]:
    """All points, with all speeds measured in turns."""
    loaded = load_model(options.model)
    text = token_ids(options.text, loaded.tokenizer, limit=options.eval_tokens)
    more_points, more_runners = llama_cpp_points(options, loaded, text) if options.llama_cpp else ([], {})
    points, runners = castlm_points(options, loaded, text)
    points, runners = points + more_points, runners | more_runners

    def seconds(of: str, ids: Tensor, names: Iterable[str]) -> dict[str, float]:
        contestants = {name: functools.partial(getattr(runners[name], of), ids) for name in names}
        found = interleaved(contestants, options.rounds, options.clock)
        return {name: statistics.median(rounds) for name, rounds in found.items()}

    decode = seconds("decode", text[None, :PROMPT], runners)
    prompt = seconds("read", text[None, :LONG_PROMPT], runners)
    batch = seconds("batch", text[:BATCH, None], [name for name in runners if name not in more_runners])
    for point in points:
        point.tokens_per_second = NEW_TOKENS / decode[point.name]
        point.prompt_per_second = LONG_PROMPT / prompt[point.name]
        point.batch_per_second = BATCH / batch[point.name] if point.name in batch else None
    return points


def table(points: list[Point]) -> str:
    """Markdown, speeds in units of dense bf16 beside tokens per second."""
    base = next(point for point in points if point.name == "dense bf16")
    tasks = [f" {row['task']}, {row['num_docs']} questions |" for row in base.zero_shot]
    speeds = f"tokens/s | of dense bf16 | prompt of {LONG_PROMPT}, tokens/s | batch of {BATCH}, tokens/s"
    lines = [f"| format | perplexity |{''.join(tasks)} MB | {speeds} |"]
    lines.append("|---|" + "---:|" * (6 + len(tasks)))
    for p in points:
        ratio, quality = p.tokens_per_second / base.tokens_per_second, f"{p.perplexity:.2f}"
        shown = "".join(f" {100 * row['value']:.1f} ± {100 * row['stderr']:.1f} % |" for row in p.zero_shot)
        size, speed = f"{p.num_bytes / 1e6:.1f}", f"{p.tokens_per_second:.1f} | {ratio:.2f}x |"
        many = f" {p.prompt_per_second:.0f} | {'' if p.batch_per_second is None else f'{p.batch_per_second:.0f}'} |"
        lines.append(f"| {p.name} | {'' if math.isnan(p.perplexity) else quality} |{shown} {size} | {speed}{many}")
    return "\n".join(lines)


def plot(points: list[Point], file: str) -> None:
    """Perplexity over bytes, a line for each kind of model and head; labels say the format and tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[Point]] = {}
    for point in points:
        ends = next((end for end in (", llama.cpp", ", int8 head") if point.name.endswith(end)), "")
        lines.setdefault(point.name.split()[0] + ends, []).append(point)
    for label, chosen in lines.items():
        x, y = [point.num_bytes / 1e6 for point in chosen], [point.perplexity for point in chosen]
        axes.plot(x, y, "o-", label=label)
        for point in chosen:
            text = f"{point.name.split()[1].rstrip(',')}, {point.tokens_per_second:.0f}/s"
            axes.annotate(text, (point.num_bytes / 1e6, point.perplexity), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="MB", ylabel="perplexity", xscale="log")
    axes.legend()
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sparse", help="a 2:4 model folder, or a run of castlm train")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text that int4 and int3 are rounded by; needed unless --speeds-only")
    parser.add_argument("--speeds-only", action="store_true")
    parser.add_argument("--sequences", type=int, default=32, help="of calibration tokens")
    parser.add_argument("--calibration-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tasks-from", metavar="FOLDER", help="zero-shot accuracy too, from files (needs lm-eval)")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"])
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--llama-cpp", metavar="SOURCES", help="a checkout of llama.cpp (needs llama-cpp-python)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread beside other work")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--plot", metavar="OUT")
    options = parser.parse_args(arguments)
    if not (options.calibration or options.speeds_only):
        parser.error("name a text with --calibration, or measure with --speeds-only")
    points = frontier(options)
    print(table(points))
    write_json(options.json, {"machine": machine(), "options": vars(options), "points": [asdict(p) for p in points]})
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
