"""Quality, bytes and speed of one model in every format, dense and n:m, beside what a user would otherwise run.

    python -m benchmarks.frontier --text TEXT --calibration TEXT [--model demo] [--sparse FOLDER ...] [--json O]
                                  [--heads int8 int6 int4] [--plot O]
                                  [--tasks-from FOLDER [--tasks arc_easy] [--limit 200]]
    python -m benchmarks.frontier --text TEXT --calibration TEXT --quality-only --json QUALITY ...
    python -m benchmarks.frontier --text TEXT --speeds-only [--pattern 2:4 32:64] [--quality QUALITY ...] ...

Without `--sparse` the sparse models are the dense one pruned to each `--pattern` by SparseGPT, without training; with
it, folders or runs of castlm train. Weights are rounded as `castlm quantize` rounds them; perplexity and zero-shot
accuracy are of the rounded weights in fp32. Bytes count the tensors in a file: packed layers, embedding and head in
bf16 (fp32 for fp32), norms. Speeds are measured by `benchmarks.speeds` in turns, A B A B, fp32 by transformers alone:
one token after 32, a prompt of 512 tokens, and one token of each of 8 sequences of 512. They depend on the formats
alone: `--speeds-only` prunes by magnitude, rounds to the nearest, and leaves quality out, or takes it from files of
`--quality-only`, which may run for long on a busy machine.

The peers are the dense model in OpenVINO, in llama.cpp, in ik_llama.cpp and in torch's dynamic int8; those that are
not installed are named and left out.
- `--openvino PYTHON` (or OPENVINO_PYTHON): an environment with openvino, nncf, optimum-intel; see `openvino_peer.py`.
- `--llama-cpp SOURCES` (or LLAMA_CPP): its sources, beside llama-cpp-python in this environment; see `llamacpp.py`.
- `--ik-llama PYTHON` (or IK_LLAMA_PYTHON): an environment with it; see `ik_llama_peer.py`. Needs `--llama-cpp`, too.
Their perplexity and speed are measured in their own program, with activations as it takes them. The last table holds
every sparse format against the fastest dense one of all, castlm's and the peers', in each kind of work.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import gguf_files
from benchmarks.caches import cache_keyword, cache_of
from benchmarks.machine import machine, write_json
from benchmarks.peer_process import MissingPeerError, PeerProcess, has_packages
from benchmarks.speeds import TOKEN, Castlm, Contestant, LlamaCpp, Peer, in_turns, num_tokens
from castlm.cli.command_line import result_folder
from castlm.core.nm import NM
from castlm.core.sparsify import is_sparse_linear, prune_
from castlm.data.calibration import calibration_sequences
from castlm.data.documents import open_documents
from castlm.data.tokens import Encoder, token_ids
from castlm.evaluation.perplexity import perplexity
from castlm.evaluation.zero_shot import zero_shot
from castlm.export.packed import groups_of, pattern_of
from castlm.formats.rounding import Rounded, round_in_groups, round_rows, round_table
from castlm.models.io import Loaded, load_model, parameters_in, save_model
from castlm.oneshot.methods import prune_oneshot_
from castlm.oneshot.steps.round import quantize_
from castlm.packed.in_engine import is_packed, model_in_engine
from castlm.packed.layers import PackedLinear, onto_kernels_, pack_model_
from castlm.packed.tensor import kept_mask, pack_integers
from castlm_runtime.formats import FORMATS as VALUES
from castlm_runtime.formats import HEADS
from castlm_runtime.packed import PackedSpec


class Format(NamedTuple):
    """A way to store weights."""

    values: str
    """Format of the layers: fp32, bf16, int8, int4 or int3."""
    head: str | None = None
    """Format of head and embedding, int8, int6 or int4. None: fp32 with fp32, else bf16."""

    def __str__(self) -> str:
        return f"{self.values}, {self.head} head" if self.head else self.values


FORMATS = tuple(map(Format, ("fp32", "bf16", "int8", "int4", "int3")))
PROMPT, LONG_PROMPT, BATCH = 32, 512, 8
ROOM = num_tokens(BATCH, LONG_PROMPT)
"""Tokens of all sequences together."""


class Work(NamedTuple):
    """What is timed: of `count` sequences of `length` tokens, reading them or one token of each after them."""

    name: str
    count: int
    length: int
    is_prompt: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed in the time."""
        return self.length if self.is_prompt else self.count


WORK = {
    "decode": Work("decoding", 1, PROMPT, False),
    "read": Work(f"prompt of {LONG_PROMPT}", 1, LONG_PROMPT, True),
    "batch": Work(f"batch of {BATCH}", BATCH, LONG_PROMPT, False),
}

Codes = dict[str, Rounded]
"""The codes of the layers with integers, by name."""


@dataclass
class Point:
    """One row of the table."""

    name: str
    perplexity: float
    num_bytes: int
    pattern: str | None = None
    """n:m; None is dense."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of every round, by the key of `WORK`."""
    zero_shot: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `castlm.evaluation.zero_shot`, of `acc` alone."""

    def per_second(self, work: str) -> float:
        """Tokens per second, the median of the rounds; NaN if no speed was measured."""
        if work not in self.seconds:
            return math.nan
        return WORK[work].num_tokens / statistics.median(self.seconds[work])

    def __str__(self) -> str:
        return f"{self.name:22} perplexity {self.perplexity:.3f}  {self.num_bytes / 1e6:.1f} MB"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_sparse_linear(m, n)}


def tables(model: nn.Module) -> list[nn.Parameter]:
    """The weights of head and embedding: one where they are tied."""
    return list(
        {id(of.weight): of.weight for of in (model.get_output_embeddings(), model.get_input_embeddings())}.values()
    )


def stored_bytes(model: nn.Module, form: Format, pattern: NM | None) -> int:
    """Bytes of all tensors in a file: layers in the format, the rest in bf16, or in fp32."""
    layers = linears(model)
    inside = {id(layer.weight) for layer in layers.values()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside) * (4 if form.values == "fp32" else 2)
    if form.head:
        rest -= sum(2 * table.numel() - PackedSpec(*table.shape, 0, 0, form.head).num_bytes for table in tables(model))
    n, m = (pattern.n, pattern.m) if pattern else (0, 0)
    return rest + sum(PackedSpec(*layer.weight.shape, n, m, form.values).num_bytes for layer in layers.values())


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


def round_head_(model: PreTrainedModel, kind: str, calibration: Tensor | None) -> None:
    """Rounds head and embedding, in fp32; the head by the hidden states of the calibration text, if it reads one."""
    hessian = None
    if calibration is not None and VALUES[kind].reads_text:
        states = [model.base_model(part[None], use_cache=False)[0][0] for part in calibration]
        hessian = sum(x.T @ x for x in states)
    for table in tables(model):  # the head first
        table.data, hessian = round_table(table.data, kind, hessian).dequantized(), None


def onto_kernels(model: PreTrainedModel, form: Format, pattern: NM | None, codes: Codes | None) -> None:
    """The rounded model on castlm's kernels, in place; fp32 stays with transformers."""
    n, m = (pattern.n, pattern.m) if pattern else (0, 0)
    if form.values == "bf16":
        pack_model_(model, n, m)
    if codes is None:
        return
    for name, layer in linears(model).items():
        found = codes[name]
        mask = kept_mask(found.dequantized(), n, m) if pattern else None
        packed = pack_integers(found.codes, found.scales, form.values, n, m, mask)
        model.set_submodule(name, PackedLinear(packed.spec, layer.bias).hold_(packed))
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.to(torch.bfloat16), requires_grad=False)
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = table.weight
    onto_kernels_(model, torch.float32, form.head)


Runners = dict[str, Contestant]
"""By name of the point."""


class Transformers:
    """A model of transformers, with its own cache."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.keyword = model, cache_keyword(model)

    def _forward(self, ids: np.ndarray) -> float:
        began = time.perf_counter()
        output = self.model(
            torch.from_numpy(ids), use_cache=True, logits_to_keep=1, **{self.keyword: getattr(self, "cache", None)}
        )
        self.cache = cache_of(output)
        return time.perf_counter() - began

    def read(self, ids: np.ndarray) -> float:
        self.cache, self.count = None, len(ids)
        return self._forward(ids)

    def steps(self, count: int) -> float:
        return sum(self._forward(np.full((self.count, 1), TOKEN)) for _ in range(count)) / count


def runner_of(model: PreTrainedModel) -> Contestant:
    return Castlm(model_in_engine(model), "bf16", ROOM) if is_packed(model) else Transformers(model)


@torch.no_grad()
def castlm_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    """Dense and n:m in every format of castlm, printed as they come."""
    calibration = None
    if not options.speeds_only:
        documents, length = open_documents(options.calibration), options.calibration_len
        calibration, _ = calibration_sequences(
            documents, Encoder(loaded.tokenizer, assistant_only=False), options.sequences, length
        )
    models: list[tuple[NM | None, PreTrainedModel]] = [(None, loaded.model)]
    for folder in map(result_folder, options.sparse):
        models.append((groups_of(folder, pattern_of(folder, None)), load_model(folder).model))
    for pattern in map(NM.parse, () if options.sparse else options.pattern):
        sparse = copy.deepcopy(loaded.model)
        if calibration is None:
            prune_(sparse, pattern)
        else:
            prune_oneshot_(sparse, "sparsegpt", pattern=pattern, calibration=calibration)
        models.append((pattern, sparse))
    points, runners = [], {}
    for pattern, model in models:
        label = str(pattern or "dense")
        of_codes: dict[str, tuple[PreTrainedModel, Codes | None]] = {}
        with_heads = [form._replace(head=head) for head in options.heads for form in FORMATS[2:]]
        forms = (*(FORMATS[1:] if pattern else FORMATS), *with_heads)
        chosen = [form for form in forms if not options.formats or str(form) in options.formats]
        for number, form in enumerate(chosen):
            if form.values not in of_codes:
                of_codes[form.values] = rounded(model, form.values, calibration)
            made, codes = of_codes[form.values]
            if any(later.values == form.values for later in chosen[number + 1 :]):  # it has the same codes
                made = copy.deepcopy(made)
            else:
                del of_codes[form.values]
            if form.head:
                round_head_(made, form.head, calibration)
            point = Point(f"{label} {form}", math.nan, stored_bytes(made, form, pattern), pattern and label)
            if not options.speeds_only:
                point.perplexity = perplexity(made, text, seq_len=options.seq_len).perplexity
            point.zero_shot = accuracy(options, made, loaded)
            print(point, flush=True)
            onto_kernels(made.eval(), form, pattern, codes)
            points.append(point)
            runners[point.name] = runner_of(made)
    return points, runners


# ---- the peers, each with the dense model


def dense_folder(options: argparse.Namespace, loaded: Loaded) -> Path:
    """The folder of the dense model that peers convert, saved once for all of them."""
    folder = Path(options.scratch) / "model"
    if not (folder / "config.json").exists():  # which is written after the weights
        save_model(loaded.model, loaded.tokenizer, folder)
    return folder


def bf16_gguf(options: argparse.Namespace, loaded: Loaded) -> Path:
    """The model as a GGUF file, made by the converter of llama.cpp's sources unless it is there."""
    sources, file = options.llama_cpp or os.environ.get("LLAMA_CPP"), Path(options.scratch) / "bf16.gguf"
    if not sources:
        raise MissingPeerError("name the sources of llama.cpp by --llama-cpp or LLAMA_CPP")
    if not file.exists():
        gguf_files.convert(dense_folder(options, loaded), sources, file)
    return file


def llama_cpp_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    try:
        from benchmarks import llamacpp
    except ImportError as error:
        raise MissingPeerError(
            "pip install --no-binary llama-cpp-python llama-cpp-python sentencepiece gguf"
        ) from error
    source, points, runners = bf16_gguf(options, loaded), [], {}
    for form in llamacpp.FORMATS:
        file = llamacpp.quantize(source, form, source.with_name(f"{form}.gguf"))
        point = Point(f"dense {form}, llama.cpp", math.nan, gguf_files.tensor_bytes(file))
        if not options.speeds_only:
            point.perplexity = llamacpp.LlamaCpp(file, options.seq_len, torch.get_num_threads()).perplexity(text)
        if options.tasks_from:
            point.zero_shot = accuracy(options, load_model(file).model, loaded)
        points.append(point)
        runners[point.name] = LlamaCpp(str(file), "f16", torch.get_num_threads())
    return points, runners


def process_points(
    options: argparse.Namespace, text: Tensor, peer: PeerProcess, name: str
) -> tuple[list[Point], Runners]:
    """The formats of a peer in a process of its own."""
    points, runners = [], {}
    for form, num_bytes in peer.sizes.items():
        point = Point(f"dense {form}, {name}", math.nan, num_bytes)
        if not options.speeds_only:
            point.perplexity = peer.ask(form, "perplexity", text, seq_len=options.seq_len)["perplexity"]
        points.append(point)
        runners[point.name] = Peer(peer, form)
    return points, runners


def ik_llama_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    python = options.ik_llama or os.environ.get("IK_LLAMA_PYTHON") or sys.executable
    if not has_packages(python, "ik_llama_cpp, gguf, numpy"):
        raise MissingPeerError("install it as ik_llama_peer.py says, and name its Python by --ik-llama")
    source = bf16_gguf(options, loaded)
    peer = PeerProcess("ik_llama_peer", python, torch.get_num_threads(), source, source.with_name("ik_llama"))
    return process_points(options, text, peer, "ik_llama.cpp")


def openvino_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    python = options.openvino or os.environ.get("OPENVINO_PYTHON") or sys.executable
    if not has_packages(python, "openvino, nncf, optimum.intel"):
        raise MissingPeerError(
            "pip install openvino nncf optimum-intel in another environment, and name its Python by --openvino"
        )
    source = dense_folder(options, loaded)
    peer = PeerProcess("openvino_peer", python, torch.get_num_threads(), source, source.with_name("openvino"))
    return process_points(options, text, peer, "OpenVINO")


def torch_points(options: argparse.Namespace, loaded: Loaded, text: Tensor) -> tuple[list[Point], Runners]:
    """torch's dynamic int8: per tensor, so that it is fast and loses more than others."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise MissingPeerError(f"torch {torch.__version__} has no dynamic int8") from error
    made = copy.deepcopy(loaded.model).float().eval()
    num_rounded = sum(module.weight.numel() for module in made.modules() if isinstance(module, nn.Linear))
    kept = {
        id(p): p.numel()
        for module in made.modules()
        if not isinstance(module, nn.Linear)
        for p in module._parameters.values()
        if p is not None
    }
    quantize_dynamic(made, {nn.Linear}, dtype=torch.qint8, inplace=True)
    point = Point("dense int8, torch dynamic", math.nan, num_rounded + 4 * sum(kept.values()))
    if not options.speeds_only:  # `castlm.perplexity` wants a plain head
        parts = [part for part in text.split(options.seq_len) if len(part) > 1]
        losses = [F.cross_entropy(made(part[None]).logits[0, :-1], part[1:], reduction="sum") for part in parts]
        point.perplexity = math.exp(float(sum(losses)) / sum(len(part) - 1 for part in parts))
    return [point], {point.name: runner_of(made)}


PEERS = {
    "openvino": openvino_points,
    "llama.cpp": llama_cpp_points,
    "ik_llama.cpp": ik_llama_points,
    "torch": torch_points,
}


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
    points, runners = [], {}
    for name in options.peers:
        try:
            more_points, more_runners = PEERS[name](options, loaded, text)
        except MissingPeerError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        print(*more_points, sep="\n", flush=True)
        points, runners = points + more_points, runners | more_runners
    more_points, more_runners = castlm_points(options, loaded, text)
    points, runners = more_points + points, runners | more_runners
    if options.quality_only:
        return points
    take_quality(points, options.quality)
    ids = np.random.default_rng(0).integers(0, loaded.model.config.get_text_config().vocab_size, (BATCH, LONG_PROMPT))
    for key, work in WORK.items():
        found = in_turns(runners, ids[: work.count, : work.length], work.is_prompt, options.rounds)
        for point in points:
            point.seconds[key] = found[point.name]
    return points


def take_quality(points: list[Point], files: list[str]) -> None:
    """Gives points the quality that runs with `--quality-only` have measured, by name."""
    known = {found["name"]: found for file in files for found in json.loads(Path(file).read_text())["points"]}
    for point in points:
        if found := known.get(point.name):
            if point.num_bytes != found["num_bytes"]:
                raise SystemExit(f"{point.name} has other bytes than in --quality: it is another model")
            point.perplexity, point.zero_shot = found["perplexity"], found["zero_shot"]


def table(points: list[Point]) -> str:
    """Markdown: tokens per second of each kind of work."""
    tasks = [f" {row['task']}, {row['num_docs']} questions |" for row in points[0].zero_shot]
    lines = [
        f"| format | perplexity |{''.join(tasks)} MB |" + "".join(f" {work.name}, tokens/s |" for work in WORK.values())
    ]
    lines.append("|---|" + "---:|" * (2 + len(WORK) + len(tasks)))
    for p in points:
        shown = "".join(f" {100 * row['value']:.1f} ± {100 * row['stderr']:.1f} % |" for row in p.zero_shot)
        quality = "" if math.isnan(p.perplexity) else f"{p.perplexity:.2f}"
        speeds = "".join(f" {p.per_second(work):,.{1 if work == 'decode' else 0}f} |" for work in WORK)
        speeds = speeds.replace("nan", "")
        lines.append(f"| {p.name} | {quality} |{shown} {p.num_bytes / 1e6:.1f} |{speeds}")
    return "\n".join(lines)


def against_dense(points: list[Point]) -> str:
    """Markdown: each sparse format in units of the fastest dense one of all, with the spread of the rounds."""
    dense = [point for point in points if point.pattern is None]
    best = {work: max(dense, key=lambda point: point.per_second(work)) for work in WORK}
    lines = ["| in units of the fastest dense |" + "".join(f" {work.name} |" for work in WORK.values())]
    lines.append("|---|" + "---:|" * len(WORK))
    lines.append("| which is |" + "".join(f" {best[work].name.removeprefix('dense ')} |" for work in WORK))
    for point in points:
        if point.pattern is not None:
            cells = [ratio_text(best[work].seconds[work], point.seconds[work]) for work in WORK]
            lines.append(f"| {point.name} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def ratio_text(theirs: list[float], mine: list[float]) -> str:
    ratios = [b / a for a, b in zip(mine, theirs)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def plot(points: list[Point], file: str) -> None:
    """Perplexity over bytes and over the speeds of decoding and of a prompt, a line for each kind of model, head and
    program. Points of more than three times the least perplexity are named and left out.
    """
    from matplotlib.figure import Figure

    known = [point for point in points if not math.isnan(point.perplexity)]
    least = min(point.perplexity for point in known)
    shown = [point for point in known if point.perplexity <= 3 * least]
    figure = Figure(figsize=(16, 5), layout="constrained")
    by_bytes, by_decoding, by_prompt = figure.subplots(1, 3, sharey=True)
    lines: dict[str, list[Point]] = {}
    for point in shown:
        label, _, end = point.name.rpartition(", ")
        lines.setdefault(f"{point.name.split()[0]}{f', {end}' if label else ''}", []).append(point)
    for label, chosen in lines.items():
        quality = [point.perplexity for point in chosen]
        marker, line = ("s", "--") if label.startswith("dense") else ("o", "-")
        for axes, x in (
            (by_bytes, [point.num_bytes / 1e6 for point in chosen]),
            (by_decoding, [point.per_second("decode") for point in chosen]),
            (by_prompt, [point.per_second("read") for point in chosen]),
        ):
            axes.plot(x, quality, marker=marker, linestyle=line, label=label)
            for place, point in zip(zip(x, quality), chosen):
                text = point.name.split()[1].rstrip(",")
                axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    by_bytes.set(xlabel="MB", ylabel="perplexity", xscale="log")
    by_decoding.set(xlabel="tokens per second, decoding", xscale="log")
    by_prompt.set(xlabel=f"tokens per second, prompt of {LONG_PROMPT}", xscale="log")
    left_out = [f"{point.name} ({point.perplexity:.0f})" for point in known if point not in shown]
    by_bytes.set_title(f"not shown: {', '.join(left_out)}" if left_out else "", fontsize=8)
    figure.legend(*by_bytes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sparse", nargs="+", default=[], help="n:m model folders, or runs of castlm train")
    parser.add_argument("--pattern", nargs="+", default=["2:4", "32:64"], help="of the models that are pruned here")
    parser.add_argument("--formats", nargs="+", help="some of castlm's, as 'int8, int8 head'; all by default")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=["int8"], help="formats of head and embedding")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text that int4 and int3 are rounded by; needed unless --speeds-only")
    parser.add_argument("--speeds-only", action="store_true")
    parser.add_argument("--quality-only", action="store_true")
    parser.add_argument(
        "--quality", nargs="+", default=[], metavar="JSON", help="of --quality-only, with --speeds-only"
    )
    parser.add_argument("--sequences", type=int, default=32, help="of calibration tokens")
    parser.add_argument("--calibration-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tasks-from", metavar="FOLDER", help="zero-shot accuracy too, from files (needs lm-eval)")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"])
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="none: --peers alone")
    parser.add_argument("--llama-cpp", metavar="SOURCES", help="a checkout of llama.cpp (needs llama-cpp-python)")
    parser.add_argument("--ik-llama", metavar="PYTHON", help="of an environment with ik-llama-cpp-python")
    parser.add_argument("--openvino", metavar="PYTHON", help="of an environment with OpenVINO")
    parser.add_argument("--scratch", metavar="FOLDER", help="keeps the peers' models for another run with this --model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--plot", metavar="OUT")
    options = parser.parse_args(arguments)
    if not (options.calibration or options.speeds_only):
        parser.error("name a text with --calibration, or measure with --speeds-only")
    if options.quality_only and options.speeds_only:
        parser.error("--quality-only and --speeds-only exclude each other")
    if options.quality and not options.speeds_only:
        parser.error("--quality is for --speeds-only: without it the perplexities are measured")
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = options.scratch or scratch
        points = frontier(options)
    print(table(points))
    if not options.quality_only:
        print("", against_dense(points), sep="\n")
    write_json(options.json, {"machine": machine(), "options": vars(options), "points": [asdict(p) for p in points]})
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
