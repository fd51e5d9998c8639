"""Packed weights on a CPU: linear layers, decoding, prefill, file size and memory, each against dense ones.

    python -m benchmarks.inference --resident FOLDER    the memory of one loaded model; what `memory_row` starts

Weights of the linear layers are read from many copies in turn, larger together than the last-level cache, as those of a
model are. SmolLM2-135M-Instruct is pruned 2:4 by magnitude: its text is poor, but its speed does not depend on that.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import castlm
from benchmarks.machine import proc_status
from benchmarks.rows import Row, Times, interleaved, ratio_row
from castlm.core.nm import nm_mask
from castlm.core.sparsify import prune_
from castlm.export.packed import pack_folder
from castlm.formats.rounding import round_rows
from castlm.hardware import has_fast_bf16
from castlm.models.io import load_model, save_model
from castlm.packed import native
from castlm.packed.in_engine import Greedy
from castlm.packed.layers import pack_model_, packed_linear
from castlm.packed.tensor import PackedTensor, pack, pack_integers

SHAPES = [(1536, 576), (4096, 4096)]
COPIES_BYTES = 96 << 20  # three times a last-level cache of 32 MB
NEW_TOKENS = 64


def packed_copies(packed: PackedTensor) -> Callable[[Tensor], Tensor]:
    """Multiplies by the next of many copies of a weight at each call."""
    spec = packed.spec
    size = native.packed_bytes(spec.values, spec.n, spec.m, spec.rows, spec.columns)
    step = -(-size // 64) * 64
    arena = native.allocate(step * max(2, COPIES_BYTES // step))
    buffers = [arena[at : at + size] for at in range(0, len(arena), step)]
    for buffer in buffers:
        packed.repack_(buffer)
    turn = itertools.cycle(buffers)
    return lambda x: packed_linear(x, next(turn), spec.rows)


def torch_copies(weight: Tensor) -> Callable[[Tensor], Tensor]:
    turn = itertools.cycle([weight.clone() for _ in range(max(2, COPIES_BYTES // weight.nbytes))])
    return lambda x: F.linear(x.to(weight.dtype), next(turn))


def linear_times(shape: tuple[int, int], clock: str) -> Times:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sparse = weight.masked_fill(~nm_mask(weight), 0.0)
    rounded = round_rows(weight, "int8")
    codes, scales = rounded.codes, rounded.scales
    contestants = {
        "2:4 bf16": packed_copies(pack(sparse.bfloat16(), 2, 4)),
        "dense bf16": packed_copies(pack(weight.bfloat16(), 0, 0)),
        "2:4 int8": packed_copies(pack_integers(codes * nm_mask(weight), scales, "int8", 2, 4, nm_mask(weight))),
        "dense int8": packed_copies(pack_integers(codes, scales, "int8", 0, 0)),
        "torch bf16": torch_copies(weight.bfloat16()),
        "torch fp32": torch_copies(weight),
    }
    x = torch.randn(1, shape[1])
    calls = max(1, 100_000_000 // weight.numel())  # some milliseconds a round

    def repeated(multiply: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                multiply(x)

        return run

    return interleaved({name: repeated(multiply) for name, multiply in contestants.items()}, 31, clock)


@torch.inference_mode()
def linear_rows(shapes: list[tuple[int, int]], clock: str = "wall") -> list[Row]:
    """One token times one weight, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for shape in shapes:
        times = linear_times(shape, clock)
        best = min(("torch bf16", "torch fp32"), key=lambda name: sorted(times[name])[len(times[name]) // 2])
        part = f"linear {shape[0]} x {shape[1]}, 1 thread"
        rows += [
            ratio_row(f"{part}, 2:4 bf16", "castlm's dense bf16", times["2:4 bf16"], times["dense bf16"], ">= 1.5"),
            ratio_row(f"{part}, 2:4 bf16", f"torch's best, {best}", times["2:4 bf16"], times[best], ">= 2"),
            ratio_row(f"{part}, 2:4 int8", "castlm's dense int8", times["2:4 int8"], times["dense int8"], ">= 1.4"),
        ]
    torch.set_num_threads(before)
    return rows


@torch.inference_mode()
def model_rows(name: str, repeats: int, num_tokens: int, prompt: int, clock: str = "wall") -> list[Row]:
    """Greedy decoding, and prefill, of one model in several forms."""
    plain = load_model(name).model
    prune_(plain.bfloat16())
    models = {
        "2:4": copy.deepcopy(plain),
        "2:4, int8 head": copy.deepcopy(plain),
        "dense kernels": copy.deepcopy(plain),
        "transformers bf16": plain,
        "transformers fp32": copy.deepcopy(plain).float(),
    }
    pack_model_(models["2:4"])
    pack_model_(models["2:4, int8 head"], head="int8")
    pack_model_(models["dense kernels"], 0, 0)
    ids = torch.arange(1, 9)[None]
    greedy = {key: Greedy(model) for key, model in models.items()}
    assert torch.equal(greedy["2:4"](ids, num_tokens), greedy["transformers fp32"](ids, num_tokens))
    times = interleaved(
        {key: functools.partial(of_model, ids, num_tokens) for key, of_model in greedy.items()}, repeats, clock
    )
    long = torch.arange(prompt)[None] % 256
    peers = ["transformers fp32"] + ["transformers bf16"] * has_fast_bf16()
    prefill = interleaved(
        {key: lambda model=models[key]: model(long, use_cache=False) for key in ("2:4", *peers)}, repeats, clock
    )
    decode = f"decode {num_tokens} tokens, batch 1"
    detail = {key: num_tokens / min(rounds) for key, rounds in times.items()}
    against_dense = "same loop, castlm's dense bf16"
    return [
        ratio_row(f"{decode}, 2:4 bf16", against_dense, times["2:4"], times["dense kernels"], ">= 1.4", detail=detail),
        ratio_row(
            f"{decode}, 2:4 bf16, int8 head", against_dense, times["2:4, int8 head"], times["dense kernels"], ">= 1.4"
        ),
        ratio_row(f"{decode}, 2:4 bf16", "transformers, dense bf16", times["2:4"], times["transformers bf16"], ">= 2"),
        ratio_row(f"{decode}, 2:4 bf16", "transformers, dense fp32", times["2:4"], times["transformers fp32"], ">= 2"),
        *(
            ratio_row(
                f"prefill of {prompt} tokens, 2:4 bf16",
                peer.replace(" ", ", dense "),
                *(prefill["2:4"], prefill[peer]),
                ">= 0.95" if peer == "transformers fp32" else "",
                speedup=True,
            )
            for peer in peers
        ),
    ]


def size_rows(name: str) -> list[Row]:
    """Bytes of the weight files, and those that a process holds after loading and one token, the libraries apart."""
    with tempfile.TemporaryDirectory() as scratch:
        plain, packed = Path(scratch) / "plain", Path(scratch) / "packed"
        loaded = load_model(name)
        prune_(loaded.model.bfloat16())
        save_model(loaded.model, loaded.tokenizer, plain)
        report = pack_folder(plain, packed)
        ratio = report.bytes_after / report.bytes_before
        rows = [Row("file, 2:4 bf16", "dense bf16", ratio, ratio, ratio, "<= 0.66")]
        if Path("/proc/self/status").exists():
            held = [resident(folder) for folder in (packed, plain)]
            ratio = held[0] / held[1]
            rows.append(Row("resident memory, 2:4 bf16", "dense bf16", ratio, ratio, ratio, "<= 0.70"))
    return rows


def resident(folder: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.inference", "--resident", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@torch.inference_mode()
def show_resident(folder: str) -> None:
    """Prints by how many bytes this process grew while it loaded a model and computed the logits of one token."""
    torch.set_num_threads(1)
    small = torch.nn.Linear(64, 64)(torch.randn(2, 64))  # the libraries are loaded, and their buffers made
    AutoModelForCausalLM._model_mapping.keys()
    castlm.register()
    native.kernels()
    native.trim_memory()
    before = proc_status("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model(torch.tensor([[1]]), use_cache=False)
    native.trim_memory()
    print(proc_status("VmRSS") - before if small is not None else 0)


def rows(quick: bool, model: str, clock: str = "wall") -> list[Row]:
    """All rows; on small shapes with `quick`."""
    if native.kernels() is None:
        return []
    if quick:
        return [*linear_rows([(64, 128)], clock), *model_rows(model, 1, 4, 64, clock), *size_rows(model)]
    return [*linear_rows(SHAPES, clock), *model_rows(model, 5, NEW_TOKENS, 512, clock), *size_rows(model)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resident", required=True, metavar="FOLDER")
    show_resident(parser.parse_args().resident)
