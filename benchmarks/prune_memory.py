"""Compares `plan memory --prune` and `--quantize` with the peak of resident memory of `castlm prune` and `quantize`.

Run: `python -m benchmarks.prune_memory [--shape NAME] [--layers N] [--case NAME ...] [--json OUT]` (Linux: the peak is
read from /proc). The model has random bf16 weights in the shape of a Llama, one file a transformer block. Each case is
a process of its own on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tests.tiny import tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine, proc_status, write_json
from castlm.cli.command_line import command_line
from castlm.cli.main import main as castlm
from castlm.cli.prune import PruneCommand
from castlm.cli.quantize import QuantizeCommand
from castlm.core.blocks import in_block
from castlm.lab.compare.presets import SPARSEGPT
from castlm.lab.planning.one_shot import ROUND, plan_one_shot
from castlm.oneshot.options import EFFORTS, with_effort
from castlm_runtime.formats import FORMATS

GIB = 2**30
SEQUENCES, SEQ_LEN = 4, 256


class Shape(NamedTuple):
    """Sizes of a Llama with 8 KV heads and tied embeddings."""

    hidden: int
    inner: int
    heads: int
    vocab: int


SHAPES = {
    "0.3B": Shape(1024, 2816, 16, 32_000),
    "0.5B": Shape(1024, 4864, 16, 128_256),  # 24 layers
    "3B": Shape(3072, 8192, 24, 128_256),
}

AS_PUBLISHED = {name: value for name, value in SPARSEGPT.items() if name != "init_from"}
CASES: dict[str, dict[str, Any]] = {
    "SparseGPT as published": AS_PUBLISHED,
    "refit": {"mask_iterations": 0, "refit_iterations": 2},
    "the default": {},
    "wanda": {"solver": "wanda"},
    "reconstruction": {**AS_PUBLISHED, "reconstruct_epochs": 2},
    "SparseGPT as published, the model in memory": {**AS_PUBLISHED, "memory": "model"},
    "the default, the model in memory": {"memory": "model"},
    "int4, packed": {"kind": "int4", "packed": True},
    "int8": {"kind": "int8"},
}
"""Options of `castlm prune`, or with a `kind` of `castlm quantize`."""


def write_model(folder: Path, shape: Shape, num_layers: int) -> None:
    """A model folder that is read, and was made, one transformer block at a time."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=8,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    where = {}
    for part, names in itertools.groupby(shapes, lambda name: name.split(".")[2] if in_block(name) else name):
        tensors = {name: random_weight(shapes[name], generator) for name in names}
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A matrix in bf16, or the gains of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=0.02, generator=generator).bfloat16()


def command_of(case: Mapping[str, Any], model: Path, text: Path, output: Path) -> PruneCommand | QuantizeCommand:
    """The command of a case."""
    own: dict[str, Any] = {"model": str(model), "output_dir": str(output), "device": "cpu"}
    reads = {"calibration": str(text), "calibration_sequences": SEQUENCES, "seq_len": SEQ_LEN}
    if "kind" in case:
        return QuantizeCommand(**own, **(reads if FORMATS[case["kind"]].reads_text else {}), **case)
    return PruneCommand(**with_effort({**own, **reads, "memory": "block", **case}))


def planned_here(command: PruneCommand | QuantizeCommand) -> int:
    """The child's part: the planned peak in bytes, which counts the process as it is."""
    if isinstance(command, QuantizeCommand):
        reads_text = FORMATS[command.kind].reads_text
        return plan_one_shot(
            command.model, rule=ROUND, reads_text=reads_text, num_sequences=SEQUENCES, seq_len=SEQ_LEN
        ).peak
    return plan_one_shot(
        command.model,
        memory="block" if command.memory == "block" else "model",
        num_sequences=command.calibration_sequences,
        seq_len=command.seq_len,
        effort=EFFORTS[command.start_effort],
        reconstructs=bool(command.reconstruct_epochs),
    ).peak


def in_child(*arguments: str) -> int:
    """The number that a process of its own prints last. Exits where it fails."""
    module = [sys.executable, "-m", "benchmarks.prune_memory", *arguments]
    child = subprocess.run(module, stdout=subprocess.PIPE, check=False)
    if child.returncode:
        sys.exit(f"{shlex.join(arguments)} ended with {child.returncode}")
    return int(child.stdout.split()[-1])


def measured_peak(command: PruneCommand | QuantizeCommand) -> tuple[int, float]:
    """Bytes and seconds of the command."""
    line = command_line("quantize" if isinstance(command, QuantizeCommand) else "prune", command)
    started = time.perf_counter()
    peak = in_child("--child", *shlex.split(line)[1:])  # behind "castlm"
    return peak, time.perf_counter() - started


def prune_here(command: list[str]) -> int:
    """The child's part: prints the peak of its resident memory. That of a child that the system tells the parent counts
    what the parent held when it started it."""
    code = castlm(command)
    print(proc_status("VmHWM"))
    return code


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3B")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", help="for the model and the results; a temporary one by default")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--planned", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.planned:
        name, folder = args.planned
        print(planned_here(command_of(CASES[name], Path(folder), Path("text.txt"), Path("result"))))
        return
    if args.child:
        sys.exit(prune_here(args.child))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        model, text = folder / "model", folder / "text.txt"
        model.mkdir()
        letters = torch.randint(97, 123, (40_000,), generator=torch.Generator().manual_seed(0))
        text.write_bytes(bytes(letters.tolist()))
        write_model(model, SHAPES[args.shape], args.layers)
        print(f"{'case':<46}{'predicted':>12}{'measured':>12}{'ratio':>8}{'seconds':>10}")
        for number, name in enumerate(args.case):
            command = command_of(CASES[name], model, text, folder / str(number))
            predicted = in_child("--planned", name, str(model))
            measured, seconds = measured_peak(command)
            ratio = predicted / measured
            print(
                f"{name:<46}{predicted / GIB:>8.2f} GiB{measured / GIB:>8.2f} GiB{ratio:>8.3f}{seconds:>10.0f}",
                flush=True,
            )
            rows.append({"case": name, "predicted": predicted, "measured": measured, "seconds": seconds})
    write_json(args.json, {"machine": machine(), "shape": args.shape, "layers": args.layers, "rows": rows})


if __name__ == "__main__":
    main()
